"""Any other file system that fsspec knows and whose package is installed: `sftp://`, `hf://`, `hdfs://` ...

fsspec has no conditional read, so the version is looked at before and after the bytes are read; that narrows the gap in
which a change goes unseen, and does not close it. A put goes to a hidden name first where the file system can rename,
and straight to its name where it cannot, as those are object stores.
"""

from __future__ import annotations

import builtins
import hashlib
import secrets
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from datetime import datetime
from tempfile import NamedTemporaryFile, gettempdir
from typing import Any, TypeVar

from connectors._posix import NO_SPACE
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
from connectors.objects import ObjectMeta, Span, check_key, check_prefix, join_uri
from connectors.protocols import Buffer

__all__ = ["FsspecStore", "knows_scheme", "open_fsspec"]

R = TypeVar("R")

_THREADS = 8
_READ_ATTEMPTS = 10  # of a file that is replaced while it is read, when no version is asked for
_PARTIAL_PREFIX = ".dataflow-partial-"
_VERSION_FIELDS = ("ETag", "etag", "md5Hash", "checksum", "mtime", "LastModified", "last_modified", "created")


def knows_scheme(scheme: str) -> bool:
    """Return whether fsspec is installed and has a file system for the scheme."""
    try:
        import fsspec
    except ImportError:
        return False
    return scheme in fsspec.available_protocols()


def open_fsspec(url: str, **options: Any) -> FsspecStore:
    """Open what fsspec finds behind a URL; `options` go to its file system."""
    from fsspec.core import url_to_fs

    try:
        filesystem, root = url_to_fs(url, use_listings_cache=False, skip_instance_cache=True, **options)
    except ImportError as error:
        raise BadInputError(f"cannot open {url}: {error}") from None
    except Exception as error:  # noqa: BLE001  whatever a foreign file system raises
        failure = _translated(error, url)
    else:
        return FsspecStore(url, filesystem, root)
    try:
        raise failure
    finally:
        del failure  # it holds this frame, and with it what all callers hold


class FsspecStore:
    """A file system of fsspec; keys are paths below `root`.

    Args:
        url: The root in errors.
        filesystem: An `fsspec.AbstractFileSystem`, best without a cache of listings.
        root: The folder in it that keys are relative to.
    """

    def __init__(self, url: str, filesystem: Any, root: str) -> None:
        from fsspec import AbstractFileSystem

        self.url = url
        self._filesystem = filesystem
        self._root = root.rstrip("/")
        # fsspec's own default moves by copying, which is no way to publish.
        self._renames = type(filesystem).mv is not AbstractFileSystem.mv
        self._pool = BlockingPool(_THREADS)

    async def get(self, key: str, *, version: str | None = None) -> Buffer:
        """Return the whole file."""
        return (await self._run(key, self._read, key, None, version))[0]

    async def get_range(self, key: str, span: Span, *, version: str | None = None) -> Buffer:
        """Return exactly the bytes of the span."""
        return (await self._run(key, self._read, key, (span,), version, limit_s=read_limit_s(span.length)))[0]

    async def get_ranges(self, key: str, spans: Sequence[Span], *, version: str | None = None) -> builtins.list[Buffer]:
        """Return one buffer per span; the file system merges near ones as it sees fit."""
        if not spans:
            return []
        limit_s = read_limit_s(sum(span.length for span in spans))
        return await self._run(key, self._read, key, tuple(spans), version, limit_s=limit_s)

    async def head(self, key: str) -> ObjectMeta:
        """Return size and version."""
        return await self._run(key, self._head, key, limit_s=read_limit_s(0))

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectMeta]:
        """Yield the files whose key begins with `prefix`, sorted by key; all of them are held in memory first."""
        for meta in await self._run(check_prefix(prefix)[0], self._find, prefix):
            yield meta

    async def put(self, key: str, data: Buffer) -> ObjectMeta:
        """Replace the file, atomically where the file system can rename or stores objects."""
        return await self._run(key, self._publish, key, lambda path: self._filesystem.pipe_file(path, bytes(data)))

    async def put_stream(self, key: str, chunks: AsyncIterable[Buffer]) -> ObjectMeta:
        """Collect the chunks in a local temporary file, then put it."""
        check_key(key)
        uri = join_uri(self.url, key)
        collected = await self._run(key, _locally, uri, lambda: NamedTemporaryFile(prefix="dataflow-"))  # noqa: SIM115
        try:
            async for chunk in chunks:
                await self._run(key, _locally, uri, collected.write, chunk)
            await self._run(key, _locally, uri, collected.flush)
            upload = self._filesystem.put_file
            return await self._run(key, self._publish, key, lambda path: upload(collected.name, path))
        finally:
            # Not waited for: what becomes of it must not hide what became of the object.
            self._pool.later(collected.close)

    async def delete(self, key: str) -> None:
        """Remove the file."""
        await self._run(key, self._delete, key)

    async def copy(self, source: str, target: str) -> ObjectMeta:
        """Copy the file by the file system's own means."""
        from_path = self._path(source)
        copy = self._filesystem.cp_file
        return await self._run(source, self._publish, target, lambda path: copy(from_path, path))

    async def close(self) -> None:
        """Let the threads end."""
        self._pool.close()

    async def _run(self, key: str, function: Callable[..., R], *args: Any, limit_s: float | None = None) -> R:
        try:
            return await self._pool.run(join_uri(self.url, key), limit_s, function, *args)
        except DataError:
            raise
        except Exception as error:  # noqa: BLE001  whatever a foreign file system raises
            failure = _translated(error, join_uri(self.url, key))
            for note in getattr(error, "__notes__", ()):
                failure.add_note(note)
        try:
            raise failure
        finally:
            del failure  # it holds this frame, and with it what all callers hold

    def _path(self, key: str) -> str:
        check_key(key)
        return f"{self._root}/{key}"

    def _head(self, key: str) -> ObjectMeta:
        path = self._path(key)
        self._filesystem.invalidate_cache(path)
        info = self._filesystem.info(path)
        if info["type"] != "file":
            raise FileNotFoundError(path)
        return _meta(key, info)

    def _read(self, key: str, spans: Sequence[Span] | None, version: str | None) -> builtins.list[Buffer]:
        uri = join_uri(self.url, key)
        for _ in range(_READ_ATTEMPTS):
            meta = self._head(key)
            if version is not None and meta.version != version:
                break
            wanted = (Span(0, meta.size_bytes),) if spans is None else spans
            buffers = self._read_once(key, wanted, meta)
            if self._head(key).version != meta.version:
                continue
            if any(len(buffer) != span.length for buffer, span in zip(buffers, wanted, strict=True)):
                raise TransientError(f"the store gave too few bytes of {uri}", kind=ErrorKind.SHORT_BODY, uri=uri)
            return buffers
        raise ChangedError(f"{uri} was changed since it was opened; open the dataset again", uri=uri)

    def _read_once(self, key: str, spans: Sequence[Span], meta: ObjectMeta) -> builtins.list[Buffer]:
        for span in spans:
            if span.end > meta.size_bytes:
                uri = join_uri(self.url, key)
                message = f"bytes {span.offset} to {span.end} of {uri} reach past its end at {meta.size_bytes}"
                raise BadInputError(message, kind=ErrorKind.BAD_RANGE, uri=uri)
        buffers: builtins.list[Buffer] = [b""] * len(spans)
        wanted = [position for position, span in enumerate(spans) if span.length]
        found = self._filesystem.cat_ranges(
            [self._path(key)] * len(wanted),
            [spans[position].offset for position in wanted],
            [spans[position].end for position in wanted],
            on_error="raise",
        )
        for position, buffer in zip(wanted, found, strict=True):
            buffers[position] = buffer
        return buffers

    def _find(self, prefix: str) -> builtins.list[ObjectMeta]:
        folder, _ = check_prefix(prefix)
        self._filesystem.invalidate_cache()
        infos = self._filesystem.find(f"{self._root}/{folder}".rstrip("/") or "/", detail=True)
        base = self._root.lstrip("/") + "/" if self._root.lstrip("/") else ""
        found = ((path.lstrip("/").removeprefix(base), info) for path, info in infos.items())
        return [
            _meta(key, info)
            for key, info in sorted(found, key=lambda pair: pair[0])
            if key.startswith(prefix) and not key.rpartition("/")[2].startswith(_PARTIAL_PREFIX)
        ]

    def _publish(self, key: str, write: Callable[[str], object]) -> ObjectMeta:
        path = self._path(key)
        folder = path.rpartition("/")[0]
        self._filesystem.makedirs(folder or "/", exist_ok=True)
        if not self._renames:
            write(path)
            return self._head(key)
        if self._filesystem.isdir(path):
            raise IsADirectoryError(path)
        partial = f"{folder}/{_PARTIAL_PREFIX}{secrets.token_hex(8)}"
        try:
            write(partial)
            self._filesystem.mv(partial, path)
        except BaseException as error:
            try:
                if self._filesystem.exists(partial):
                    self._filesystem.rm_file(partial)
            except Exception as refusal:  # noqa: BLE001  as foreign as the write's own, which is the one to raise
                reason = type(refusal).__name__
                error.add_note(f"{partial} may be left behind, because it could not be removed: {reason}")
            raise
        return self._head(key)

    def _delete(self, key: str) -> None:
        self._head(key)
        self._filesystem.rm_file(self._path(key))


