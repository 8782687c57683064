"""Scans are remembered as long as nothing changed, and never trusted beyond that."""

from pathlib import Path

import pytest

from dataflow.dataset import open_dataset
from dataflow.formats import scan
from dataflow.formats.text import TextFormat


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dataflow" / "index"


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []
    original = TextFormat._scan

    def remember(self: TextFormat, *arguments: object) -> scan.Scan:
        made.append(self.name)
        return original(self, *arguments)

    monkeypatch.setattr(TextFormat, "_scan", remember)
    return made


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.txt").write_text("one\ntwo\n")
    return tmp_path / "set"


def test_an_unchanged_dataset_is_scanned_once(place: Path, kept: Path, scans: list[str]) -> None:
    first, second = open_dataset(place), open_dataset(place)
    assert scans == ["text"]
    assert first.fingerprint == second.fingerprint
    assert [sample["text"] for sample in second] == ["one", "two"]
    assert [path.suffix for path in kept.iterdir()] == [".arrow"]


def test_any_change_of_the_files_means_a_new_scan(place: Path, kept: Path, scans: list[str]) -> None:
    open_dataset(place)
    (place / "a.txt").write_text("ONE\nTWO\n")
    open_dataset(place)
    (place / "b.txt").write_text("three\n")
    open_dataset(place)
    assert len(scans) == 3
    assert len(list(kept.iterdir())) == 3


def test_a_damaged_kept_scan_is_made_again(
    place: Path, kept: Path, scans: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    for content in (b"", b"x" * 1000):
        open_dataset(place)
        for path in kept.iterdir():
            path.write_bytes(content)
        assert len(open_dataset(place)) == 2
    assert len(scans) == 3
    assert "is damaged and is made again" in caplog.text


def test_where_nothing_can_be_kept_it_is_scanned_each_time(
    place: Path, tmp_path: Path, scans: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(open_dataset(place)) == len(open_dataset(place)) == 2
    assert len(scans) == 2
    assert "could not be kept" in caplog.text


def test_no_more_than_a_number_of_scans_is_kept(place: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "MAX_KEPT", 3)
    for number in range(6):
        (place / "a.txt").write_text("x\n" * (number + 1))
        open_dataset(place)
    assert len(list(kept.iterdir())) == 3
