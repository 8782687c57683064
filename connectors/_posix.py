"""Files as objects: `file://`.

A version is `inode-mtime_ns-size`, taken with fstat from the descriptor that is read, before and after the read: a
file that is written in place meanwhile is a `ChangedError`, and one that is replaced meanwhile gives the old bytes
whole.

A put writes a hidden file next to its target, syncs it, renames it over the target and syncs the directory. Killed
before the rename it leaves the old content and a hidden file that no listing shows; killed after it, the new content.

Directories exist to hold files: a put makes them, a delete leaves them, no listing shows them. Symbolic links are
followed; a put or delete replaces or removes the link, not what it names.
"""

from __future__ import annotations

import asyncio
import builtins
import errno
import itertools
import os
import stat
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from connectors._threads import BlockingPool, read_limit_s
from connectors.errors import (
    BadInputError,
    ChangedError,
    DataError,
    ErrorKind,
    NotFoundError,
    PermissionDeniedError,
    TransientError,
)
from connectors.filesystems import mount_of, mount_points
from connectors.folders import create_partial, file_version, is_partial, walk_files
from connectors.objects import ObjectMeta, Span, check_key, check_prefix, join_uri
from connectors.protocols import Buffer

__all__ = ["NO_SPACE", "PosixStore"]

R = TypeVar("R")

_COPY_BYTES = 4 << 20
# What a stream hands to a thread at once: going there and back costs as much as writing 100 KB.
_GROUP_BYTES = 4 << 20
_GROUP_CHUNKS = 256
_PAGE_FILES = 1000

_NOT_FOUND = frozenset({errno.ENOENT, errno.ENOTDIR})
_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_BAD_INPUT = frozenset({errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENXIO})


class PosixStore:
    """Files below the root directory; keys are their paths without the leading slash.

    Args:
        url: `file:///`.
        threads: Calls that run at once on each mounted file system; more wait. One that hangs holds its own, unless it
            is reached by a symbolic link from another.
    """

    def __init__(self, url: str = "file:///", *, threads: int = 16) -> None:
        if threads < 1:
            raise BadInputError(f"threads must be >= 1, got {threads}")
        self.url = url
        self._threads = threads
        self._mounts: frozenset[str] | None = None
        self._pools: dict[str, BlockingPool] = {}

    async def get(self, key: str, *, version: str | None = None) -> Buffer:
        """Return the whole file."""
        return (await self._run(key, _read, key, None, version))[0]

    async def get_range(self, key: str, span: Span, *, version: str | None = None) -> Buffer:
        """Return exactly the bytes of the span."""
        return (await self._run(key, _read, key, (span,), version, limit_s=read_limit_s(span.length)))[0]

    async def get_ranges(self, key: str, spans: Sequence[Span], *, version: str | None = None) -> builtins.list[Buffer]:
        """Return one buffer per span, all from one open of the file."""
        if not spans:
            return []
        limit_s = read_limit_s(sum(span.length for span in spans))
        return await self._run(key, _read, key, tuple(spans), version, limit_s=limit_s)

    async def head(self, key: str) -> ObjectMeta:
        """Return size and version."""
        return await self._run(key, _head, key, limit_s=read_limit_s(0))

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectMeta]:
        """Yield the regular files whose key begins with `prefix`, sorted by key."""
        folder, name = check_prefix(prefix)
        files = walk_files(folder, name)
        while page := await self._run(folder, _list_page, files):
            for meta in page:
                yield meta

    async def put(self, key: str, data: Buffer) -> ObjectMeta:
        """Replace the file atomically and durably."""
        return await self._run(key, _put, key, data)

    async def put_stream(self, key: str, chunks: AsyncIterable[Buffer]) -> ObjectMeta:
        """Write the chunks to a hidden file and publish it when the last is in."""
        partial = _Partial(key)
        try:
            await self._run(key, partial.begin)
            group, size_bytes = [], 0
            async for chunk in chunks:
                group.append(chunk)
                size_bytes += len(chunk)
                if size_bytes >= _GROUP_BYTES or len(group) == _GROUP_CHUNKS:
                    await self._run(key, partial.write, group)
                    group, size_bytes = [], 0
            await self._run(key, partial.write, group)
            return await self._run(key, partial.publish)
        except BaseException as error:
            try:
                # Shielded: a second cancellation must not leave the hidden file behind.
                await asyncio.shield(self._run(key, partial.discard, limit_s=read_limit_s(0)))
            except DataError as refusal:
                error.add_note(partial.left_behind(refusal))
                (await self._pool(key)).later(partial.discard)
            raise

    async def delete(self, key: str) -> None:
        """Remove the file."""
        await self._run(key, _delete, key)

    async def copy(self, source: str, target: str) -> ObjectMeta:
        """Copy the file; the target is replaced atomically."""
        return await self._run(source, _copy, source, target)

    async def close(self) -> None:
        """Let the threads end; closing twice is harmless, and a later call starts them again."""
        for pool in self._pools.values():
            pool.close()

    async def _run(self, key: str, function: Callable[..., R], *args: Any, limit_s: float | None = None) -> R:
        pool = await self._pool(key)
        try:
            return await pool.run(_uri(key), limit_s, function, *args)
        except DataError:
            raise
        except OSError as error:
            raise _translated(error, _uri(key)) from error

    async def _pool(self, key: str) -> BlockingPool:
        if self._mounts is None:  # reading them blocks too
            self._mounts = await self._pool_at("/").run(self.url, None, mount_points)
        return self._pool_at(mount_of("/" + key, self._mounts))

    def _pool_at(self, mount: str) -> BlockingPool:
        pool = self._pools.get(mount)
        if pool is None:
            pool = self._pools[mount] = BlockingPool(self._threads)
        return pool


