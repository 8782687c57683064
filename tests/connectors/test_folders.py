"""Hidden files of unfinished writes: nobody removes what is being written, somebody removes what is not."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from connectors import folders
from connectors.folders import create_partial, is_partial, sweep_partials

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
    monkeypatch.setattr(folders, "_boot", lambda: "f" * 32)
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
