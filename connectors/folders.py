"""What folders of files look like as objects: versions, listings, and the hidden names of unfinished writes."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator

from connectors.objects import ObjectMeta

__all__ = ["file_version", "is_partial", "partial_name", "walk_files"]

_PARTIAL_PREFIX, _PARTIAL_SUFFIX = ".", ".dataflow-partial"


def file_version(status: os.stat_result) -> str:
    """Return the version token of a file."""
    return f"{status.st_ino}-{status.st_mtime_ns}-{status.st_size}"


def partial_name() -> str:
    """Return a new name for a file that is being written; no listing shows it."""
    return f"{_PARTIAL_PREFIX}{secrets.token_hex(8)}{_PARTIAL_SUFFIX}"


def is_partial(name: str) -> bool:
    """Say whether a file's name is one of `partial_name`."""
    return name.startswith(_PARTIAL_PREFIX) and name.endswith(_PARTIAL_SUFFIX)


def walk_files(
    folder: str, beginning: str = "", *, ancestors: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[ObjectMeta]:
    """Yield the files below `folder` whose name there starts with `beginning`, sorted by key.

    Args:
        folder: Path without the leading slash; where nothing is, nothing is found.
        beginning: Of the names directly in `folder`.
        ancestors: Device and inode of the folders on the way, so that a circle of links ends.

    Raises:
        OSError: As the system calls fail, but for what is missing.
    """
    path = "/" + folder
    try:
        status = os.stat(path)
        identity = (status.st_dev, status.st_ino)
        if identity in ancestors:  # a symbolic link that leads back up
            return
        with os.scandir(path) as entries:
            # A folder's name is compared with the slash behind it, which sorts whole keys.
            found = sorted(
                (entry.name + "/" * entry.is_dir(), entry)
                for entry in entries
                if entry.name.startswith(beginning) and not is_partial(entry.name)
            )
    except (FileNotFoundError, NotADirectoryError):
        return
    for name, entry in found:
        key = f"{folder}/{entry.name}" if folder else entry.name
        if name.endswith("/"):
            yield from walk_files(key, "", ancestors=ancestors | {identity})
            continue
        try:
            status = entry.stat()
        except FileNotFoundError:  # gone since, or a link to nothing
            continue
        if stat.S_ISREG(status.st_mode):
            yield ObjectMeta(key, status.st_size, file_version(status))
