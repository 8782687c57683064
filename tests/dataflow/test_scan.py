"""Scans are remembered as long as nothing changed, file by file, and never trusted beyond that."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from cache.access import open_reader
from dataflow.dataset import open_dataset
from dataflow.formats import open_source
from dataflow.formats.place import BadRange
from dataflow.formats.sidecar import FileScan
from dataflow.formats.text import TextFormat
from dataflow.index import kept

DATA = Path(__file__).parent / "data"


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []
    original = TextFormat.scan_file

    def remember(self: TextFormat, place: object, meta: object) -> FileScan:
        made.append(meta.key)  # type: ignore[attr-defined]
        return original(self, place, meta)  # type: ignore[arg-type]

    monkeypatch.setattr(TextFormat, "scan_file", remember)
    return made


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.txt").write_text("one\ntwo\n")
    return tmp_path / "set"


def test_an_unchanged_dataset_is_scanned_once(place: Path, kept_scans: Path, scans: list[str]) -> None:
    first, second = open_dataset(place), open_dataset(place)
    assert scans == ["a.txt"]
    assert first.fingerprint == second.fingerprint
    assert [sample["text"] for sample in second] == ["one", "two"]
    assert [path.suffix for path in kept_scans.iterdir()] == [".arrow"]


def test_only_files_that_are_new_or_changed_are_scanned(
    place: Path, kept_scans: Path, scans: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    open_dataset(place)
    (place / "b.txt").write_text("three\n")
    with caplog.at_level(logging.INFO):
        open_dataset(place)
    assert "1 of 2 files" in caplog.text
    (place / "a.txt").write_text("ONE\nTWO\n")
    dataset = open_dataset(place)
    assert [sample["text"] for sample in dataset] == ["ONE", "TWO", "three"]
    assert scans == ["a.txt", "b.txt", "a.txt"]
    (place / "a.txt").unlink()
    assert [sample["text"] for sample in open_dataset(place)] == ["three"]
    assert len(scans) == 3
    assert len(list(kept_scans.iterdir())) == 1


def test_an_index_that_grew_file_by_file_is_that_of_one_scan(place: Path, kept_scans: Path) -> None:
    open_dataset(place)
    (place / "b.txt").write_text("three\n")
    grown = open_dataset(place).fingerprint
    for path in kept_scans.iterdir():
        path.unlink()
    assert open_dataset(place).fingerprint == grown


def test_a_damaged_kept_scan_is_made_again(
    place: Path, kept_scans: Path, scans: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    open_dataset(place)
    (path,) = kept_scans.iterdir()
    good = path.read_bytes()
    for content in (b"", b"x" * 1000, good[:-100], good.replace(b"text", b"tixt")):
        path.write_bytes(content)
        assert len(open_dataset(place)) == 2
    assert len(scans) == 5
    assert "is damaged and is made again" in caplog.text


def test_a_kept_scan_of_which_a_byte_is_flipped_is_not_used(tmp_path: Path, kept_scans: Path) -> None:
    shutil.copytree(DATA / "mds-plain", tmp_path / "set")
    expected = open_dataset(tmp_path / "set").index
    (path,) = kept_scans.iterdir()
    good = path.read_bytes()
    for position in range(0, len(good), 9):
        changed = bytearray(good)
        changed[position] ^= 0x01
        path.write_bytes(changed)
        index = open_dataset(tmp_path / "set").index
        assert index.fingerprint == expected.fingerprint
        np.testing.assert_array_equal(index.blocks.offset, expected.blocks.offset)
    assert len(list(kept_scans.iterdir())) == 1


def test_where_nothing_can_be_kept_it_is_scanned_each_time(
    place: Path, tmp_path: Path, scans: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(open_dataset(place)) == len(open_dataset(place)) == 2
    assert len(scans) == 2
    assert "could not be kept" in caplog.text


def test_no_more_than_a_number_of_files_and_bytes_is_kept(
    place: Path, kept_scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "MAX_KEPT", 3)
    for number in range(6):
        kept.keep(f"{number}.arrow", b"x" * 100)
    assert len(list(kept_scans.iterdir())) == 3
    monkeypatch.setattr(kept, "MAX_KEPT_BYTES", 150)
    kept.keep("last.arrow", b"x" * 1000)
    assert [path.name for path in kept_scans.iterdir()] == ["last.arrow"]


def test_a_kept_lenient_scan_tells_again_what_it_passed_over(place: Path, kept_scans: Path) -> None:
    (place / "a.txt").unlink()
    (place / "a.jsonl").write_text('{"n": 1}\n{broken\n{"n": 2}\n')
    told = []
    for _ in range(2):
        bad: list[BadRange] = []
        url = place.as_uri()
        source = open_source(url, open_reader(url, None), bad=bad)
        told.append(bad)
        assert source.index.num_samples == 2
    assert told[0] == told[1]
    assert [(entry.offset, entry.length) for entry in told[0]] == [(9, 8)]
    assert [path.suffix for path in kept_scans.iterdir()] == [".arrow"]