def _meta(key: str, info: dict[str, Any]) -> ObjectMeta:
    marks = [_mark(info[field]) for field in _VERSION_FIELDS if info.get(field)]
    digest = hashlib.blake2b("\0".join(marks).encode(), digest_size=12).hexdigest()
    return ObjectMeta(key, info["size"], f"{digest}-{info['size']}")


def _locally(uri: str, function: Callable[..., R], *args: Any) -> R:
    """Call what concerns the local temporary file, and say so where it fails."""
    try:
        return function(*args)
    except OSError as error:
        kind = ErrorKind.NO_SPACE if error.errno in NO_SPACE else None
        reason = error.strerror or type(error).__name__
        failure = DataError(
            f"{uri} is collected in {gettempdir()} before it is written, and that failed: {reason}; make room there, "
            "or name another folder by TMPDIR",
            kind=kind,
            uri=uri,
        )
    try:
        raise failure
    finally:
        del failure  # it holds this frame, and with it what all callers hold


def _mark(value: object) -> str:
    # The same moment stands as a number in one answer of a file system and as a date in another.
    return str(value.timestamp() if isinstance(value, datetime) else value)


def _translated(error: Exception, uri: str) -> DataError:
    """Return our error; of the foreign one only its type is told, as its words may hold a credential."""
    name = type(error).__name__
    match error:
        case IsADirectoryError() | FileNotFoundError():
            return NotFoundError(f"no file at {uri}", uri=uri)
        case NotADirectoryError() | FileExistsError():
            return BadInputError(f"{uri}: a part of its path is a file", uri=uri)
        case PermissionError():
            return PermissionDeniedError(f"the store refuses access to {uri}; check the credentials", uri=uri)
        case TimeoutError():
            return TransientError(f"the store of {uri} did not answer in time", kind=ErrorKind.TIMEOUT, uri=uri)
        case OSError():
            return TransientError(f"the store of {uri} failed ({name}); try again", uri=uri)
    return DataError(f"the fsspec file system of {uri} failed ({name})", uri=uri)
