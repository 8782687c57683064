"""Folders for what is needed only while a process works at it, in the machine's temporary folder.

A killed process cannot remove its own, and they may be as large as a dataset. So each is locked while it is in use,
and whoever makes one first removes those that nobody holds: of the same boot of the same machine only, as with the
hidden files of unfinished writes.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from connectors.folders import boot_name

__all__ = ["scratch_folder"]


@contextmanager
def scratch_folder() -> Iterator[str]:
    """Yield the path of a new folder of this user's, and remove it behind; remove those of killed processes before.

    Raises:
        OSError: As the system calls fail.
    """
    prefix = f"dataflow-{boot_name()}-"
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(OSError):  # in use, or of another user
            descriptor = _lock(left)
            shutil.rmtree(left, ignore_errors=True)
            os.close(descriptor)
    folder, held = _make(prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if held is not None:
            os.close(held)


def _make(prefix: str) -> tuple[str, int | None]:
    """Return a new folder, and the descriptor that locks it, where the file system has locks."""
    while True:
        folder = tempfile.mkdtemp(prefix=prefix)
        try:
            held = _lock(folder)
        except (BlockingIOError, FileNotFoundError):  # a sweeper came first
            continue
        except OSError:  # nobody sweeps there either
            return folder, None
        if os.path.exists(folder):
            return folder, held
        os.close(held)


def _lock(folder: str | os.PathLike[str]) -> int:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
