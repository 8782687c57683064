"""A stored file as Python's own file protocol, for parsers that seek."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from dataflow.formats.place import CHUNK_BYTES

if TYPE_CHECKING:
    from connectors.objects import ObjectMeta
    from dataflow.formats.place import Place

__all__ = ["RangeFile"]


class RangeFile(io.RawIOBase):
    """Reads one version of a file, a chunk at a time; keeps the last chunk.

    Args:
        place: Where it lies.
        meta: The file, as listed there.
    """

    def __init__(self, place: Place, meta: ObjectMeta) -> None:
        self._place = place
        self._meta = meta
        self._position = 0
        self._chunk = memoryview(b"")
        self._chunk_offset = 0

    def readable(self) -> bool:  # noqa: D102
        return True

    def seekable(self) -> bool:  # noqa: D102
        return True

    def tell(self) -> int:  # noqa: D102
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:  # noqa: D102
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._meta.size_bytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes, fewer only at the end of the file."""
        end = self._meta.size_bytes if size < 0 else min(self._meta.size_bytes, self._position + size)
        parts = []
        while self._position < end:
            start = self._position - self._chunk_offset
            if not 0 <= start < len(self._chunk):
                length = min(CHUNK_BYTES, self._meta.size_bytes - self._position)
                self._chunk, self._chunk_offset = self._place.read(self._meta, self._position, length), self._position
                start = 0
            part = self._chunk[start : start + end - self._position]
            parts.append(part)
            self._position += len(part)
        return b"".join(parts)
