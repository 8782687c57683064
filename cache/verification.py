"""Reads every block of a cache's directory against its checksums, beside the server that may be running on it.

Published block files never change and are only ever unlinked, so reading them needs no lock. Removing a bad one is what
a server does itself when a reader meets it: the next reader finds nothing there and has it fetched again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cache.block import FORMAT_VERSION, block_path, parse_name, trailer_bytes, verify
from connectors.errors import BadInputError, CorruptError

__all__ = ["Verified", "verify_directory"]


@dataclass(frozen=True, slots=True)
class Verified:
    """What has been found so far.

    Attributes:
        folders: Folders that were read, of `num_folders`.
        num_folders: Folders in all.
        blocks: Blocks that were read.
        size_bytes: Their bytes.
        bad: Path of each block that does not match its checksums or cannot be read.
        foreign: Files that are no blocks.
    """

    folders: int
    num_folders: int
    blocks: int = 0
    size_bytes: int = 0
    bad: tuple[str, ...] = ()
    foreign: int = 0


def verify_directory(path: str | os.PathLike[str], *, remove: bool = False) -> Iterator[Verified]:
    """Read every block below a tier's `path`; yields after each of its folders.

    Args:
        path: As in the tier's configuration.
        remove: Unlink the bad blocks.

    Raises:
        BadInputError: It is no directory of a cache.
    """
    root = Path(path) / f"blocks-{FORMAT_VERSION}"
    if not root.is_dir():
        raise BadInputError(f"{os.fspath(path)} is no directory of a cache: it has no {root.name}")
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir())
    found = Verified(0, len(folders))
    yield found
    for folder in folders:
        for file in sorted(folder.iterdir()):
            found = _verify_file(file, found, remove=remove)
        found = replace(found, folders=found.folders + 1)
        yield found


def _verify_file(file: Path, found: Verified, *, remove: bool) -> Verified:
    name = parse_name(file.name)
    if name is None or block_path(*name) != f"{file.parent.name}/{file.name}":
        return replace(found, foreign=found.foreign + 1)
    key, length = name
    try:
        content = memoryview(file.read_bytes())
        verify(key, content[:length], content[length:])
    except FileNotFoundError:  # evicted meanwhile
        return found
    except (OSError, CorruptError):
        if remove:
            with contextlib.suppress(FileNotFoundError):
                file.unlink()
        return replace(found, blocks=found.blocks + 1, bad=(*found.bad, str(file)))
    size_bytes = found.size_bytes + length + trailer_bytes(length)
    return replace(found, blocks=found.blocks + 1, size_bytes=size_bytes)
