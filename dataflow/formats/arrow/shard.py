"""One shard: an Arrow IPC file whose record batches are the blocks.

Any Arrow reader opens the file. What makes it ours is only that the index remembers where each batch's encapsulated
message lies, so the bytes `[offset, offset + length)` decode alone, given the schema.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import xxhash
from crc32c import crc32c

from connectors.errors import BadInputError

__all__ = ["COMPRESSIONS", "Shard", "ShardBuilder"]

COMPRESSIONS = ("none", "lz4", "zstd")
_MAGIC_BYTES = 8  # "ARROW1" and two zeros, before the schema message


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What the index keeps of a finished shard; lists run over its blocks.

    Attributes:
        size_bytes: Length of the file.
        digest: xxh3-128 of the file.
        offset: First byte of each block.
        length: Bytes of each block.
        crc32c: Checksum of each block.
        num_samples: Samples in each block.
    """

    size_bytes: int
    digest: str
    offset: list[int]
    length: list[int]
    crc32c: list[int]
    num_samples: list[int]


class _Chunks:
    """The sink that the Arrow writer writes to: keeps the pieces since the last `take`."""

    closed = False

    def __init__(self) -> None:
        self.size_bytes = 0
        self._pieces: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._pieces.append(bytes(data))
        self.size_bytes += len(data)
        return len(data)

    def tell(self) -> int:
        return self.size_bytes

    def flush(self) -> None:
        """Nothing is buffered below."""

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def close(self) -> None:
        """The pieces stay until they are taken."""

    def take(self) -> bytes:
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)


class ShardBuilder:
    """Builds one shard in memory, block by block.

    Args:
        schema: What every batch must have.
        compression: `none`, `lz4` or `zstd`, of each buffer of each batch.
    """

    def __init__(self, schema: pa.Schema, *, compression: str) -> None:
        if compression not in COMPRESSIONS:
            raise BadInputError(f"compression must be one of {', '.join(COMPRESSIONS)}, got {compression!r}")
        self._sink = _Chunks()
        # One thread: the order of work never depends on the machine, and convert already runs a process per core.
        options = pa.ipc.IpcWriteOptions(compression=None if compression == "none" else compression, use_threads=False)
        self._writer = pa.ipc.new_file(self._sink, schema, options=options)
        # pyarrow writes the header together with the first batch.
        self._header_bytes = _MAGIC_BYTES + schema.serialize().size
        self._chunks: list[bytes] = []
        self._hash = xxhash.xxh3_128()
        self._offset: list[int] = []
        self._length: list[int] = []
        self._crc32c: list[int] = []
        self._num_samples: list[int] = []

    @property
    def size_bytes(self) -> int:
        """Bytes so far."""
        return self._sink.size_bytes

    def append(self, batch: pa.RecordBatch) -> None:
        """Add one block."""
        begin = self._sink.size_bytes or self._header_bytes
        self._writer.write_batch(batch)
        chunk = self._take()
        block = memoryview(chunk)[len(chunk) - (self._sink.size_bytes - begin) :]
        self._offset.append(begin)
        self._length.append(len(block))
        self._crc32c.append(crc32c(block))
        self._num_samples.append(batch.num_rows)

    def finish(self) -> tuple[Shard, list[bytes]]:
        """Close the shard, once; return what the index keeps of it, and the file's content in pieces."""
        self._writer.close()
        self._take()
        shard = Shard(
            size_bytes=self._sink.size_bytes,
            digest=self._hash.hexdigest(),
            offset=self._offset,
            length=self._length,
            crc32c=self._crc32c,
            num_samples=self._num_samples,
        )
        return shard, self._chunks

    def _take(self) -> bytes:
        chunk = self._sink.take()
        self._hash.update(chunk)
        self._chunks.append(chunk)
        return chunk