def _uri(key: str) -> str:
    return join_uri("file:///", key)


def _path(key: str) -> str:
    check_key(key)
    if is_partial(key.rpartition("/")[2]):
        raise BadInputError(f"{_uri(key)} has the name of an unfinished write; choose another", uri=_uri(key))
    return "/" + key


def _translated(error: OSError, uri: str) -> DataError:
    reason = error.strerror or str(error)
    code = error.errno
    if code in _NOT_FOUND:
        return NotFoundError(f"no file at {uri}", uri=uri)
    if code in _DENIED:
        return PermissionDeniedError(f"{uri}: {reason}; check the modes of the file and of its folders", uri=uri)
    if code in NO_SPACE:
        return DataError(f"{uri}: {reason}; make room or write elsewhere", kind=ErrorKind.NO_SPACE, uri=uri)
    if code in _BAD_INPUT:
        return BadInputError(f"{uri}: {reason}", uri=uri)
    return TransientError(f"{uri}: {reason}", uri=uri)


def _open(key: str) -> tuple[int, os.stat_result]:
    """Open a regular file for reading; the caller closes it."""
    # O_NONBLOCK: opening a named pipe must not wait for its writer.
    descriptor = os.open(_path(key), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        _check_regular(key, status)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, status


def _check_regular(key: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise NotFoundError(f"no file at {_uri(key)}: it is {what}", uri=_uri(key))


def _changed(key: str) -> ChangedError:
    return ChangedError(f"{_uri(key)} was changed since it was opened; open the dataset again", uri=_uri(key))


def _meta(key: str, status: os.stat_result) -> ObjectMeta:
    return ObjectMeta(key, status.st_size, file_version(status))


def _head(key: str) -> ObjectMeta:
    status = os.stat(_path(key))
    _check_regular(key, status)
    return _meta(key, status)


def _read(key: str, spans: Sequence[Span] | None, version: str | None) -> list[Buffer]:
    descriptor, status = _open(key)
    try:
        found = file_version(status)
        if version is not None and found != version:
            raise _changed(key)
        if spans is None:
            spans = (Span(0, status.st_size),)
        for span in spans:
            if span.end > status.st_size:
                raise BadInputError(
                    f"bytes {span.offset} to {span.end} of {_uri(key)} reach past its end at {status.st_size}",
                    kind=ErrorKind.BAD_RANGE,
                    uri=_uri(key),
                )
        if len(spans) > 1:
            # The kernel fetches all of them at once: twice the speed of one after the other on a cold NVMe disk.
            for span in spans:
                os.posix_fadvise(descriptor, span.offset, span.length, os.POSIX_FADV_WILLNEED)
        buffers = [_read_span(descriptor, span) for span in spans]
        if file_version(os.fstat(descriptor)) != found:
            raise _changed(key)
    finally:
        os.close(descriptor)
    if any(len(buffer) != span.length for buffer, span in zip(buffers, spans, strict=True)):
        raise TransientError(f"{_uri(key)} gave fewer bytes than its size", kind=ErrorKind.SHORT_BODY, uri=_uri(key))
    return buffers


def _read_span(descriptor: int, span: Span) -> Buffer:
    data = os.pread(descriptor, span.length, span.offset)
    if len(data) == span.length:
        return data
    # One call gives 2 GiB at most, and a network file system may give less.
    pieces = [data]
    offset = span.offset + len(data)
    while offset < span.end and pieces[-1]:
        pieces.append(os.pread(descriptor, span.end - offset, offset))
        offset += len(pieces[-1])
    return b"".join(pieces)


def _list_page(files: Iterator[ObjectMeta]) -> list[ObjectMeta]:
    return list(itertools.islice(files, _PAGE_FILES))


def _put(key: str, data: Buffer) -> ObjectMeta:
    return _put_all(key, (data,))


def _put_all(key: str, chunks: Iterable[Buffer]) -> ObjectMeta:
    partial = _Partial(key)
    try:
        partial.begin()
        for chunk in chunks:
            partial.write([chunk])
        return partial.publish()
    except BaseException as error:
        try:
            partial.discard()
        except OSError as refusal:
            error.add_note(partial.left_behind(refusal))
        raise


def _copy(source: str, target: str) -> ObjectMeta:
    descriptor, status = _open(source)

    def chunks() -> Iterator[Buffer]:
        while chunk := os.read(descriptor, _COPY_BYTES):
            yield chunk
        if file_version(os.fstat(descriptor)) != file_version(status):
            raise _changed(source)

    try:
        return _put_all(target, chunks())
    finally:
        os.close(descriptor)


def _delete(key: str) -> None:
    try:
        Path(_path(key)).unlink()
    except IsADirectoryError:
        raise NotFoundError(f"no file at {_uri(key)}: it is a folder", uri=_uri(key)) from None


class _Partial:
    """A hidden file on its way to become the object `key`.

    Each call may come from another thread. The lock makes `discard` wait for a write that a cancelled task left
    running, so that the descriptor is never closed, and given to another file, under a write.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        self._target = _path(key)
        self._folder = os.path.dirname(self._target)
        self._name = ""
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._ended = False

    def begin(self) -> None:
        """Make the folders and the hidden file."""
        with self._lock:
            if self._ended:
                return
            _make_folder(self._folder)
            self._name, self._descriptor = create_partial(self._folder)

    def write(self, chunks: Iterable[Buffer]) -> None:
        """Append all of the chunks."""
        with self._lock:
            if self._descriptor is None:
                return  # discarded before this write had its turn
            for chunk in chunks:
                view = memoryview(chunk).cast("B")
                while view:
                    view = view[os.write(self._descriptor, view) :]

    def publish(self) -> ObjectMeta:
        """Make the content durable, then visible under its name, then that durable."""
        with self._lock:
            if self._descriptor is None:
                raise DataError(f"the write of {_uri(self._key)} was discarded before it was published")
            os.fsync(self._descriptor)
            status = os.fstat(self._descriptor)
            Path(self._name).replace(self._target)
            self._ended = True
            os.close(self._descriptor)
            self._descriptor = None
            _sync_folder(self._folder)
            return _meta(self._key, status)

    def discard(self) -> None:
        """Remove the hidden file, unless it was published.

        Raises:
            OSError: It could not be removed.
        """
        with self._lock:
            if self._ended:
                return
            self._ended = True
            if self._descriptor is not None:
                descriptor, self._descriptor = self._descriptor, None
                try:
                    os.close(descriptor)
                finally:
                    Path(self._name).unlink(missing_ok=True)

    def left_behind(self, reason: Exception) -> str:
        """Say what may still lie there, because `discard` failed or did not have its turn."""
        what = self._name or f"a hidden file in {self._folder}"
        return f"{what} may be left behind, because it could not be removed: {reason}"


def _make_folder(path: str) -> None:
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for folder in reversed(missing):
        try:
            Path(folder).mkdir()
        except FileExistsError:
            if not os.path.isdir(folder):
                raise BadInputError(f"{folder} is a file, so nothing can be written below it") from None
        except FileNotFoundError:  # below one that is there: of /proc, say
            raise NotFoundError(f"cannot make the folder {folder}: its parent accepts no new folders") from None
        _sync_folder(os.path.dirname(folder))


def _sync_folder(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot sync folders
            raise
    finally:
        os.close(descriptor)
