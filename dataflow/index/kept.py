"""A folder of indexes that were found or fetched before: `$XDG_CACHE_HOME/dataflow/index`, bounded.

Files are published by rename and never written in place, so one that is mapped stays what it was, also when another
process replaces or removes it. Whoever cannot keep one (a full or read-only disk) goes on without. A process killed
between writing and renaming leaves a `.part`, which ages and goes like everything else.
"""

from __future__ import annotations

import logging
import mmap
import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["keep", "kept_folder", "load", "map_file"]

logger = logging.getLogger(__name__)

# The least recently used goes when there are more files, or more bytes, than these.
MAX_KEPT = 256
MAX_KEPT_BYTES = 8 << 30


def kept_folder() -> Path:
    """Return the folder, which need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dataflow" / "index"


def load(name: str) -> memoryview | None:
    """Return a kept file, mapped; None where there is none."""
    path = kept_folder() / name
    try:
        content = map_file(path)
        os.utime(path)
    except OSError:
        return None
    return content


def map_file(path: Path) -> memoryview:
    """Return a file's content, mapped: pages are read when they are touched, and shared by all processes.

    Raises:
        OSError: As the file system fails.
    """
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return memoryview(b"")  # which cannot be mapped
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def keep(name: str, data: bytes | memoryview) -> Path | None:
    """Keep a file; return where it is, or None where that failed, which the log says."""
    folder = kept_folder()
    part = folder / f"{name}.{secrets.token_hex(4)}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(data)
            part.replace(folder / name)
        finally:
            part.unlink(missing_ok=True)
        for old in _oldest(folder):
            old.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("an index could not be kept in %s and will be made again: %s", folder, error)
        return None
    return folder / name


def _oldest(folder: Path) -> Iterator[Path]:
    """Yield what is too much, and what a killed process left half written among it; never the newest."""
    found: list[tuple[float, int, Path]] = []
    for path in folder.iterdir():
        with suppress(OSError):
            status = path.stat()
            found.append((status.st_mtime, status.st_size, path))
    size_bytes = 0
    for number, (_, size, path) in enumerate(sorted(found, reverse=True)):
        size_bytes += size
        if number and (number >= MAX_KEPT or size_bytes > MAX_KEPT_BYTES):
            yield path
