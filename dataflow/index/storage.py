"""The index as bytes: an Arrow IPC file of one row, readable by any Arrow reader.

    shards        list<struct<name: string, size_bytes: int64, version: string>>
    blocks        list<struct<shard: int32, offset: int64, length: int64[, crc32c: uint32]>>
    first_sample  list<int64>                                      one more than blocks
    parts         list<struct<end: int64, crc32c: uint32>>         where fields lie, fields + 1 per block; optional

One row of lists, because the three tables differ in length and an Arrow file has one schema. Vectors are read without a
copy, whatever their length, from bytes or from a map. Equal tables give equal bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from connectors.errors import CorruptError
from dataflow.index.table import Blocks, Index, Parts, Shards

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["SIDECAR_NAME", "decode_index", "decode_tables", "encode_index", "read_extra", "read_metadata"]

# What an index is called that lies beside files of a format without one.
SIDECAR_NAME = "dataflow-index.arrow"

SHARD_FIELDS = [("name", pa.string()), ("size_bytes", pa.int64()), ("version", pa.string())]
BLOCK_FIELDS = [("shard", pa.int32()), ("offset", pa.int64()), ("length", pa.int64())]
CRC_FIELD = ("crc32c", pa.uint32())
PART_FIELDS = [("end", pa.int64()), CRC_FIELD]

# What reading damaged bytes raises.
_UNREADABLE = (pa.ArrowException, OSError, EOFError, KeyError, AttributeError, ValueError)


def encode_index(
    shards: Shards,
    blocks: Blocks,
    metadata: Mapping[str, str] | None = None,
    extra: Mapping[str, pa.Array] | None = None,
) -> bytes:
    """Write the two tables as one Arrow IPC file; `metadata` goes into its schema, `extra` into columns of its own."""
    shard_columns = [shards.names, pa.array(shards.size_bytes), shards.versions]
    block_columns = [pa.array(blocks.shard), pa.array(blocks.offset), pa.array(blocks.length)]
    block_fields = list(BLOCK_FIELDS)
    if blocks.crc32c is not None:
        block_columns.append(pa.array(blocks.crc32c))
        block_fields.append(CRC_FIELD)
    columns = {
        "shards": _struct(shard_columns, SHARD_FIELDS),
        "blocks": _struct(block_columns, block_fields),
        "first_sample": pa.array(blocks.first_sample),
        **(extra or {}),
    }
    if blocks.parts is not None:
        part_columns = [pa.array(blocks.parts.end.reshape(-1)), pa.array(blocks.parts.crc32c.reshape(-1))]
        columns["parts"] = _struct(part_columns, PART_FIELDS)
    rows = [pa.ListArray.from_arrays(pa.array([0, len(column)], pa.int32()), column) for column in columns.values()]
    batch = pa.record_batch(rows, names=list(columns)).replace_schema_metadata(dict(metadata) if metadata else None)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def decode_index(data: bytes | memoryview, *, url: str, fingerprint: str, uri: str) -> Index:
    """Read an index; its vectors are views of `data`.

    Args:
        data: What `encode_index` wrote.
        url: The dataset's URL.
        fingerprint: The dataset's fingerprint.
        uri: Where `data` came from, for errors.

    Raises:
        CorruptError: Not an index, or one that contradicts itself.
    """
    index = Index(url, fingerprint, *decode_tables(data, uri=uri))
    index.check()
    return index


def decode_tables(data: bytes | memoryview, *, uri: str) -> tuple[Shards, Blocks]:
    """Read the tables of an index, which are views of `data`; whether they fit together is left to a digest of them.

    Raises:
        CorruptError: Not an index.
    """
    try:
        batch = _read_batch(data)
        shard_table, block_table = (batch.column(name).values for name in ("shards", "blocks"))
        block_names = {field.name for field in block_table.type}
        names, versions = (_texts(shard_table.field(name)) for name in ("name", "version"))
        shards = Shards(names, _vector(shard_table, "size_bytes"), versions)
        shard, offset, length = (_vector(block_table, name) for name, _ in BLOCK_FIELDS)
        blocks = Blocks(
            shard,
            offset,
            length,
            _numbers(batch.column("first_sample").values),
            _vector(block_table, "crc32c") if "crc32c" in block_names else None,
            _parts(batch.column("parts").values, len(shard)) if "parts" in batch.schema.names and len(shard) else None,
        )
    except _UNREADABLE as error:
        raise CorruptError(f"{uri} is not an index: {error}", uri=uri) from error
    return shards, blocks


def read_metadata(data: bytes | memoryview, *, uri: str) -> dict[str, str]:
    """Return what `encode_index` was given as `metadata`."""
    try:
        metadata = pa.ipc.open_file(pa.py_buffer(data)).schema.metadata or {}
        return {key.decode(): value.decode() for key, value in metadata.items()}
    except _UNREADABLE as error:
        raise CorruptError(f"{uri} is not an index: {error}", uri=uri) from error


def read_extra(data: bytes | memoryview, name: str, *, uri: str) -> np.ndarray[Any, Any]:
    """Return a column that `encode_index` was given as `extra`; a view of `data`."""
    try:
        return _numbers(_read_batch(data).column(name).values)
    except _UNREADABLE as error:
        raise CorruptError(f"{uri} is not an index: {error}", uri=uri) from error


def _read_batch(data: bytes | memoryview) -> pa.RecordBatch:
    """Return the one row, none of whose offsets leads outside: Arrow follows them unasked, to its end."""
    batch = pa.ipc.open_file(pa.py_buffer(data)).get_batch(0)
    batch.validate(full=True)
    return batch


def _struct(columns: list[Any], fields: list[tuple[str, pa.DataType]]) -> pa.StructArray:
    return pa.StructArray.from_arrays(columns, fields=[pa.field(name, kind, nullable=False) for name, kind in fields])


def _parts(table: pa.StructArray, num_blocks: int) -> Parts:
    return Parts(_vector(table, "end").reshape(num_blocks, -1), _vector(table, "crc32c").reshape(num_blocks, -1))


def _vector(table: pa.StructArray, name: str) -> np.ndarray[Any, Any]:
    return _numbers(table.field(name))


def _texts(array: pa.Array) -> pa.StringArray:
    if array.null_count or not pa.types.is_string(array.type):
        raise ValueError(f"{array.type} with {array.null_count} nulls where there should be texts")
    return array


def _numbers(array: pa.Array) -> np.ndarray[Any, Any]:
    """View integers. Arrow's own `to_numpy` first imports pandas, if that is installed: 0.3 s before the first read."""
    if array.null_count or not pa.types.is_integer(array.type):
        raise ValueError(f"{array.type} with {array.null_count} nulls where there should be integers")
    dtype = np.dtype(str(array.type))
    if not len(array):
        return np.empty(0, dtype)
    return np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * dtype.itemsize)
