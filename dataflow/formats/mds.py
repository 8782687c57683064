"""MDS, the format of MosaicML Streaming: `index.json` and shards that begin with a table of where their samples lie.

    uint32 samples | uint32 offset of every sample and of the end | JSON | samples
    sample: uint32 size of every column that varies in size | values in the order of the columns

A block is about 1 MiB of samples, so random access does not need whole shards. A compressed shard can only be read from
its front and is one block. Encodings that run code when they are read (`pkl`) and arrays whose shape varies are
refused.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pyarrow as pa

from connectors.errors import BadInputError, CorruptError
from dataflow.formats.fields import image_field, storable_schema, tensor_field
from dataflow.formats.scan import BLOCK_BYTES, BlockTable, Scan, cut_blocks, remembered
from dataflow.formats.unpacking import unpack

if TYPE_CHECKING:
    from connectors.objects import ObjectMeta
    from dataflow.formats.place import Place
    from dataflow.index import Index

__all__ = ["MdsFormat", "MdsSource"]

INDEX_NAME = "index.json"
COMPRESSIONS = {"br": "brotli", "bz2": "bz2", "gz": "gzip", "zstd": "zstd"}
NUMBERS = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


class _File(msgspec.Struct):
    basename: str
    bytes: int


class _Shard(msgspec.Struct):
    """One shard as `index.json` describes it."""

    column_encodings: list[str]
    column_names: list[str]
    column_sizes: list[int | None]
    format: str
    raw_data: _File
    samples: int
    version: int
    compression: str | None = None
    zip_data: _File | None = None

    @property
    def packing(self) -> str | None:
        """How the shard is compressed, as pyarrow calls it."""
        return None if self.zip_data is None else COMPRESSIONS.get((self.compression or "").split(":")[0], "unknown")

    @property
    def file(self) -> _File:
        """What lies in the store."""
        return self.zip_data or self.raw_data


class _Index(msgspec.Struct):
    version: int
    shards: list[_Shard]


@dataclass(frozen=True, slots=True, eq=False)
class MdsSource:
    """One MDS dataset, opened; see `dataflow.formats.protocol.Source`.

    Attributes:
        schema: The columns.
        index: Blocks of whole samples.
        encodings: MDS encoding of every column.
        packing: Compression of every shard.
    """

    schema: pa.Schema
    index: Index
    encodings: tuple[str, ...]
    packing: tuple[str | None, ...]
    format: str = field(default="mds", init=False)

    def decode(self, block: int, data: memoryview) -> pa.RecordBatch:
        """Take the samples of a block apart."""
        blocks, ref = self.index.blocks, self.index.block_ref(block)
        count = blocks.num_samples_in(block)
        packing = self.packing[int(blocks.shard[block])]
        if packing:
            data = unpack(data, ref.uri, packing)
        codecs = [_codec(encoding) for encoding in self.encodings]
        columns: list[list[Any]] = [[] for _ in codecs]
        try:
            if packing:
                data = data[_offsets(data, count)[0] :]
            _take_samples(data, count, codecs, columns)
            arrays = [_array(entry, values) for entry, values in zip(self.schema, columns, strict=True)]
        except OverflowError as error:
            raise BadInputError(
                f"the samples at offset {ref.offset} of {ref.uri} have an integer of more than 64 bits; write text",
                uri=ref.uri,
            ) from error
        except (struct.error, ValueError, pa.ArrowException, UnicodeDecodeError) as error:
            raise CorruptError(
                f"the samples at offset {ref.offset} of {ref.uri} are damaged: {error}", uri=ref.uri
            ) from error
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)


class MdsFormat:
    """MDS shards and their `index.json`."""

    name = "mds"

    def open(self, place: Place) -> MdsSource | None:
        """Read `index.json` and the tables of the shards; None where there is no such index.

        Raises:
            CorruptError: Shards are missing, of the wrong size, or their tables damaged.
            BadInputError: An encoding or compression is not supported.
        """
        found = place.description(INDEX_NAME, _Index)
        if found is None:
            return None
        uri, index = found
        if index.version != 2 or any(shard.format != "mds" for shard in index.shards):
            raise BadInputError(f"{uri} describes no MDS shards of version 2", uri=uri)
        if not index.shards:
            raise BadInputError(
                f"{uri} names no shards, so there are no samples and nothing says their fields", uri=uri
            )
        files = place.expected(((shard.file.basename, shard.file.bytes) for shard in index.shards), uri)
        first = index.shards[0]
        for shard in index.shards:
            if (shard.column_names, shard.column_encodings) != (first.column_names, first.column_encodings):
                raise BadInputError(f"{uri}: shard {shard.file.basename} has other columns than the first", uri=uri)
            if shard.packing == "unknown":
                raise BadInputError(f"{uri}: compression {shard.compression!r} is not supported", uri=uri)
        columns = zip(first.column_names, first.column_encodings, strict=True)
        try:
            schema = storable_schema(pa.schema([_codec(encoding).field(name) for name, encoding in columns]))
        except (ValueError, TypeError, pa.ArrowException) as error:
            raise BadInputError(f"{uri} describes no columns that can be read: {error}", uri=uri) from error
        table, scan = remembered(place, self.name, files, lambda: _scan(place, index.shards, files, schema))
        packing = tuple(shard.packing for shard in index.shards)
        return MdsSource(scan.schema, table, tuple(first.column_encodings), packing)


def _scan(place: Place, shards: Sequence[_Shard], files: Sequence[ObjectMeta], schema: pa.Schema) -> Scan:
    table = BlockTable()
    for number, (shard, meta) in enumerate(zip(shards, files, strict=True)):
        if not shard.samples:
            continue
        if shard.packing:
            table.add(number, 0, meta.size_bytes, shard.samples)
            continue
        uri = place.uri(meta)
        head = place.read(meta, 0, 4 * (shard.samples + 2))
        try:
            offsets = _offsets(head, shard.samples)
        except ValueError as error:
            raise CorruptError(f"the table of {uri} is damaged: {error}", uri=uri) from error
        if offsets[-1] != meta.size_bytes:
            raise CorruptError(f"{uri} has {meta.size_bytes} bytes, its table ends at {offsets[-1]}", uri=uri)
        start = int(offsets[0])
        for offset, length, count in cut_blocks(offsets[1:] - start, BLOCK_BYTES):
            table.add(number, start + offset, length, count)
    return Scan(table.finish(), schema)


def _offsets(head: memoryview, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return where the samples of a shard begin, and where the last ends."""
    if len(head) < 4 * (count + 2):
        raise ValueError("it is cut off")
    if (found := int.from_bytes(head[:4], "little")) != count:
        raise ValueError(f"it counts {found} samples instead of {count}")
    offsets = np.frombuffer(head, "<u4", count + 1, 4).astype(np.int64)
    if offsets[0] < 4 * (count + 2) or (np.diff(offsets) <= 0).any():
        raise ValueError("samples do not follow each other")
    return offsets


