"""One shard: an Arrow IPC file whose record batches are the blocks.

Any Arrow reader opens the file. What makes it ours is only that the index remembers where each batch's encapsulated
message lies, so the bytes `[offset, offset + length)` decode alone, given the schema.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pyarrow as pa
import xxhash
from crc32c import crc32c

from connectors.errors import BadInputError
from dataflow.formats.arrow.census import FieldStatistics, add_statistics, measure_batch
from dataflow.formats.arrow.parts import part_checksums, part_ends

if TYPE_CHECKING:
    from connectors.protocols import Buffer

__all__ = ["COMPRESSIONS", "Shard", "ShardBuilder"]

COMPRESSIONS = ("none", "lz4", "zstd")
_MAGIC_BYTES = 8  # "ARROW1" and two zeros, before the schema message
# From here on a system call for a piece costs less than a copy of it.
_LARGE_BYTES = 16 << 10


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
        part_end: Where header and fields end in each block, block by block; empty where that is not known.
        part_crc32c: Checksum of each of these parts.
        statistics: Of each field; of shards of older releases there are none.
    """

    size_bytes: int
    digest: str
    offset: list[int]
    length: list[int]
    crc32c: list[int]
    num_samples: list[int]
    part_end: list[int] = field(default_factory=list)
    part_crc32c: list[int] = field(default_factory=list)
    statistics: dict[str, FieldStatistics] = field(default_factory=dict)


class _Pieces:
    """The sink that the Arrow writer writes to: keeps what it is given, large buffers without a copy of them."""

    closed = False

    def __init__(self) -> None:
        self.size_bytes = 0
        self._pieces: list[Buffer] = []

    def write(self, data: bytes | pa.Buffer) -> int:
        # Small pieces come as bytes, or lie in memory that the writer uses again; buffers never change.
        self._pieces.append(memoryview(data) if len(data) >= _LARGE_BYTES else bytes(data))
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

    def take(self) -> list[Buffer]:
        """Return the pieces since the last call, small neighbours as one."""
        groups = itertools.groupby(self._pieces, lambda piece: len(piece) < _LARGE_BYTES)
        taken = [piece for small, group in groups for piece in ([b"".join(group)] if small else group)]
        self._pieces = []
        return taken


class ShardBuilder:
    """Builds one shard in memory, block by block.

    Without compression the shard refers to the memory of the batches, which must not change before it is written.

    Args:
        schema: What every batch must have.
        compression: `none`, `lz4` or `zstd`, of each buffer of each batch.
    """

    def __init__(self, schema: pa.Schema, *, compression: str) -> None:
        if compression not in COMPRESSIONS:
            raise BadInputError(f"compression must be one of {', '.join(COMPRESSIONS)}, got {compression!r}")
        self._schema = schema
        self._sink = _Pieces()
        # One thread: the order of work never depends on the machine, and convert already runs a process per core.
        options = pa.ipc.IpcWriteOptions(compression=None if compression == "none" else compression, use_threads=False)
        self._writer = pa.ipc.new_file(self._sink, schema, options=options)
        # pyarrow writes the header together with the first batch.
        self._header_bytes = _MAGIC_BYTES + schema.serialize().size
        self._chunks: list[Buffer] = []
        self._hash = xxhash.xxh3_128()
        self._offset: list[int] = []
        self._length: list[int] = []
        self._crc32c: list[int] = []
        self._num_samples: list[int] = []
        self._part_end: list[int] = []
        self._part_crc32c: list[int] = []
        self._has_parts = True
        self._statistics: dict[str, FieldStatistics] | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes so far."""
        return self._sink.size_bytes

    def append(self, batch: pa.RecordBatch) -> None:
        """Add one block."""
        written = self._sink.size_bytes
        begin = written or self._header_bytes
        self._writer.write_batch(batch)
        checksum, header, block = 0, begin - written, []
        for piece in self._take():
            block.append(memoryview(piece)[header:])
            checksum = crc32c(block[-1], checksum)
            header = max(0, header - len(piece))
        self._note_parts(block)
        self._offset.append(begin)
        self._length.append(self._sink.size_bytes - begin)
        self._crc32c.append(checksum)
        self._num_samples.append(batch.num_rows)
        found = measure_batch(batch)
        self._statistics = found if self._statistics is None else add_statistics([self._statistics, found])

    def _note_parts(self, block: list[memoryview]) -> None:
        """Take down where the fields of a block lie."""
        ends = part_ends(block, self._schema) if self._has_parts else None
        self._has_parts = ends is not None
        if ends is not None:
            self._part_end += ends
            self._part_crc32c += part_checksums(block, ends)

    def finish(self) -> tuple[Shard, list[Buffer]]:
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
            part_end=self._part_end if self._has_parts else [],
            part_crc32c=self._part_crc32c if self._has_parts else [],
            statistics=self._statistics or {},
        )
        return shard, self._chunks

    def _take(self) -> list[Buffer]:
        pieces = self._sink.take()
        for piece in pieces:
            self._hash.update(piece)
        self._chunks += pieces
        return pieces
