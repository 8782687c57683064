"""Zarr 3: an array, or a group with an array per field.

A sample is a slice along the first axis, or a window of slices.

A block is a run of samples, about 1 MiB of them, and is read in pieces: the chunks of every array that they touch.
Chunks are what caches keep, also where many lie in a shard; the tables of shards are read when the dataset is opened.
What is stored is decoded here, without zarr itself.

Samples that share a chunk should be read together. The array with the largest rows decides where blocks begin; an
array whose chunks are longer than a block has them fetched for each block that touches them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cache.keys import BlockRef
from connectors.errors import BadInputError, CorruptError
from dataflow.formats.fields import tensor_field
from dataflow.formats.pieces import CropPlan
from dataflow.formats.scan import BLOCK_BYTES, listing_fingerprint, shard_table
from dataflow.formats.zarr_chunks import Region, StoredArray, locate_chunks
from dataflow.formats.zarr_metadata import METADATA_NAME, ZarrArray, node_type, read_array
from dataflow.index import Blocks, Index, Pieces

if TYPE_CHECKING:
    from dataflow.formats.place import Place

__all__ = ["ZarrFormat", "ZarrSource"]

SINGLE = "data"  # the field that an array without a group becomes
MAX_ROW_ITEMS = (1 << 31) - 1  # of an Arrow list of fixed size


@dataclass(frozen=True, slots=True, eq=False)
class ZarrSource:
    """One zarr array or group, opened; see `dataflow.formats.protocol.Source`.

    Attributes:
        schema: A field per array.
        index: Blocks of whole samples, in pieces.
        lineage: What a conversion left about the origin of the data.
        arrays: In the order of the schema.
        window: Places along the first axis that make a sample; None for one, whose axis is dropped.
        stride: Places from sample to sample.
    """

    schema: pa.Schema
    index: Index
    lineage: dict[str, Any]
    arrays: tuple[StoredArray, ...]
    window: int | None
    stride: int
    format: str = field(default="zarr", init=False)

    def decode(self, block: int, data: memoryview) -> pa.RecordBatch:
        """Return the samples of a block that has one piece."""
        return self.decode_pieces(block, [data])

    def decode_pieces(self, block: int, pieces: Sequence[memoryview]) -> pa.RecordBatch:
        """Return the samples of a block from all chunks that they touch."""
        first, last = (int(sample) for sample in self.index.blocks.first_sample[block : block + 2])
        left, columns = iter(pieces), []
        for stored, entry in zip(self.arrays, self.schema, strict=True):
            rows = _rows(first, last, self.window, self.stride)
            numbers = range(*stored.chunks_of_rows(*rows)) if last > first else range(0)
            chunks = [(number, next(left) if stored.shard[number] >= 0 else None) for number in numbers]
            values = self._named(block, stored, rows, chunks)
            if self.window is not None:
                values = _windows(values, last - first, self.window, self.stride)
            columns.append(_to_arrow(values, entry.type))
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)

    def select(self, names: Sequence[str]) -> ZarrSource:
        """Return a source of some of the arrays."""
        arrays = tuple(stored for stored in self.arrays if stored.name in names)
        schema = pa.schema([self.schema.field(stored.name) for stored in arrays])
        pieces = _pieces(arrays, self.index.blocks.first_sample, self.window, self.stride)
        return replace(self, schema=schema, arrays=arrays, index=replace(self.index, pieces=pieces))

    def can_crop(self, name: str, shape: Sequence[int]) -> bool:
        """Every field of numbers is read by chunks."""
        return any(stored.name == name and stored.array.dtype is not None for stored in self.arrays)

    def crop(
        self,
        name: str,
        sample: int,
        start: Sequence[int],
        shape: Sequence[int],
        version_of: Callable[[int], str],
    ) -> CropPlan:
        """Return how a box of one field of one sample is read: from the chunks that it touches."""
        stored = next(stored for stored in self.arrays if stored.name == name)
        row = sample * self.stride
        if self.window is None:
            region = Region((row, *start), (1, *shape))
        else:
            region = Region((row + start[0], *start[1:]), tuple(shape))
        numbers = stored.chunks_of(region)
        present = [number for number in numbers if stored.shard[number] >= 0]

        def assemble(pieces: Sequence[memoryview], out: npt.NDArray[Any]) -> None:
            found = dict(zip(present, pieces, strict=True))
            box = out[np.newaxis] if self.window is None else out
            stored.assemble(region, [(number, found.get(number)) for number in numbers], box)

        return CropPlan([self._ref(stored, number) for number in present], assemble)

    def _ref(self, stored: StoredArray, number: int) -> BlockRef:
        shard = int(stored.shard[number])
        version = self.index.shards.versions[shard].as_py()
        return BlockRef(self.index.shard_uri(shard), version, int(stored.offset[number]), int(stored.length[number]))

    def _named(
        self, block: int, stored: StoredArray, rows: tuple[int, int], chunks: Sequence[tuple[int, memoryview | None]]
    ) -> npt.NDArray[Any]:
        """Return the rows of an array."""
        try:
            return _read_rows(stored, rows, chunks)
        except CorruptError as error:
            uris = {self.index.shard_uri(int(stored.shard[number])) for number, data in chunks if data is not None}
            where = uris.pop() if len(uris) == 1 else self.index.url
            raise CorruptError(f"block {block} of {where}: {error}", uri=where) from error


@dataclass(frozen=True, slots=True)
class ZarrFormat:
    """Arrays and groups of zarr 3.

    Attributes:
        arrays: Those to read, by their paths; empty for all.
        window: Places along the first axis that make a sample; None for one, whose axis is dropped.
        stride: Places from sample to sample; as large as the window by default.

    Raises:
        BadInputError: A value is out of range.
    """

    arrays: tuple[str, ...] = ()
    window: int | None = None
    stride: int | None = None
    name: str = field(default="zarr", init=False)

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise BadInputError(f"the window of a zarr array must be >= 1, got {self.window}")
        if self.stride is not None and (self.window is None or self.stride < 1):
            raise BadInputError(f"the stride needs a window, and must be >= 1, got {self.stride}")

    def with_options(self, options: Mapping[str, str]) -> ZarrFormat:
        """Return the format with settings as they are written: `window=16`, `stride=8`, `arrays=a+b`.

        Raises:
            BadInputError: There is no such setting, or it has another value.
        """
        if unknown := set(options) - {"arrays", "window", "stride"}:
            raise BadInputError(f"zarr has no option {min(unknown)!r}; it has arrays, window and stride")
        try:
            window, stride = (int(options[name]) if name in options else None for name in ("window", "stride"))
        except ValueError as error:
            raise BadInputError(f"window and stride of zarr are numbers: {error}") from None
        return ZarrFormat(tuple(filter(None, options.get("arrays", "").split("+"))), window, stride)

    def open(self, place: Place) -> ZarrSource | None:
        """Read the metadata and the tables of shards; None where there is no `zarr.json`.

        Raises:
            CorruptError: Metadata or an object is damaged, or an object is missing.
            BadInputError: The arrays are no samples, or stored in a way that is not read.
        """
        files = {meta.key: meta for meta in place.files}
        if METADATA_NAME not in files:
            return None
        uri = place.uri(files[METADATA_NAME])
        data = place.reader.read_object(uri).data
        is_group = node_type(data, uri=uri) == "group"
        metadata = self._metadata(place, files) if is_group else {SINGLE: read_array(data, "", uri=uri)}
        own = _attributes(data) if is_group else {}
        arrays = self._chosen(metadata, own.get("fields"), place.url)
        shards: list[Any] = []
        stored = tuple(locate_chunks(place, name, array, files, shards) for name, array in arrays.items())
        schema = pa.schema([_field(one, self.window) for one in stored])
        stride = 1 if self.window is None else self.stride or self.window
        first_sample = _first_samples(stored, self.window, stride)
        pieces = _pieces(stored, first_sample, self.window, stride)
        # Blocks of which nothing is stored are named by the object before them, or by the metadata.
        table = shard_table(shards or [files[METADATA_NAME]])
        num_objects = int(stored[0].shard.max(initial=0)) + 1
        blocks = _blocks(pieces, first_sample, num_objects)
        index = Index(place.root, listing_fingerprint(table, blocks, schema), table, blocks, pieces)
        index.check()
        lineage = own.get("lineage")
        return ZarrSource(schema, index, lineage if isinstance(lineage, dict) else {}, stored, self.window, stride)

    def _metadata(self, place: Place, files: Mapping[str, Any]) -> dict[str, ZarrArray]:
        """Return the arrays of a group and of the groups in it."""
        metas = [meta for key, meta in files.items() if key.endswith(f"/{METADATA_NAME}")]
        refs = [BlockRef(place.uri(meta), meta.version, 0, meta.size_bytes) for meta in metas if meta.size_bytes]
        if len(refs) < len(metas):
            empty = next(place.uri(meta) for meta in metas if not meta.size_bytes)
            raise CorruptError(f"{empty} is empty", uri=empty)
        arrays = {}
        for meta, ref, data in zip(metas, refs, place.reader.read_blocks(refs), strict=True):
            path, content = meta.key.removesuffix(f"/{METADATA_NAME}"), bytes(data.view)
            wanted = path in self.arrays or not self.arrays
            if node_type(content, uri=ref.uri) == "array" and wanted:
                arrays[path] = read_array(content, path, uri=ref.uri)
        return arrays

    def _chosen(self, found: dict[str, ZarrArray], order: Any, url: str) -> dict[str, ZarrArray]:
        """Return the arrays in order; all have samples, and equally many."""
        written = [name for name in order if isinstance(name, str)] if isinstance(order, list) else []
        names = list(self.arrays) or [*written, *sorted(set(found) - set(written))]
        if missing := [name for name in names if name not in found]:
            kind = BadInputError if self.arrays else CorruptError
            raise kind(f"{url} has no array {missing[0]!r}; there are {', '.join(sorted(found))}", uri=url)
        if not names:
            raise BadInputError(f"{url} is a zarr group without arrays", uri=url)
        lengths = {name: found[name].shape[0] if found[name].shape else None for name in names}
        if len(set(lengths.values())) > 1 or None in lengths.values():
            told = ", ".join(f"{name}: {length}" for name, length in lengths.items())
            raise BadInputError(
                f"the arrays of {url} have different lengths along their first axis ({told}), and samples need one of "
                f'each: choose by format="zarr:arrays={names[0]}+..."',
                uri=url,
            )
        return {name: found[name] for name in names}


def _attributes(data: bytes) -> dict[str, Any]:
    """Return what a conversion of ours left in the attributes of a group."""
    own = msgspec.json.decode(data, type=dict[str, Any]).get("attributes", {}).get("dataflow", {})
    return own if isinstance(own, dict) else {}


def _field(stored: StoredArray, window: int | None) -> pa.Field:
    """Return the field that an array is."""
    array = stored.array
    shape = array.shape[1:] if window is None else (window, *array.shape[1:])
    found = array.attributes.get("metadata")
    metadata = found if isinstance(found, dict) else None
    if array.dtype is None:
        kind = pa.string() if array.is_text else pa.binary()
        for _ in shape:
            kind = pa.list_(kind)
        return pa.field(stored.name, kind, nullable=False, metadata=metadata)
    if not shape:
        return pa.field(stored.name, pa.from_numpy_dtype(array.dtype), nullable=False, metadata=metadata)
    if not 0 < math.prod(shape) <= MAX_ROW_ITEMS:
        raise BadInputError(
            f"samples of the array {stored.name!r} would have the shape {shape}; they need 1 to {MAX_ROW_ITEMS} values"
        )
    return tensor_field(stored.name, array.dtype, shape)


def _first_samples(arrays: Sequence[StoredArray], window: int | None, stride: int) -> npt.NDArray[np.int64]:
    """Cut samples into blocks of about `BLOCK_BYTES`, at the chunks of the array with the largest rows."""
    num_rows = arrays[0].array.shape[0]
    row_bytes = max(1.0, sum(stored.row_bytes for stored in arrays))
    step = max(arrays, key=lambda stored: stored.row_bytes).array.chunk_shape[0]
    rows = step * max(1, int(BLOCK_BYTES // (step * row_bytes)))
    if window is None:
        num_samples, samples = num_rows, rows
    else:
        num_samples = max(0, (num_rows - window) // stride + 1)
        # Windows that overlap are unpacked to more than is stored.
        samples = max(1, min(rows // stride, int(BLOCK_BYTES // (window * row_bytes))))
    return np.append(np.arange(0, num_samples, samples, dtype=np.int64), num_samples)


def _rows(first: Any, last: Any, window: int | None, stride: int) -> tuple[Any, Any]:
    """Return the first row of samples `[first, last)` and the one after their last; numbers or arrays."""
    return (first, last) if window is None else (first * stride, (last - 1) * stride + window)


def _pieces(
    arrays: Sequence[StoredArray], first_sample: npt.NDArray[np.int64], window: int | None, stride: int
) -> Pieces:
    """Return the stored chunks that every block touches: array by array, in the order of the grid."""
    blocks: list[npt.NDArray[np.int64]] = []
    columns: list[tuple[npt.NDArray[Any], ...]] = []
    num_blocks = len(first_sample) - 1
    if not arrays:
        nothing = np.zeros(0, np.int64)
        return Pieces(np.zeros(num_blocks + 1, np.int64), nothing.astype(np.int32), nothing, nothing)
    for stored in arrays:
        low, high = stored.chunks_of_rows(*_rows(first_sample[:-1], first_sample[1:], window, stride))
        counts = high - low
        ends = np.cumsum(counts)
        numbers = np.arange(ends[-1] if num_blocks else 0) + np.repeat(low - ends + counts, counts)
        present = stored.shard[numbers] >= 0
        numbers = numbers[present]
        blocks.append(np.repeat(np.arange(num_blocks), counts)[present])
        columns.append((stored.shard[numbers], stored.offset[numbers], stored.length[numbers]))
    block = np.concatenate(blocks)
    order = np.argsort(block, kind="stable")
    shard, offset, length = (np.concatenate(parts)[order] for parts in zip(*columns, strict=True))
    first = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(block, minlength=num_blocks))])
    return Pieces(first, shard, offset, length)


def _blocks(pieces: Pieces, first_sample: npt.NDArray[np.int64], num_objects: int) -> Blocks:
    """Return the blocks, each named by the object of the first array that it begins in.

    Args:
        pieces: Of every block.
        first_sample: Of every block, and the number of samples.
        num_objects: Those of the first array, which come first among the shards.
    """
    begins = pieces.first[:-1]
    has_any = pieces.first[1:] > begins
    shard = np.zeros(len(begins), np.int32)
    shard[has_any] = pieces.shard[begins[has_any]]
    shard[shard >= num_objects] = 0
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(pieces.length)])
    length = np.maximum(1, ends[pieces.first[1:]] - ends[begins])
    return Blocks(np.maximum.accumulate(shard), np.zeros(len(begins), np.int64), length, first_sample)


def _read_rows(
    stored: StoredArray, rows: tuple[int, int], chunks: Sequence[tuple[int, memoryview | None]]
) -> npt.NDArray[Any]:
    """Return some rows of an array; views of the chunk where there is one, which holds whole rows."""
    array, (first, last) = stored.array, rows
    if len(chunks) == 1 and array.chunk_shape[1:] == array.shape[1:]:
        number, data = chunks[0]
        begin = number * array.chunk_shape[0]
        if data is not None:
            return stored.values(number, data)[first - begin : last - begin]
    region = Region((first, *(0 for _ in array.shape[1:])), (last - first, *array.shape[1:]))
    out = np.empty(region.shape, object if array.dtype is None else array.dtype)
    stored.assemble(region, chunks, out)
    return out


def _windows(values: npt.NDArray[Any], count: int, window: int, stride: int) -> npt.NDArray[Any]:
    """Return `count` windows over the first axis as a new first axis."""
    views = np.lib.stride_tricks.sliding_window_view(values, window, axis=0)[::stride][:count]
    return np.moveaxis(views, -1, 1)


def _to_arrow(values: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    if isinstance(kind, pa.FixedShapeTensorType):
        flat = np.ascontiguousarray(values).reshape(-1)
        storage = pa.FixedSizeListArray.from_arrays(pa.array(flat), kind.storage_type.list_size)
        return pa.ExtensionArray.from_storage(kind, storage)
    return pa.array(values.tolist() if values.dtype == object else np.ascontiguousarray(values), kind)