@dataclass(frozen=True, slots=True)
class _Codec:
    """How one column is stored: `size_bytes` of a value, None where it varies; how it is declared and read."""

    size_bytes: int | None
    field: Callable[[str], pa.Field]
    read: Callable[[memoryview], Any]


def _codec(encoding: str) -> _Codec:
    kind, _, detail = encoding.partition(":")
    if kind in NUMBERS or kind == "int":
        dtype = np.dtype("int64" if kind == "int" else kind).newbyteorder("<")
        arrow = pa.from_numpy_dtype(dtype.newbyteorder("="))
        return _Codec(dtype.itemsize, _plain(arrow), lambda data: np.frombuffer(data, dtype, 1)[0])
    if kind == "ndarray" and ":" in detail:
        name, _, shape = detail.partition(":")
        dtype, sizes = np.dtype(name).newbyteorder("<"), tuple(map(int, shape.split(",")))
        size_bytes = dtype.itemsize * int(np.prod(sizes))
        return _Codec(
            size_bytes,
            lambda field_name: tensor_field(field_name, name, sizes),
            lambda data: np.frombuffer(data, dtype),
        )
    if kind in {"jpeg", "png"}:
        return _Codec(None, image_field, lambda data: data)
    if kind in _VARYING:
        arrow, read = _VARYING[kind]
        return _Codec(None, _plain(arrow), read)
    raise BadInputError(
        f"the MDS encoding {encoding!r} is not supported; known are jpeg, png, int, {', '.join(NUMBERS)}, "
        f"{', '.join(_VARYING)}, and ndarray with type and shape"
    )


def _text(data: memoryview) -> str:
    return str(data, "utf-8")


_VARYING: dict[str, tuple[pa.DataType, Callable[[memoryview], Any]]] = {
    "bytes": (pa.binary(), lambda data: data),
    "json": (pa.string(), _text),
    "str": (pa.string(), _text),
    "str_decimal": (pa.string(), _text),
    "str_float": (pa.float64(), lambda data: float(_text(data))),
    "str_int": (pa.int64(), lambda data: int(_text(data))),
}


def _plain(kind: pa.DataType) -> Callable[[str], pa.Field]:
    return lambda name: pa.field(name, kind, nullable=False)


def _take_samples(data: memoryview, count: int, codecs: list[_Codec], columns: list[list[Any]]) -> None:
    """Append the values of `count` samples, which `data` must hold and nothing else."""
    position = 0
    for _ in range(count):
        position = _take_sample(data, position, codecs, columns)
    if position != len(data):
        raise ValueError(f"{len(data) - position} bytes are left over")


def _take_sample(data: memoryview, position: int, codecs: list[_Codec], columns: list[list[Any]]) -> int:
    """Append the values of the sample at `position`; return where it ends."""
    varying = sum(codec.size_bytes is None for codec in codecs)
    sizes = iter(struct.unpack_from(f"<{varying}I", data, position))
    position += 4 * varying
    for codec, values in zip(codecs, columns, strict=True):
        size_bytes = next(sizes) if codec.size_bytes is None else codec.size_bytes
        if position + size_bytes > len(data):
            raise ValueError("a value reaches past the end")
        values.append(codec.read(data[position : position + size_bytes]))
        position += size_bytes
    return position


def _array(entry: pa.Field, values: list[Any]) -> pa.Array:
    if isinstance(entry.type, pa.FixedShapeTensorType):
        flat = pa.array(np.concatenate(values))
        storage = pa.FixedSizeListArray.from_arrays(flat, len(flat) // len(values))
        return pa.ExtensionArray.from_storage(entry.type, storage)
    return pa.array(values, entry.type)
