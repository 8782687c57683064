"""Zarr 3 as the target of a conversion: a group with a sharded array per field.

A shard of the conversion becomes one zarr shard of every array, so all have the same number of samples: the grid of
zarr is regular. A chunk has about the block size; rows that are larger are cut along their longest axes. The metadata
is written last, that of the group after that of its arrays, so nobody sees a group before all of it is there.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from connectors.errors import BadInputError
from dataflow.formats.fields import is_bytes, numpy_dtype, storable_schema
from dataflow.formats.targets.files import refuse
from dataflow.formats.zarr_codecs import ChunkCodec, write_shard_table
from dataflow.formats.zarr_metadata import DATA_TYPES, METADATA_NAME, STORED

if TYPE_CHECKING:
    from connectors.protocols import Buffer
    from dataflow.formats.destination import Destination
    from dataflow.formats.protocol import Part

__all__ = ["ZarrTarget"]

_NAMES = {np.dtype(code): name for name, code in DATA_TYPES.items()}
_CRC: tuple[str, dict[str, Any]] = ("crc32c", {})
_ZSTD = ("zstd", {"level": 3, "checksum": False})
# What a text or binary value is taken to need at least.
_VARYING_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ZarrTarget:
    """How zarr arrays are to be written; see `dataflow.formats.protocol.GridTarget`.

    Attributes:
        block_size_bytes: Size of a chunk before compression.
        compression: `none` or `zstd`, of each chunk.
        chunk_rows: Samples of a chunk; 0 as long as the target does not fit a dataset.
        shard_rows: Samples of a shard, a multiple of that.
    """

    block_size_bytes: int
    compression: str
    chunk_rows: int = 0
    shard_rows: int = 0
    format: ClassVar[str] = "zarr"
    manifest_name: ClassVar[str] = METADATA_NAME

    def __post_init__(self) -> None:
        if self.block_size_bytes < 1:
            raise BadInputError(f"block_size_bytes must be >= 1, got {self.block_size_bytes}")
        if self.compression not in ("none", "zstd"):
            raise BadInputError(f"zarr is written with compression none or zstd, got {self.compression!r}")

    def shard_name(self, number: int) -> str:
        """Return what a shard of all arrays is called in the records of a conversion."""
        return f"shard-{number:05d}"

    def owns(self, name: str) -> bool:
        """Return whether an object of this name is part of such a group, finished or not."""
        return re.fullmatch(r"zarr\.json|shard-\d{5,}\.part|[^/]+/(zarr\.json|c(/\d+)+)", name) is not None

    def stored_schema(self, schema: pa.Schema) -> pa.Schema:
        """Return `schema` with dictionary-encoded fields made plain.

        Raises:
            BadInputError: A field has a type that zarr lacks, or a name that cannot be one of an array.
        """
        plain = storable_schema(schema)
        for field in plain:
            if not re.fullmatch(r"(?!__)(?!\.+$)[^/\0]+", field.name) or field.name == METADATA_NAME:
                raise BadInputError(f"zarr cannot have an array called {field.name!r}: rename the field")
            _Layout.of(field, 1, 1, self.block_size_bytes)
        return plain

    def fit(self, schema: pa.Schema, *, num_samples: int, sample_bytes: float, shard_size_bytes: int) -> ZarrTarget:
        """Return the target with the grid for a dataset."""
        layouts = [_Layout.of(field, 1, 1, self.block_size_bytes) for field in schema]
        fixed = sum(layout.row_bytes for layout in layouts)
        varying = sum(layout.dtype is None for layout in layouts)
        row_bytes = fixed + (max(sample_bytes - fixed, _VARYING_BYTES * varying) if varying else 0)
        chunk_rows = max(1, min(int(self.block_size_bytes // row_bytes), num_samples))
        most = -(-num_samples // chunk_rows)
        chunks = max(1, min(int(shard_size_bytes // (chunk_rows * row_bytes)), most))
        return replace(self, chunk_rows=chunk_rows, shard_rows=chunk_rows * chunks)

    def build(
        self, schema: pa.Schema, batches: Iterable[pa.RecordBatch], first_sample: int
    ) -> tuple[Part, list[Buffer]]:
        """Build all arrays of a dataset of one shard; its objects one behind the other, which only tells their size."""
        given = list(batches)
        rows, size_bytes = sum(batch.num_rows for batch in given), sum(batch.nbytes for batch in given)
        whole = self.fit(schema, num_samples=rows, sample_bytes=size_bytes / max(1, rows), shard_size_bytes=1 << 62)
        part, objects = whole.build_objects(schema, given, 0, first_sample)
        return part, [chunk for chunks in objects.values() for chunk in chunks]

    def build_objects(
        self, schema: pa.Schema, batches: Iterable[pa.RecordBatch], number: int, first_sample: int
    ) -> tuple[Part, dict[str, list[Buffer]]]:
        """Build one shard of every array."""
        layouts = self._layouts(schema)
        shards = [_Shard(layout) for layout in layouts]
        num_samples = 0
        for batch in _in_runs(batches, self.chunk_rows):
            for shard, field in zip(shards, schema, strict=True):
                shard.append(_values(batch.column(field.name), field, first_sample + num_samples))
            num_samples += batch.num_rows
        objects = {
            f"{field.name}/c/{'/'.join(map(str, (number, *(0 for _ in layout.shape))))}": shard.finish()
            for field, layout, shard in zip(schema, layouts, shards, strict=True)
        }
        size_bytes = sum(len(chunk) for chunks in objects.values() for chunk in chunks)
        return {"size_bytes": size_bytes, "rows": num_samples}, objects

    def publish(
        self, destination: Destination, schema: pa.Schema, parts: Mapping[str, Part], lineage: dict[str, Any]
    ) -> None:
        """Write the metadata of the arrays, then that of the group."""
        rows = [part["rows"] for part in parts.values()]
        if any(count != self.shard_rows for count in rows[:-1]):
            raise BadInputError(f"shards of a zarr array must all have {self.shard_rows} samples, got {rows}")
        for field, layout in zip(schema, self._layouts(schema), strict=True):
            metadata = self._describe(field, layout, sum(rows))
            destination.put(f"{field.name}/{METADATA_NAME}", [_encode(metadata)])
        own = {"fields": schema.names, "lineage": lineage}
        group = {"zarr_format": 3, "node_type": "group", "attributes": {"dataflow": own}}
        destination.put(METADATA_NAME, [_encode(group)])

    def _layouts(self, schema: pa.Schema) -> list[_Layout]:
        chunk_rows = max(1, self.chunk_rows)
        packings = (_ZSTD, _CRC) if self.compression == "zstd" else (_CRC,)
        return [
            _Layout.of(field, chunk_rows, max(chunk_rows, self.shard_rows), self.block_size_bytes, packings)
            for field in schema
        ]

    def _describe(self, field: pa.Field, layout: _Layout, num_samples: int) -> dict[str, Any]:
        own: dict[str, Any] = {STORED: True}
        if field.metadata:
            own["metadata"] = {key.decode(): value.decode() for key, value in sorted(field.metadata.items())}
        if layout.dtype is None:
            values: tuple[str, dict[str, Any]] = ("vlen-utf8" if layout.codec.is_text else "vlen-bytes", {})
        else:
            values = ("bytes", {"endian": "little"})
        sharding = {
            "chunk_shape": layout.codec.shape,
            "codecs": [_codec(*one) for one in (values, *layout.codec.packings)],
            "index_codecs": [_codec("bytes", {"endian": "little"}), _codec(*_CRC)],
            "index_location": "end",
        }
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [num_samples, *layout.shape],
            "data_type": layout.type_name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": layout.shard_shape}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": layout.fill,
            "codecs": [_codec("sharding_indexed", sharding)],
            "attributes": {"dataflow": own},
            "storage_transformers": [],
        }


@dataclass(frozen=True, slots=True)
class _Layout:
    """How the array of one field is cut.

    Attributes:
        shape: Of a sample.
        dtype: None for text and bytes.
        shard_shape: Of a shard.
        codec: Of a chunk.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any] | None
    shard_shape: tuple[int, ...]
    codec: ChunkCodec

    @classmethod
    def of(
        cls,
        field: pa.Field,
        chunk_rows: int,
        shard_rows: int,
        chunk_bytes: int,
        packings: tuple[tuple[str, dict[str, Any]], ...] = (),
    ) -> _Layout:
        """Return the layout of a field, or refuse it."""
        dtype, shape = _kind(field)
        part = [*shape]
        while dtype is not None and math.prod(part) * dtype.itemsize > chunk_bytes and max(part) > 1:
            longest = part.index(max(part))
            part[longest] = -(-part[longest] // 2)
        inside = tuple(-(-size // step) * step for size, step in zip(shape, part, strict=True))
        is_text = dtype is None and (pa.types.is_string(field.type) or pa.types.is_large_string(field.type))
        order = tuple(range(len(shape) + 1))
        codec = ChunkCodec((chunk_rows, *part), dtype and dtype.newbyteorder("<"), is_text, order, packings)
        return cls(shape, dtype, (shard_rows, *inside), codec)

    @property
    def row_bytes(self) -> int:
        """Bytes of a sample; 0 for text and bytes."""
        return 0 if self.dtype is None else self.dtype.itemsize * math.prod(self.shape)

    @property
    def type_name(self) -> str:
        """What zarr calls the type of the values."""
        if self.dtype is None:
            return "string" if self.codec.is_text else "variable_length_bytes"
        return _NAMES[self.dtype]

    @property
    def fill(self) -> Any:
        """What chunks are filled up with."""
        if self.dtype is None:
            return ""
        return False if self.dtype == np.bool_ else 0.0 if self.dtype.kind == "f" else 0


class _Shard:
    """The chunks of one shard of one array, as they come.

    Args:
        layout: Of the array.
    """

    def __init__(self, layout: _Layout) -> None:
        self._layout = layout
        rows, chunk = layout.shard_shape, layout.codec.shape
        self._grid = [whole // part for whole, part in zip(rows, chunk, strict=True)]
        self._table = np.full((math.prod(self._grid), 2), -1, np.int64)
        self._chunks: list[Buffer] = []
        self._row = self._end = 0

    def append(self, values: npt.NDArray[Any]) -> None:
        """Add one row of chunks: `(samples, *shape)` with at most as many samples as a chunk."""
        layout = self._layout
        empty: Any = 0 if layout.dtype is not None else "" if layout.codec.is_text else b""
        for place in np.ndindex(*self._grid[1:]):
            box = tuple(
                slice(at * step, (at + 1) * step) for at, step in zip(place, layout.codec.shape[1:], strict=True)
            )
            part = values[(slice(None), *box)]
            if part.shape != layout.codec.shape:
                whole = np.full(layout.codec.shape, empty, part.dtype)
                whole[tuple(slice(size) for size in part.shape)] = part
                part = whole
            data = layout.codec.encode(part)
            number = int(np.ravel_multi_index((self._row, *place), self._grid))
            self._table[number] = self._end, len(data)
            self._chunks.append(data)
            self._end += len(data)
        self._row += 1

    def finish(self) -> list[Buffer]:
        """Return the content of the shard; its table is at the end."""
        return [*self._chunks, write_shard_table(self._table)]


def _in_runs(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """Cut batches anew, into such with `rows` samples each and a last one with fewer."""
    held: list[pa.RecordBatch] = []
    num_held = 0
    for batch in batches:
        left = batch
        while num_held + left.num_rows >= rows:
            held.append(left.slice(0, rows - num_held))
            yield pa.concat_batches(held)
            left, held, num_held = left.slice(rows - num_held), [], 0
        if left.num_rows:
            held.append(left)
            num_held += left.num_rows
    if held:
        yield pa.concat_batches(held)


def _values(column: pa.Array, field: pa.Field, first_sample: int) -> npt.NDArray[Any]:
    """Return the values of a field as an array whose first axis runs over the samples."""
    dtype, shape = _kind(field)
    length = len(column)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    missing = column.null_count
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_fixed_size_list(column.type):
        missing += column.null_count
        column = column.flatten()
    if missing or column.null_count:
        raise BadInputError(f"zarr has no nulls, and field {field.name!r} has some after sample {first_sample}")
    if dtype is None:
        values = np.empty(length, object)
        values[:] = column.to_pylist()
        return values
    return column.to_numpy(zero_copy_only=False).reshape(length, *shape)  # type: ignore[no-any-return]


def _kind(field: pa.Field) -> tuple[np.dtype[Any] | None, tuple[int, ...]]:
    """Return the type of a field's numbers, None for text and bytes, and the shape of a sample."""
    types, kind = pa.types, field.type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_string(kind) or types.is_large_string(kind):
        return None, ()
    if is_bytes(kind):
        return None, ()
    shape: tuple[int, ...] = ()
    if isinstance(kind, pa.FixedShapeTensorType) and _is_in_order(kind):
        shape, kind = tuple(kind.shape), kind.value_type
    elif types.is_fixed_size_list(kind):
        shape, kind = (kind.list_size,), kind.value_type
    if (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)) and 0 not in shape:
        return numpy_dtype(kind), shape
    raise refuse(field, "zarr", "it has numbers, text, bytes, and tensors of one shape with at least one value")


def _is_in_order(kind: pa.FixedShapeTensorType) -> bool:
    """Return whether axes lie as they are counted; Arrow says so of arrays of numpy, too, by a permutation of them."""
    return kind.permutation is None or kind.permutation == list(range(len(kind.shape)))


def _codec(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": name, "configuration": settings} if settings else {"name": name}


def _encode(metadata: Mapping[str, Any]) -> bytes:
    return json.dumps(metadata, indent=2).encode()
