"""Blocks as files of one directory, owned by one server at a time; they survive it.

    <path>/lock          flock held by the server, its process id inside
    <path>/journal-1     what the names cannot say (`cache.journal`), by its own format version
    <path>/tmp/          files being written; all of them are swept when the next server opens the directory
    <path>/blocks-1/xx/  published block files (`cache.block`), by format version

A block's label goes into the journal; then the block is written under `tmp/` and renamed: a name under `blocks-1/` was
complete when it appeared, whoever was killed between any two lines. It is removed by unlink and never truncated, so an
open or mapped file stays whole for its holder. Nothing is fsynced: a cache that loses its last seconds in a power
failure only fetches them again, and a file that the failure left torn under its final name does not verify, which is a
miss. Files that are not ours are left alone.

Whoever deletes the directory, or mounts another file system over it, takes the lock along: then the name `lock` is no
longer the file that is held, which each write and each probe look at. Nothing more is written, and a directory that is
there again is locked by the rules of a start. A kill at any point of that leaves what one at a start leaves: empty
folders, a lock that nobody holds. Between the look of a write and its rename the directory can still be replaced;
what comes into the new one is then one whole block under its own name, which the next scan finds.

A directory that was away and is back, as when its disk is mounted again, still has the lock that is held. It counts as
another one all the same: blocks that were looked for meanwhile are thought to be gone, and are there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cache.block import FORMAT_VERSION, block_path, encode_trailer, file_bytes, parse_name, verify
from cache.config import Medium
from cache.handle import Block, Descriptor, seal_block
from cache.journal import Journal, LabelRecord, PinRecord
from cache.labels import Label
from cache.pins import PinSet
from connectors.errors import BadInputError, CorruptError, DataError
from connectors.protocols import Buffer

__all__ = ["DirectoryShelf", "LeftBehindError"]

_log = logging.getLogger(__name__)

_PAGE_BYTES = 4096
"""The unit in which file systems give space."""

_MAX_NAMED = 5

# Below it, making the file costs far more than copying its bytes.
_MIN_DIRECT_BYTES = 256 * 1024


class LeftBehindError(OSError):
    """A write failed and so did the removal of its temporary file: the space stays taken."""


class DirectoryShelf:
    """See `cache.shelf.Shelf`.

    Args:
        path: The directory; made if missing. Opened by `lock`.
        medium: What the directory lies on. Files of a disk are read ahead when they are opened; large blocks go to an
            `nvme` past the page cache.
        system: The module of system calls; tests give one that fails or dies.
        label_of: What is known of a block; called in threads.

    Attributes:
        journal: Keeps the labels.
        changes: How often another directory was found at the path, and locked, or the same after it had been away.
    """

    def __init__(
        self,
        path: str,
        *,
        medium: Medium,
        system: Any,
        label_of: Callable[[bytes], Label | None] = lambda _key: None,
    ) -> None:
        self.path = path
        self._blocks = os.path.join(path, f"blocks-{FORMAT_VERSION}")
        self._temporary = os.path.join(path, "tmp")
        self._read_ahead = medium != "ram"
        self._direct = medium == "nvme"
        self._system = system
        self._label_of = label_of
        self.journal = Journal(os.path.join(path, "journal-1"), self._temporary, system=system)
        self.changes = 0
        self._lock_path = os.path.join(path, "lock")
        self._lock: Descriptor | None = None
        # Seen by whoever looked at the lock since the last `renew`.
        self._was_away = False
        self._was_mount = False

    def lock(self) -> None:
        """Become the directory's only server and sweep what a killed one was writing; once is enough.

        Raises:
            BadInputError: Another process serves the directory; it is named.
            OSError: The directory cannot be made or written.
        """
        if self._lock is None:
            self._lock = self._take_lock()

    def renew(self) -> None:
        """Lock the directory where that was not possible yet, or where it is another one by now.

        One that somebody has removed is not made again here, as it is at a start, and where a disk was mounted the
        folder below it is not taken; errors as `lock`.
        """
        if self._lock is None:
            self.lock()
            return
        try:
            self._check_lock()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            os.stat(self.path)
            if self._was_mount and not os.path.ismount(self.path):
                raise OSError(errno.ENODEV, "no disk is mounted", self.path) from error
            self._lock = self._take_lock()
        if self._was_away:
            self._was_away = False
            self.changes += 1

    def _check_lock(self) -> None:
        lock = self._lock
        try:
            ours = lock is not None and os.path.samestat(os.stat(self._lock_path), os.fstat(lock.fd))
        except FileNotFoundError:
            ours = False
        if not ours:
            self._was_away = True
            raise OSError(errno.ESTALE, "no longer the directory that this server has locked", self.path)

    def _take_lock(self) -> Descriptor:
        for folder in (self._blocks, self._temporary):
            Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = Descriptor(os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        try:
            fcntl.flock(lock.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock.fd, 32, 0).decode(errors="replace").strip() or "unknown"
            raise BadInputError(
                f"the cache directory {self.path} is in use by process {holder}; "
                "connect to that server, stop it, or give this one another directory"
            ) from None
        self._was_mount = os.path.ismount(self.path)
        os.ftruncate(lock.fd, 0)
        os.pwrite(lock.fd, f"{os.getpid()}\n".encode(), 0)
        with os.scandir(self._temporary) as left:
            for entry in left:
                if not entry.is_dir(follow_symlinks=False):
                    Path(entry.path).unlink()
        ours = {"journal-1", "lock", "tmp", os.path.basename(self._blocks)}
        foreign = sorted(set(os.listdir(self.path)) - ours)
        if foreign:
            _log.warning(
                "%s holds %d entries that are not of this cache or this version and are left alone: %s%s",
                self.path,
                len(foreign),
                ", ".join(foreign[:_MAX_NAMED]),
                " ..." if len(foreign) > _MAX_NAMED else "",
            )
        return lock

    @property
    def locked(self) -> bool:
        """Whether the directory is ours."""
        return self._lock is not None

    def probe(self) -> tuple[bool, bool, str | None]:
        """Try the disk, on the lock; return whether it reads, whether it writes, and why not.

        First `renew`; a directory that cannot be locked neither reads nor writes.
        """
        try:
            self.renew()
        except (OSError, DataError) as error:
            return False, False, str(error)
        assert self._lock is not None
        readable = False
        try:
            # What the page cache holds would say nothing about the disk.
            self._system.posix_fadvise(self._lock.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            self._system.preadv(self._lock.fd, [bytearray(_PAGE_BYTES)], 0)
            readable = True
            self._system.pwrite(self._lock.fd, f"{os.getpid()}\n".encode(), 0)
            self._system.fsync(self._lock.fd)
        except OSError as error:
            return readable, False, str(error)
        return True, True, None

    def keep_pins(self, pins: PinSet) -> None:
        """Write all pins down."""
        self._check_lock()
        self.journal.append(PinRecord(pins))

    def folders(self) -> list[str]:
        """Return the folders that hold blocks, each for `scan`."""
        with os.scandir(self._blocks) as entries:
            return sorted(entry.path for entry in entries if entry.is_dir(follow_symlinks=False))

    def scan(self, folder: str) -> tuple[list[tuple[bytes, int]], int]:
        """Return key and length of each block in the folder, from names alone, and the number of other files."""
        with os.scandir(folder) as entries:
            names = [parse_name(entry.name) for entry in entries]
        blocks = [name for name in names if name is not None]
        return blocks, len(names) - len(blocks)

    def cost_bytes(self, length: int) -> int:
        """Data and trailer, rounded up to 4 KiB."""
        return -(-file_bytes(length) // _PAGE_BYTES) * _PAGE_BYTES

    def write(self, block: Block) -> None:
        """Write its label, then the block under `tmp/`, then rename it into place."""
        self._check_lock()
        label = self._label_of(block.key)
        if label is not None:
            self.journal.append(LabelRecord(label.uri, label.job, label.born_s, block.key))
        temporary = os.path.join(self._temporary, block.key.hex())
        try:
            self._fill(temporary, block)
            self._publish(temporary, self._file(block.key, block.length))
        except OSError as error:
            try:
                self._unlink(temporary)
            except OSError as also:
                raise LeftBehindError(error.errno, f"{error.strerror}; then unlink: {also.strerror}") from error
            raise

    def _fill(self, path: str, block: Block) -> None:
        fd = self._create(path)
        try:
            # A full disk says so here, before anything is copied.
            self._system.posix_fallocate(fd, 0, file_bytes(block.length))
            data = block.map()
            direct = self._direct and block.length >= _MIN_DIRECT_BYTES
            written = self._write_direct(fd, data) if direct else 0
            self._write_all(fd, data[written:])
            self._write_all(fd, encode_trailer(block.key, data))
        finally:
            self._system.close(fd)

    def _create(self, path: str) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            return int(self._system.open(path, flags, 0o600))
        except FileNotFoundError:
            self._make_folder(self._temporary)
            return int(self._system.open(path, flags, 0o600))

    def _make_folder(self, path: str) -> None:
        """Make a folder that was not needed yet, or that somebody has tidied away. Never the directory itself."""
        with contextlib.suppress(FileExistsError):
            self._system.mkdir(path, 0o700)

    def _write_direct(self, fd: int, data: memoryview) -> int:
        """Write whole pages past the page cache, while the file system likes that; return the bytes written so.

        Copied through the page cache they take two to four times the CPU, and as much memory as the readers could use.
        """
        end, written = len(data) // _PAGE_BYTES * _PAGE_BYTES, 0
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT)
            while written < end:
                written += self._system.write(fd, data[written:end])
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        fcntl.fcntl(fd, fcntl.F_SETFL, 0)
        return written

    def _write_all(self, fd: int, data: Buffer) -> None:
        with memoryview(data) as view:
            written = 0
            while written < len(view):
                written += self._system.write(fd, view[written:])

    def _publish(self, temporary: str, path: str) -> None:
        try:
            self._system.rename(temporary, path)
        except FileNotFoundError:
            self._make_folder(self._blocks)
            self._make_folder(os.path.dirname(path))
            self._system.rename(temporary, path)

    def open(self, key: bytes, length: int) -> Descriptor:
        """Open by name; a file of the wrong size is `CorruptError`."""
        path = self._file(key, length)
        try:
            file = Descriptor(self._system.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC))
        except FileNotFoundError:
            self._check_lock()
            raise
        if self._system.fstat(file.fd).st_size != file_bytes(length):
            raise CorruptError(f"{path} is shorter or longer than its block")
        if self._read_ahead:
            self._system.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_WILLNEED)
        return file

    def read(self, key: bytes, length: int) -> Block:
        """Read and check data and trailer."""
        file = self.open(key, length)
        content = memoryview(bytearray(file_bytes(length)))
        filled = 0
        # One call gives at most 2 GiB; a file that ends early leaves zeros, which do not verify.
        while got := self._system.preadv(file.fd, [content[filled:]], filled) if filled < len(content) else 0:
            filled += got
        verify(key, content[:length], content[length:])
        return seal_block(key, content[:length])

    def remove(self, key: bytes, length: int) -> None:
        """Unlink; the space is free when the last reader has closed the file."""
        self._unlink(self._file(key, length))

    def close(self) -> None:
        """Release the directory for the next server."""
        self._lock = None

    def _unlink(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._system.unlink(path)

    def _file(self, key: bytes, length: int) -> str:
        return os.path.join(self._blocks, block_path(key, length))
