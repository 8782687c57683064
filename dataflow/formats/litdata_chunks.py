"""Where the items of a LitData chunk lie, plain or compressed with zstd.

    plain   uint32 items | uint32 offset of every item and of the end | items
    sample  as plain, and every item is a zstd frame
    batch   8 bytes "LDFZ01" | uint16 version, flags | uint32 items, items of a frame, frames
            | uint32 offset of every item and of the end when unpacked
            | of every frame: uint32 first item, items; uint64 offset; uint32 length, length when unpacked
            | frames of several items each
    chunk   a plain chunk, compressed as a whole

Frames follow each other, and several unpack as if they were one: so a block is always a run of whole ones.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from connectors.errors import CorruptError
from dataflow.formats.scan import cut_blocks
from dataflow.formats.unpacking import unpack

if TYPE_CHECKING:
    from connectors.objects import ObjectMeta
    from dataflow.formats.place import Place

__all__ = ["Wrap", "find_blocks", "unwrap", "wrap_of"]

Wrap: TypeAlias = Literal["plain", "sample", "batch", "chunk"]

_MAGIC = b"LDFZ01\0\0"
_PREFIX = struct.Struct("<8sHHIII")
_FRAME = np.dtype([("first", "<u4"), ("items", "<u4"), ("offset", "<u8"), ("length", "<u4"), ("unpacked", "<u4")])


def wrap_of(compression: str | None, level: str | None) -> Wrap | None:
    """Return how chunks are compressed, by what the index says; None where that is unknown."""
    if not compression:
        return "plain"
    if compression.split(":")[0] != "zstd":
        return None
    wraps: dict[str | None, Wrap] = {None: "chunk", "chunk": "chunk", "batch": "batch", "sample": "sample"}
    return wraps.get(level)


def find_blocks(
    place: Place, meta: ObjectMeta, count: int, wrap: Wrap, block_bytes: int
) -> Iterator[tuple[int, int, int]]:
    """Cut a chunk of `count` items into blocks of about `block_bytes` as it is stored.

    Yields:
        Offset, length and number of items of each.

    Raises:
        CorruptError: The table of the chunk is damaged.
    """
    uri = place.uri(meta)
    if wrap == "chunk":
        if not meta.size_bytes:
            raise CorruptError(f"{uri} is empty; write it again", uri=uri)
        yield 0, meta.size_bytes, count
        return
    if wrap == "batch":
        start, ends, items = _frame_table(place, meta, count)
    else:
        offsets = _item_table(place.read(meta, 0, 4 * (count + 2)), count, uri)
        start, ends, items = int(offsets[0]), offsets[1:] - offsets[0], np.ones(count, np.int64)
    end = start + (int(ends[-1]) if len(ends) else 0)
    if end != meta.size_bytes:
        raise CorruptError(f"{uri} has {meta.size_bytes} bytes, its table ends at {end}", uri=uri)
    first = 0
    for offset, length, number in cut_blocks(ends, block_bytes):
        yield start + offset, length, int(items[first : first + number].sum())
        first += number


def unwrap(data: memoryview, count: int, wrap: Wrap, uri: str) -> memoryview:
    """Return the items of a block of `count`, one after the other.

    Raises:
        CorruptError: They cannot be decompressed.
        BadInputError: They are too large for that.
    """
    if wrap == "plain":
        return data
    data = unpack(data, uri, "zstd")
    if wrap != "chunk":
        return data
    offsets = _item_table(data, count, uri)
    if offsets[-1] != len(data):
        raise CorruptError(f"{uri} unpacks to {len(data)} bytes, its table ends at {offsets[-1]}", uri=uri)
    return data[int(offsets[0]) :]


def _item_table(data: memoryview, count: int, uri: str) -> npt.NDArray[np.int64]:
    size_bytes = 4 * (count + 2)
    if len(data) >= size_bytes:
        table = np.frombuffer(data, "<u4", count + 2).astype(np.int64)
        if table[0] == count and table[1] == size_bytes and (np.diff(table[1:]) >= 0).all():
            return table[1:]
    raise CorruptError(f"the table of {uri} at offset 0 is damaged", uri=uri)


def _frame_table(
    place: Place, meta: ObjectMeta, count: int
) -> tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return where the frames begin, where each ends from there on, and its number of items."""
    uri = place.uri(meta)
    magic, version, _, items, _, num_frames = _PREFIX.unpack(place.read(meta, 0, _PREFIX.size))
    table = _PREFIX.size + 4 * (count + 1)
    start = table + num_frames * _FRAME.itemsize
    if (magic, version, items) == (_MAGIC, 1, count) and 0 < num_frames <= count:
        frames = np.frombuffer(place.read(meta, table, start - table), _FRAME)
        offsets = frames["offset"].astype(np.int64)
        ends = np.cumsum(frames["length"], dtype=np.int64)
        numbers = frames["items"].astype(np.int64)
        if (offsets == start + np.r_[0, ends[:-1]]).all() and numbers.sum() == count:
            return start, ends, numbers
    raise CorruptError(f"the table of frames of {uri} is damaged, or of another version", uri=uri)
