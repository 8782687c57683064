"""Folders for scratch: gone behind whoever used them, those of the killed too, and never under anybody's hands."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from connectors import scratch
from connectors.scratch import scratch_folder

KILLED = """
import os, signal
from pathlib import Path
from connectors.scratch import scratch_folder
with scratch_folder() as folder:
    Path(folder, "shard").write_text("large")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def test_it_is_gone_afterwards_also_after_an_error(temporary: Path) -> None:
    def fail(folder: str) -> None:
        Path(folder, "file").write_text("x")
        raise KeyError

    with suppress(KeyError), scratch_folder() as folder:
        fail(folder)
    assert list(temporary.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_nothing_else(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert subprocess.run([sys.executable, "-c", KILLED], check=False).returncode == -signal.SIGKILL
    (left,) = temporary.iterdir()
    assert (left / "shard").exists()
    (temporary / "dataflow-mine").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(scratch, "boot_name", lambda: "f" * 32)
        with scratch_folder():
            assert left.exists()
    with scratch_folder() as first, scratch_folder() as second:
        assert {path.name for path in temporary.iterdir()} == {
            "dataflow-mine",
            os.path.basename(first),
            os.path.basename(second),
        }


def test_a_folder_that_is_swept_before_it_is_locked_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    real, swept = scratch._lock, []

    def sweep_first(folder: str) -> int:
        if not swept:
            swept.append(folder)
            os.rmdir(folder)
        return real(folder)

    monkeypatch.setattr(scratch, "_lock", sweep_first)
    with scratch_folder() as folder:
        assert os.path.isdir(folder)
        assert [folder] != swept


def test_where_nothing_can_be_locked_it_works_and_nothing_is_swept(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: str) -> int:
        raise OSError("no locks available")

    monkeypatch.setattr(scratch, "_lock", refuse)
    with scratch_folder() as first, scratch_folder():
        assert os.path.isdir(first)
    assert list(temporary.iterdir()) == []
