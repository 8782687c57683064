"""Where the chunks of arrays lie, and regions of arrays put together from them.

Chunks are numbered in the order of the grid, the last axis fastest, so a run of rows is a run of chunks.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cache.keys import BlockRef
from connectors.errors import CorruptError
from dataflow.formats.zarr_codecs import ChunkCodec, chunk_codec, read_shard_table, shard_table_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy.typing as npt

    from connectors.objects import ObjectMeta
    from dataflow.formats.place import Place
    from dataflow.formats.zarr_metadata import ZarrArray

__all__ = ["Region", "StoredArray", "locate_chunks"]

TABLES_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Region:
    """A box of an array.

    Attributes:
        start: First place along every axis.
        shape: Number of places along every axis.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class StoredArray:
    """An array and where its chunks are.

    Attributes:
        name: Of the field.
        array: What `zarr.json` says.
        codec: How chunks are stored.
        shard: int32 per chunk: its object, -1 where the chunk is absent.
        offset: int64 per chunk: first byte in the object.
        length: int64 per chunk: number of bytes.
    """

    name: str
    array: ZarrArray
    codec: ChunkCodec
    shard: npt.NDArray[np.int32] = field(repr=False)
    offset: npt.NDArray[np.int64] = field(repr=False)
    length: npt.NDArray[np.int64] = field(repr=False)

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of chunks along every axis."""
        return _grid(self.array)

    @property
    def row_bytes(self) -> float:
        """Bytes of one place along the first axis, unpacked; about, for text and bytes."""
        array = self.array
        if array.dtype is None:
            return float(self.length.sum()) / max(1, array.shape[0])
        return float(array.dtype.itemsize * math.prod(array.shape[1:]))

    def chunks_of_rows(self, first: Any, last: Any) -> tuple[Any, Any]:
        """Return the first chunk that rows `[first, last)` touch and the one after the last; numbers or arrays."""
        step, per_row = self.array.chunk_shape[0], math.prod(self.grid[1:])
        return first // step * per_row, -(-last // step) * per_row

    def chunks_of(self, region: Region) -> list[int]:
        """Return the numbers of the chunks that a region touches, ascending."""
        steps = self.array.chunk_shape
        ranges = [
            range(start // step, -(-(start + size) // step))
            for start, size, step in zip(region.start, region.shape, steps, strict=True)
        ]
        return [int(np.ravel_multi_index(place, self.grid)) for place in itertools.product(*ranges)]

    def assemble(self, region: Region, chunks: Iterable[tuple[int, memoryview | None]], out: npt.NDArray[Any]) -> None:
        """Put a region together.

        Args:
            region: Which one.
            chunks: Numbers and bytes of the chunks that it touches; None where a chunk is absent.
            out: Receives it; of the region's shape.

        Raises:
            CorruptError: A chunk is damaged; names array and chunk.
        """
        for number, data in chunks:
            origin = [place * step for place, step in zip(self._place(number), self.array.chunk_shape, strict=True)]
            inside, outside = [], []
            for begin, step, start, size in zip(
                origin, self.array.chunk_shape, region.start, region.shape, strict=True
            ):
                low, high = max(begin, start), min(begin + step, start + size)
                inside.append(slice(low - begin, high - begin))
                outside.append(slice(low - start, high - start))
            out[tuple(outside)] = self.array.fill if data is None else self.values(number, data)[tuple(inside)]

    def values(self, number: int, data: memoryview) -> npt.NDArray[Any]:
        """Return the values of a chunk; `CorruptError` names array and chunk where it is damaged."""
        try:
            return self.codec.decode(data)
        except (ValueError, UnicodeDecodeError) as error:
            raise CorruptError(
                f"chunk {self._place(number)} of array {self.name!r} ({len(data)} bytes at offset "
                f"{self.offset[number]} of its object) is damaged: {error}"
            ) from error

    def _place(self, number: int) -> tuple[int, ...]:
        return tuple(int(place) for place in np.unravel_index(number, self.grid))


def locate_chunks(
    place: Place, name: str, array: ZarrArray, files: Mapping[str, ObjectMeta], shards: list[ObjectMeta]
) -> StoredArray:
    """Find the chunks of an array among the objects of its dataset; of shards, read the tables.

    Args:
        place: Where the dataset lies.
        name: Of the field.
        array: What `zarr.json` says.
        files: All objects, by name.
        shards: Receives those that hold chunks of this array.

    Raises:
        CorruptError: An object is missing, truncated or damaged.
        BadInputError: Stored in a way that is not supported.
    """
    codec = chunk_codec(array, uri=place.uri(files[f"{array.path}/zarr.json" if array.path else "zarr.json"]))
    grid = _grid(array)
    count = math.prod(grid)
    stored = StoredArray(
        name, array, codec, np.full(count, -1, np.int32), np.zeros(count, np.int64), np.zeros(count, np.int64)
    )
    found: list[tuple[tuple[int, ...], int]] = []
    for where in np.ndindex(array.grid):
        meta = files.get(array.shard_key(where))
        if meta is not None:
            found.append((where, len(shards)))
            shards.append(meta)
            _check_size(place, stored, where, meta)
        elif array.all_stored:
            key = array.shard_key(where)
            raise CorruptError(f"{_what(array)} {where} of array {name!r} is missing: {place.url} has no {key}")
    if not array.is_sharded:
        for where, shard in found:
            number = int(np.ravel_multi_index(where, grid))
            stored.shard[number], stored.length[number] = shard, shards[shard].size_bytes
        return stored
    for start in range(0, len(found), TABLES_AT_ONCE):
        group = found[start : start + TABLES_AT_ONCE]
        for (where, shard), table in zip(group, _tables(place, stored, group, shards), strict=True):
            _enter(stored, where, shard, table, _where(place, stored, where, shards[shard]), shards[shard].size_bytes)
    return stored


def _grid(array: ZarrArray) -> tuple[int, ...]:
    return tuple(-(-size // step) for size, step in zip(array.shape, array.chunk_shape, strict=True))


def _where(place: Place, stored: StoredArray, where: tuple[int, ...], meta: ObjectMeta) -> str:
    return f"{_what(stored.array)} {where} of array {stored.name!r}, {place.uri(meta)},"


def _what(array: ZarrArray) -> str:
    return "shard" if array.is_sharded else "chunk"


def _check_size(place: Place, stored: StoredArray, where: tuple[int, ...], meta: ObjectMeta) -> None:
    """Refuse an object that cannot be whole."""
    array, codec = stored.array, stored.codec
    problem = ""
    if array.index_codecs is not None:
        least = shard_table_size(math.prod(array.inner), array.index_codecs)
        if meta.size_bytes < least:
            problem = f"at least {least}, the size of its table"
    elif not codec.packings and codec.size_bytes not in (None, meta.size_bytes):
        problem = f"{codec.size_bytes}"
    elif not meta.size_bytes:
        problem = "more than 0"
    if problem:
        about = _where(place, stored, where, meta)
        raise CorruptError(f"{about} has {meta.size_bytes} bytes instead of {problem}: truncated", uri=place.uri(meta))


def _tables(
    place: Place, stored: StoredArray, group: Sequence[tuple[tuple[int, ...], int]], shards: Sequence[ObjectMeta]
) -> list[npt.NDArray[np.int64]]:
    codecs = stored.array.index_codecs
    assert codecs is not None
    length = shard_table_size(math.prod(stored.array.inner), codecs)
    metas = [shards[shard] for _, shard in group]
    refs = [
        BlockRef(
            place.uri(meta), meta.version, 0 if stored.array.index_first else meta.size_bytes - length, length, None
        )
        for meta in metas
    ]
    tables = []
    for (where, _), meta, data in zip(group, metas, place.reader.read_blocks(refs), strict=True):
        try:
            tables.append(read_shard_table(data.view, codecs))
        except ValueError as error:
            about = _where(place, stored, where, meta)
            raise CorruptError(f"the table of {about} is damaged: {error}", uri=place.uri(meta)) from error
    return tables


def _enter(
    stored: StoredArray,
    where: tuple[int, ...],
    shard: int,
    table: npt.NDArray[np.int64],
    about: str,
    size_bytes: int,
) -> None:
    """Take down where the chunks of one shard lie; those outside the array do not count."""
    array = stored.array
    inner = np.stack(np.unravel_index(np.arange(len(table)), array.inner), axis=1)
    places = inner + np.array(where, np.int64) * np.array(array.inner, np.int64)
    counts = (places < np.array(stored.grid)).all(axis=1)
    present = counts & (table[:, 0] >= 0)
    if array.all_stored and (counts & ~present).any():
        raise CorruptError(f"{about} lacks chunk {tuple(places[np.argmax(counts & ~present)].tolist())}")
    offset, length = table[present].T
    wrong = (offset < 0) | (length < 1) | (offset + length > size_bytes)
    if wrong.any():
        chunk = tuple(places[present][np.argmax(wrong)].tolist())
        raise CorruptError(f"{about} has {size_bytes} bytes, and its table puts chunk {chunk} outside of them")
    numbers = np.ravel_multi_index(tuple(places[present].T), stored.grid)
    stored.shard[numbers], stored.offset[numbers], stored.length[numbers] = shard, offset, length
