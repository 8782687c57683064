"""Where the fields of a record batch lie inside its bytes. Pure.

An encapsulated message is a header and a body, and the body is the buffers of all fields in their order, so a field is
a range. The parts of a block are its header and these ranges; together they are the block. Header and layout:
https://arrow.apache.org/docs/format/Columnar.html#recordbatch-message and Message.fbs
"""

from __future__ import annotations

import itertools
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from crc32c import crc32c

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["decode_parts", "part_checksums", "part_ends"]

_PREFIX = struct.Struct("<iI")  # a mark, and the size of the metadata
# Places in the tables of Message.fbs.
_HEADER, _BUFFERS = 2, 2


def part_ends(block: Sequence[memoryview], schema: pa.Schema) -> list[int] | None:
    """Return where the header and each field end inside a block; None where a field's range cannot be told.

    Args:
        block: Its bytes, in pieces.
        schema: Of the batch.
    """
    counts = [_count_buffers(field.type) for field in schema]
    length, taken = sum(map(len, block)), 1
    header = memoryview(block[0])
    while len(header) < _PREFIX.size or len(header) < (begin := _PREFIX.size + _PREFIX.unpack_from(header)[1]):
        header, taken = memoryview(b"".join(block[: taken + 1])), taken + 1
    offsets = _buffer_offsets(header[_PREFIX.size : begin])
    if None in counts or sum(filter(None, counts)) != len(offsets) or offsets != sorted(offsets):
        return None
    firsts = itertools.accumulate((count or 0 for count in counts[:-1]), initial=0)
    starts = [begin + offsets[first] if first < len(offsets) else length for first in firsts]
    return [begin, *starts[1:], length]


def part_checksums(pieces: Iterable[memoryview], ends: Sequence[int]) -> list[int]:
    """Return the crc32c of every part of a block, which is given in pieces."""
    found, part, position = [0] * len(ends), 0, 0
    for piece in pieces:
        view = piece
        while len(view):
            while ends[part] == position:
                part += 1
            taken = view[: ends[part] - position]
            found[part] = crc32c(taken, found[part])
            position += len(taken)
            view = view[len(taken) :]
    return found


def decode_parts(
    schema: pa.Schema, columns: Sequence[int], parts: Iterable[tuple[int, memoryview]], length: int
) -> pa.RecordBatch:
    """Decode some fields of a block of which only some parts are here.

    Arrow looks at nothing but the header and the buffers of the fields that it shall decode, so zeros stand for the
    rest; the pages of a large block that are never touched take no memory.

    Args:
        schema: Of the block.
        columns: Places of the wanted fields in it, ascending.
        parts: Offset and bytes of the header and of the wanted fields.
        length: Of the block.

    Raises:
        pa.ArrowException: The bytes are not such a block. As are `OSError` and `EOFError`.
    """
    head = schema.serialize()
    sparse = np.zeros(head.size + length, np.uint8)
    sparse[: head.size] = np.frombuffer(head, np.uint8)
    for offset, data in parts:
        sparse[head.size + offset : head.size + offset + len(data)] = np.frombuffer(data, np.uint8)
    options = pa.ipc.IpcReadOptions(included_fields=list(columns), use_threads=False)
    with pa.ipc.open_stream(pa.py_buffer(sparse), options=options) as stream:
        batch = next(iter(stream), None)
    if batch is None:
        raise pa.ArrowInvalid("the header is that of no record batch")
    batch.validate()
    return batch


def _buffer_offsets(metadata: memoryview) -> list[int]:
    """Return the offset in the body of every buffer of a record batch."""
    message = int.from_bytes(metadata[:4], "little")
    batch = _follow(metadata, _field(metadata, message, _HEADER))
    buffers = _field(metadata, batch, _BUFFERS)
    if not buffers:
        return []
    buffers = _follow(metadata, buffers)
    count = int.from_bytes(metadata[buffers : buffers + 4], "little")
    table = np.frombuffer(metadata, "<i8", 2 * count, buffers + 4)
    return table[::2].tolist()  # type: ignore[no-any-return]


def _field(metadata: memoryview, table: int, place: int) -> int:
    """Return where a field of a flatbuffers table lies; 0 where it is left out."""
    layout = table - struct.unpack_from("<i", metadata, table)[0]
    if 4 + 2 * place >= struct.unpack_from("<H", metadata, layout)[0]:
        return 0
    offset = struct.unpack_from("<H", metadata, layout + 4 + 2 * place)[0]
    return table + offset if offset else 0


def _follow(metadata: memoryview, position: int) -> int:
    return position + int(struct.unpack_from("<I", metadata, position)[0])


def _count_buffers(kind: Any) -> int | None:
    """Return the number of buffers of an array of a type; None for types that are laid out in other ways."""
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _count_buffers(kind.storage_type)
    if types.is_null(kind):
        return 0
    if types.is_string(kind) or types.is_binary(kind) or types.is_large_string(kind) or types.is_large_binary(kind):
        return 3
    own = {"list": 2, "large_list": 2, "map": 2, "fixed_size_list": 1, "struct": 1}
    name = next((name for name in own if getattr(types, f"is_{name}")(kind)), None)
    if name is not None:
        children = [_count_buffers(kind.field(place).type) for place in range(kind.num_fields)]
        return None if None in children else own[name] + sum(filter(None, children))
    return 2 if types.is_primitive(kind) or types.is_decimal(kind) or types.is_fixed_size_binary(kind) else None
