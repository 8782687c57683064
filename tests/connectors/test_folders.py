"""Hidden files of unfinished writes: nobody removes what is being written, somebody removes what is not."""

import logging
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from connectors import folders
from connectors.folders import create_partial, is_partial, list_folder, sweep_partials, walk_files

KILLED = """
import os, signal, sys
from connectors.folders import create_partial
create_partial(sys.argv[1])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for folder in (tmp_path, tmp_path / "below"):
        process = subprocess.run([sys.executable, "-c", KILLED, str(folder)], check=False)
        assert process.returncode == -signal.SIGKILL
    (tmp_path / "mine").write_text("mine")
    assert sum(is_partial(path.name) for path in tmp_path.rglob("*")) == 2
    assert sweep_partials(tmp_path, recursive=False) == 1
    assert sum(is_partial(path.name) for path in tmp_path.iterdir()) == 0
    assert sweep_partials(tmp_path) == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["below", "mine"]


def test_what_is_being_written_stays(tmp_path: Path) -> None:
    path, descriptor = create_partial(str(tmp_path))
    assert sweep_partials(tmp_path) == 0
    os.close(descriptor)
    assert sweep_partials(tmp_path) == 1
    assert not Path(path).exists()


def test_what_another_machine_writes_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, descriptor = create_partial(str(tmp_path))
    os.close(descriptor)
    monkeypatch.setattr(folders, "boot_name", lambda: "f" * 32)
    assert sweep_partials(tmp_path) == 0
    assert Path(path).exists()


def test_a_writer_whose_new_file_is_swept_makes_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, swept = folders.fcntl.flock, []

    class Racing:
        LOCK_EX, LOCK_NB = folders.fcntl.LOCK_EX, folders.fcntl.LOCK_NB

        @staticmethod
        def flock(descriptor: int, operation: int) -> None:
            if len(swept) < 2:  # once before the lock is asked for, once while a sweeper holds it
                (path,) = tmp_path.iterdir()
                swept.append(path)
                path.unlink()
                if len(swept) == 2:
                    raise BlockingIOError
            real(descriptor, operation)

    monkeypatch.setattr(folders, "fcntl", Racing)
    path, descriptor = create_partial(str(tmp_path))
    os.close(descriptor)
    assert [Path(path)] == list(tmp_path.iterdir())
    assert len(swept) == 2


def test_without_locks_files_are_written_and_never_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Without:
        LOCK_EX, LOCK_NB = folders.fcntl.LOCK_EX, folders.fcntl.LOCK_NB

        @staticmethod
        def flock(descriptor: int, operation: int) -> None:
            raise OSError(38, "Function not implemented")

    monkeypatch.setattr(folders, "fcntl", Without)
    path, descriptor = create_partial(str(tmp_path))
    os.close(descriptor)
    assert sweep_partials(tmp_path) == 0
    assert Path(path).exists()


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder in a hidden one, with links that lead nowhere."""
    root = tmp_path / ".hidden" / "set"
    for folder in (root / "cats", root / ".git", root / "later"):
        folder.mkdir(parents=True)
    (root / "cats" / "1.png").write_bytes(b"x")
    (root / "cats" / "2.png").symlink_to("absent")
    (root / "cats" / "3.png").symlink_to("1.png")
    (root / "dogs").symlink_to("/absent/dogs")
    (root / "itself").symlink_to("itself")
    (root / "up").symlink_to(root)
    # As editors leave them.
    (root / "cats" / ".#1.png").symlink_to("me@host.17")
    (root / ".git" / "HEAD").symlink_to("absent")
    return root


def test_links_that_lead_nowhere_are_found_unless_they_are_hidden(linked: Path, tmp_path: Path) -> None:
    lost: list[str] = []
    assert [meta.key for meta in list_folder(str(linked)[1:], lost=lost)] == ["cats/1.png", "cats/3.png"]
    assert lost == ["cats/2.png", "dogs", "itself"]
    assert list_folder(str(tmp_path / "absent")[1:], lost=lost) == []
    assert len(lost) == 3


def test_one_walk_tells_files_and_links_that_lead_nowhere(linked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scanned: Counter[str] = Counter()
    scandir = os.scandir

    def counting(path: str) -> Iterator[os.DirEntry[str]]:
        scanned[path] += 1
        return scandir(path)

    monkeypatch.setattr(folders.os, "scandir", counting)
    list_folder(str(linked)[1:], lost=[])
    assert scanned == Counter([str(linked), str(linked / ".git"), str(linked / "cats"), str(linked / "later")])


def test_a_listing_warns_once_of_links_that_lead_nowhere(linked: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = str(linked)[1:]
    with caplog.at_level(logging.WARNING):
        assert [meta.key for meta in walk_files(folder)] == [f"{folder}/cats/1.png", f"{folder}/cats/3.png"]
    assert [record.getMessage() for record in caplog.records] == [
        f"3 symbolic links lead nowhere and are not listed, such as {linked}/cats/2.png"
    ]
    caplog.clear()
    for path in (linked / "cats" / "2.png", linked / "dogs", linked / "itself"):
        path.unlink()
    assert len(list(walk_files(folder))) == 2
    assert not caplog.records
