"""An open file of the file system `tiered`: read by blocks of one version, or written aside and published whole."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from typing import IO, Any

from fsspec.callbacks import DEFAULT_CALLBACK
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from cache.objects import ByteRange, CachedObjects, PinnedObject

__all__ = ["UPLOAD_BYTES", "TieredFile", "chunks_of", "describe_file"]

_log = logging.getLogger(__name__)

UPLOAD_BYTES = 8 * 1024 * 1024
"""What a file hands to an upload at once."""

_SPOOL_BYTES = 64 * 1024 * 1024
"""What is being written stays in memory up to here, then goes to a temporary file."""


def describe_file(name: str, size_bytes: int, version: str) -> dict[str, Any]:
    """Return what fsspec's `info` says of a file."""
    return {"name": name, "size": size_bytes, "type": "file", "version": version}


def chunks_of(file: IO[bytes], callback: Any) -> Iterator[bytes]:
    """Read a file to its end, telling a callback of fsspec how far it is."""
    while chunk := file.read(UPLOAD_BYTES):
        yield chunk
        callback.relative_update(len(chunk))


class TieredFile(AbstractBufferedFile):  # type: ignore[misc]
    """An open file. For one thread at a time; a reading one can be pickled, and its copy reads the same content.

    Args:
        filesystem: What opened it.
        path: Its name there.
        mode: `rb`, `wb` or `xb`.
        block_size: What is written is handed over in pieces of this many bytes.
        autocommit: Whether closing publishes what was written, rather than `commit`.
        cache_type: As in fsspec.
        cache_options: As in fsspec.
        objects: Reads and writes.
        uri: Where it lies at the origin.
        pinned: The content to read; None to write.
    """

    def __init__(
        self,
        filesystem: AbstractFileSystem,
        path: str,
        mode: str,
        block_size: int,
        autocommit: bool,
        *,
        cache_type: str,
        cache_options: dict[str, Any],
        objects: CachedObjects,
        uri: str,
        pinned: PinnedObject | None,
    ) -> None:
        self._objects = objects
        self._uri = uri
        self._pinned = pinned
        self._held: tuple[int, memoryview] | None = None
        self._spool: Any = None
        if pinned is not None:
            self._details = describe_file(path, pinned.size_bytes, pinned.version)
        super().__init__(
            filesystem,
            path,
            mode,
            block_size,
            autocommit,
            cache_type,
            cache_options,
            size=None if pinned is None else pinned.size_bytes,
        )
        if pinned is not None:
            self.kwargs["version"] = pinned.version  # a pickled copy opens this content, or fails

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None and self.writable():
            self.discard()
            self.closed = True
        self.close()

    def __del__(self) -> None:
        # Half a file must not appear because somebody lost it.
        if not self.closed and "r" not in self.mode:
            _log.warning("%s was never closed and is not written", self.path)
            self.discard()
            self.closed = True

    def close(self) -> None:
        """Publish what was written, all of it or nothing."""
        try:
            super().close()
        except BaseException:
            self.discard()
            raise
        self._held = None

    def commit(self) -> None:
        """Upload what was written."""
        try:
            self._spool.seek(0)
            self._objects.put_stream(self._uri, chunks_of(self._spool, DEFAULT_CALLBACK))
        finally:
            self.discard()

    def discard(self) -> None:
        """Forget what was written."""
        spool, self._spool = self._spool, None
        if spool is not None:
            spool.close()

    def _initiate_upload(self) -> None:
        self._spool = tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES)  # noqa: SIM115  closed by discard

    def _upload_chunk(self, final: bool = False) -> bool:
        self._spool.write(self.buffer.getbuffer())
        if final and self.autocommit:
            self.commit()
        return True

    def _fetch_range(self, start: int, end: int) -> bytes:
        """Read; the last block is held, so that short reads in a row ask once."""
        assert self._pinned is not None
        size_bytes = self._objects.options.block_size_bytes
        number = start // size_bytes
        end = min(end, self._pinned.size_bytes)
        if start >= end:
            return b""
        if end > (number + 1) * size_bytes:
            return self._objects.read([ByteRange(self._pinned, start, end)])[0]
        if self._held is None or self._held[0] != number:
            self._held = number, self._objects.block(self._pinned, number)
        return bytes(self._held[1][start - number * size_bytes : end - number * size_bytes])
