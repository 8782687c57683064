"""What folders of files look like as objects: versions, listings, and the hidden files of unfinished writes.

A writer holds a lock on its hidden file until it is published or dead, so whoever gets the lock knows that nobody will
finish the file. Locks are good on one machine only, so the name says on which boot of which machine it was made, and
only that one sweeps it. Between a file's creation and its lock a sweeper may come first: the writer then finds its file
gone and makes another.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path

from connectors.objects import ObjectMeta, split_uri

__all__ = [
    "boot_name",
    "create_partial",
    "file_version",
    "has_changed_folders",
    "is_partial",
    "list_folder",
    "sweep_partials",
    "walk_files",
]

_log = logging.getLogger(__name__)

_PARTIAL_PREFIX, _PARTIAL_SUFFIX = ".", ".dataflow-partial"
# Where a link leads to nothing, or to itself.
_NOWHERE = (errno.ENOENT, errno.ELOOP)


def file_version(status: os.stat_result) -> str:
    """Return the version token of a file."""
    return f"{status.st_ino}-{status.st_mtime_ns}-{status.st_size}"


def create_partial(folder: str) -> tuple[str, int]:
    """Create a file to be written to and then renamed; no listing shows it.

    Returns:
        Its path, and its descriptor: open for writing, locked where the file system has locks.

    Raises:
        OSError: As the system calls fail.
    """
    while True:
        path = os.path.join(folder, f"{_PARTIAL_PREFIX}{boot_name()}-{secrets.token_hex(8)}{_PARTIAL_SUFFIX}")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # a sweeper has it, and removes it
            os.close(descriptor)
            continue
        except OSError:  # no locks on this file system, so nobody sweeps there either
            return path, descriptor
        if os.fstat(descriptor).st_nlink:
            return path, descriptor
        os.close(descriptor)


def sweep_partials(folder: str | os.PathLike[str], *, recursive: bool = True) -> int:
    """Remove from `folder` what writers of this machine left when they were killed; return how many files that were.

    What somebody still writes, what another machine wrote, and what was there before the last boot stays.

    Args:
        folder: Where to look; nothing is removed from one that is missing.
        recursive: Look into the folders below it too.
    """
    swept = 0
    for parent, _, names in islice(os.walk(folder), None if recursive else 1):
        for name in names:
            if not (is_partial(name) and name.startswith(f"{_PARTIAL_PREFIX}{boot_name()}-")):
                continue
            path = os.path.join(parent, name)
            with suppress(OSError):  # in use, published or swept meanwhile, or not ours
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(path)
                    swept += 1
                finally:
                    os.close(descriptor)
    return swept


def has_changed_folders(url: str, names: Iterable[str], *, since: str) -> bool:
    """Say whether files came into or left the folders of some files after another file was put in its place.

    No folder is listed. Now and then the answer is yes without need: a clock has its steps.

    Args:
        url: What the names are relative to; where it is not `file://`, the answer is no.
        names: The files.
        since: URL of the other file; as `url`.
    """
    if not (url.startswith("file://") and since.startswith("file://")):
        return False
    root = Path("/" + split_uri(url)[1])
    parents = {Path(name) for name in set(map(os.path.dirname, names))}
    folders = {root / folder for parent in parents for folder in (parent, *parent.parents)}
    try:
        put_ns = os.stat("/" + split_uri(since)[1]).st_ctime_ns  # a rename changes no mtime
        return any(os.stat(folder).st_mtime_ns > put_ns for folder in {root, *folders})
    except OSError:  # a folder is gone, say
        return True


@cache
def boot_name() -> str:
    """Name this boot of this machine; containers share it, as they share the locks."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")
    except OSError:
        return secrets.token_hex(16)  # of nobody else: never swept


def is_partial(name: str) -> bool:
    """Say whether a file's name is one of `create_partial`."""
    return name.startswith(_PARTIAL_PREFIX) and name.endswith(_PARTIAL_SUFFIX)


def walk_files(folder: str, beginning: str = "", *, lost: list[str] | None = None) -> Iterator[ObjectMeta]:
    """Yield the files below `folder` whose name there starts with `beginning`, sorted by key.

    Symbolic links are followed; those that lead nowhere are left out.

    Args:
        folder: Path without the leading slash; where nothing is, nothing is found.
        beginning: Of the names directly in `folder`.
        lost: Receives the keys of the links that lead nowhere, but for hidden ones; without it, a warning at the end
            says how many there are.

    Raises:
        OSError: As the system calls fail, but for what is missing.
    """
    links: list[str] = [] if lost is None else lost
    for key, entry in _entries(folder, beginning, frozenset()):
        status = _status(entry)
        if status is None:
            links += [key] if _is_visible_link(_below(folder, key), entry) else []
        elif stat.S_ISREG(status.st_mode):
            yield ObjectMeta(key, status.st_size, file_version(status))
    if links and lost is None:
        _log.warning("%d symbolic links lead nowhere and are not listed, such as /%s", len(links), links[0])


def list_folder(folder: str, *, lost: list[str] | None = None) -> list[ObjectMeta]:
    """Return what `walk_files` finds, in one walk; keys, also those in `lost`, are relative to the folder.

    Raises:
        OSError: As `walk_files`.
    """
    links: list[str] | None = None if lost is None else []
    found = [replace(meta, key=_below(folder, meta.key)) for meta in walk_files(folder, lost=links)]
    if lost is not None:
        lost += [_below(folder, key) for key in links or ()]
    return found


def _entries(
    folder: str, beginning: str, ancestors: frozenset[tuple[int, int]]
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield key and entry of all that is no folder, as `walk_files` goes through it.

    Args:
        folder: As there.
        beginning: As there.
        ancestors: Device and inode of the folders on the way, so that a circle of links ends.
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
                (entry.name + "/" * _is_folder(entry), entry)
                for entry in entries
                if entry.name.startswith(beginning) and not is_partial(entry.name)
            )
    except (FileNotFoundError, NotADirectoryError):
        return
    for name, entry in found:
        key = f"{folder}/{entry.name}" if folder else entry.name
        if name.endswith("/"):
            yield from _entries(key, "", ancestors | {identity})
        else:
            yield key, entry


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """Return None for a link that leads nowhere, and for what is gone since."""
    try:
        return entry.stat()
    except OSError as error:
        if error.errno in _NOWHERE:
            return None
        raise


def _is_visible_link(name: str, entry: os.DirEntry[str]) -> bool:
    """Hidden ones are no data: editors lock a file by a link that leads nowhere."""
    return entry.is_symlink() and "/." not in f"/{name}"


def _below(folder: str, key: str) -> str:
    return key.removeprefix(f"{folder}/")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno in _NOWHERE:
            return False
        raise
