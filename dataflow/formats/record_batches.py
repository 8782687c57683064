"""Record batches inside files of Arrow messages, as blocks: where they lie, and their values.

A scan reads the metadata of each message and steps over its body:

    0xFFFFFFFF | int32 length | flatbuffer `Message` with type, number of rows and length of the body | body

https://arrow.apache.org/docs/format/Columnar.html#encapsulated-message-format and format/Message.fbs
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pyarrow as pa

from connectors.errors import BadInputError, CorruptError
from dataflow.formats.fields import decode_names
from dataflow.formats.ranges import RangeFile

if TYPE_CHECKING:
    from cache.keys import BlockRef
    from connectors.objects import ObjectMeta
    from dataflow.formats.place import Place
    from dataflow.formats.scan import BlockTable

__all__ = ["read_batch", "scan_batches"]

MARK = b"\xff\xff\xff\xff"
SCHEMA, DICTIONARY, BATCH = 1, 2, 3
MAX_METADATA_BYTES = 64 << 20


def read_batch(data: memoryview, stored: pa.Schema, ref: BlockRef) -> pa.RecordBatch:
    """Return the record batch that `data` is; without compression its columns are views of `data`.

    Raises:
        CorruptError: It is none; names the file and the offset.
    """
    try:
        batch = pa.ipc.read_record_batch(pa.py_buffer(data), stored)
        batch.validate(full=True)  # there are no checksums: at least no value reaches into another one
    except (pa.ArrowException, OSError, EOFError) as error:
        raise CorruptError(
            f"the block at offset {ref.offset} of {ref.uri} ({ref.length} bytes) is no record batch: {error}",
            uri=ref.uri,
        ) from error
    return batch


def scan_batches(
    place: Place, meta: ObjectMeta, table: BlockTable, shard: int, begin: int = 0, end: int | None = None
) -> tuple[pa.Schema, int]:
    """Enter the record batches of the stream in bytes `[begin, end)` of a file as blocks.

    Returns:
        Their schema, and the number of their rows.

    Raises:
        CorruptError: The stream is damaged; names the file and the offset.
        BadInputError: It has dictionary-encoded fields.
    """
    uri, found, total = place.uri(meta), None, 0
    end = meta.size_bytes if end is None else end
    for offset, length, kind, num_rows, metadata in _messages(place, meta, begin, end):
        if kind == SCHEMA and found is None:
            found = _read_schema(metadata, uri)
        elif kind == BATCH and found is not None:
            if num_rows:
                table.add(shard, offset, length, num_rows)
                total += num_rows
        elif kind == DICTIONARY:
            raise BadInputError(f"{uri} has dictionary-encoded fields; cast them to plain ones", uri=uri)
        else:
            raise CorruptError(f"{uri} has a message of type {kind} at offset {offset}", uri=uri)
    if found is None:
        raise CorruptError(f"{uri} has no schema", uri=uri)
    return found, total


def _messages(place: Place, meta: ObjectMeta, begin: int, end: int) -> Iterator[tuple[int, int, int, int, bytes]]:
    """Yield offset, length, type, number of rows and own bytes (without the body) of every message of a stream."""
    uri, file, offset = place.uri(meta), RangeFile(place, meta), begin
    while offset < end:
        file.seek(offset)
        head = file.read(8)
        size_bytes = int.from_bytes(head[4:], "little", signed=True)
        if len(head) < 8 or head[:4] != MARK or not 0 <= size_bytes <= MAX_METADATA_BYTES:
            raise CorruptError(f"{uri} is damaged: there is no Arrow message at offset {offset}", uri=uri)
        if size_bytes == 0:
            return  # the end of the stream
        metadata = file.read(size_bytes)
        try:
            kind, num_rows, body_bytes = _describe(metadata)
        except (struct.error, IndexError) as error:
            raise CorruptError(f"the message at offset {offset} of {uri} is damaged: {error}", uri=uri) from error
        length = 8 + size_bytes + body_bytes
        if body_bytes < 0 or num_rows < 0 or offset + length > end:
            raise CorruptError(f"{uri} is cut off inside the message at offset {offset}", uri=uri)
        yield offset, length, kind, num_rows, head + metadata
        offset += length


def _describe(metadata: bytes) -> tuple[int, int, int]:
    """Return type, number of rows (of a record batch) and length of the body from a flatbuffer `Message`."""
    message = struct.unpack_from("<I", metadata)[0]
    kind = _scalar(metadata, message, 1, "<B")
    body_bytes = _scalar(metadata, message, 3, "<q")
    if kind != BATCH:
        return kind, 0, body_bytes
    place = _place(metadata, message, 2)
    batch = place + struct.unpack_from("<I", metadata, place)[0]
    return kind, _scalar(metadata, batch, 0, "<q"), body_bytes


def _place(buffer: bytes, table: int, slot: int) -> int:
    """Return where a field of a flatbuffer table is; 0 where it has its default.

    https://flatbuffers.dev/internals: a table begins with the signed distance to its vtable, which is
    uint16 size | uint16 size of the table | uint16 place of every field
    """
    vtable = table - struct.unpack_from("<i", buffer, table)[0]
    if 4 + 2 * slot >= struct.unpack_from("<H", buffer, vtable)[0]:
        return 0
    relative = struct.unpack_from("<H", buffer, vtable + 4 + 2 * slot)[0]
    return int(table + relative) if relative else 0


def _scalar(buffer: bytes, table: int, slot: int, kind: str) -> int:
    place = _place(buffer, table, slot)
    return int(struct.unpack_from(kind, buffer, place)[0]) if place else 0


def _read_schema(message: bytes, uri: str) -> pa.Schema:
    try:
        schema = pa.ipc.read_schema(pa.py_buffer(message))
        decode_names(schema)
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        raise CorruptError(f"{uri} has no readable schema: {error}", uri=uri) from error
    return schema
