"""LitData chunks: `index.json`, and chunk files with tables of where their items lie (`litdata_chunks`).

    item: uint32 size of every leaf | leaves in the order of `data_format`

Mappings of plain values have chunks of another kind (`litdata_rows`).

A block is about 1 MiB of items as they are stored; a chunk that is compressed as a whole is one. Items are mappings,
tuples, lists or single leaves; mappings inside mappings, encodings that run code when they are read (`pickle`),
encrypted chunks and token streams (whose samples only their reader cuts) are refused. Arrays of two and more axes must
all have the shape of the first.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from connectors.errors import BadInputError, CorruptError
from dataflow.formats.fields import media_field, tensor_field, value_dtype
from dataflow.formats.litdata_chunks import Wrap, find_blocks, unwrap, wrap_of
from dataflow.formats.litdata_rows import LitdataRowsSource, find_rows, is_of_rows, rows_source, scan_rows
from dataflow.formats.scan import BLOCK_BYTES, BlockTable, Scan, remembered

if TYPE_CHECKING:
    from connectors.objects import ObjectMeta
    from dataflow.formats.place import Place
    from dataflow.index import Index

__all__ = ["LitdataFormat", "LitdataSource"]

INDEX_NAME = "index.json"
# litdata.constants: numbers of types in the headers of arrays and in the names of encodings.
NUMPY = dict(enumerate(("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"))) | {13: "?"}
TORCH = {0: "f4", 1: "f4", 2: "f8", 3: "f8", 8: "f2", 9: "f2", 11: "u1", 12: "i1"} | {
    13: "i2", 14: "i2", 15: "i4", 16: "i4", 17: "i8", 18: "i8", 19: "?", 20: "u2"
}  # fmt: skip


class _Chunk(msgspec.Struct):
    chunk_bytes: int
    chunk_size: int
    filename: str
    dim: int | None = None


class _Config(msgspec.Struct):
    data_format: list[str]
    data_spec: str
    compression: str | None = None
    compression_level: str | None = None
    encryption: Any = None
    types: Any = None


class _Index(msgspec.Struct):
    chunks: list[_Chunk]
    config: _Config


@dataclass(frozen=True, slots=True, eq=False)
class LitdataSource:
    """One set of chunks, opened; see `dataflow.formats.protocol.Source`.

    Attributes:
        schema: A field per leaf.
        index: Blocks of whole items.
        encodings: Of every leaf.
        wrap: How the chunks are compressed.
    """

    schema: pa.Schema
    index: Index
    encodings: tuple[str, ...]
    wrap: Wrap
    format: str = field(default="litdata", init=False)

    def decode(self, block: int, data: memoryview) -> pa.RecordBatch:
        """Take the items of a block apart."""
        ref = self.index.block_ref(block)
        count = self.index.blocks.num_samples_in(block)
        data = unwrap(data, count, self.wrap, ref.uri)
        columns: list[list[Any]] = [[] for _ in self.encodings]
        try:
            _take_items(data, count, columns)
            arrays = [
                _array(entry, _LEAVES[encoding.partition(":")[0]].read, values)
                for entry, encoding, values in zip(self.schema, self.encodings, columns, strict=True)
            ]
        except (struct.error, LookupError, ValueError, pa.ArrowException) as error:  # no such number of a type
            raise CorruptError(
                f"the items at offset {ref.offset} of {ref.uri} are damaged: {error}", uri=ref.uri
            ) from error
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)


class LitdataFormat:
    """Chunk files and their `index.json`."""

    name = "litdata"

    def open(self, place: Place) -> LitdataSource | LitdataRowsSource | None:
        """Read `index.json` and the tables of the chunks; None where there is no such index.

        Raises:
            CorruptError: Chunks are missing, of the wrong size, or their tables damaged.
            BadInputError: An encoding or layout is not supported.
        """
        found = place.description(INDEX_NAME, _Index)
        if found is None:
            return None
        uri, index = found
        config = index.config
        if config.encryption or any(chunk.dim is not None for chunk in index.chunks):
            raise BadInputError(
                f"{uri} describes encrypted chunks, or streams of tokens; write them plain, as items", uri=uri
            )
        wrap = wrap_of(config.compression, config.compression_level)
        # Of a chunk that is compressed as a whole, the size is told before that.
        sizes = ((chunk.filename, None if wrap == "chunk" else chunk.chunk_bytes) for chunk in index.chunks)
        files = place.expected(sizes, uri)

        def scan() -> Scan:
            if config.types is not None and files and find_rows(place, files[0]) is not None:
                return scan_rows(place, [chunk.chunk_size for chunk in index.chunks], files)
            return _scan(place, index.chunks, files, config, _wrap_of_items(config, wrap, uri), uri)

        table, seen = remembered(place, self.name, files, scan)
        if is_of_rows(seen):
            return rows_source(table, seen)
        return LitdataSource(seen.schema, table, tuple(config.data_format), _wrap_of_items(config, wrap, uri))


def _wrap_of_items(config: _Config, wrap: Wrap | None, uri: str) -> Wrap:
    """Return how chunks of items are compressed, where that and what is in them is supported."""
    if wrap is None:
        raise BadInputError(
            f"{uri}: compression {config.compression!r} by {config.compression_level!r} is not supported", uri=uri
        )
    for encoding in config.data_format:
        if encoding.partition(":")[0] not in _LEAVES:
            raise BadInputError(f"{uri}: the encoding {encoding!r} is not supported; known are {', '.join(_LEAVES)}")
    return wrap


def _names(spec: str, count: int, uri: str) -> list[str]:
    """Return the names of the leaves from a serialised tree of `torch.utils._pytree`."""
    try:
        _, tree = json.loads(spec)
        kind, children = tree["type"], tree["children_spec"]
        nested = any(child["type"] is not None for child in children)
        names = json.loads(tree["context"]) if kind == "builtins.dict" else [str(place) for place in range(count)]
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptError(f"{uri} has a data_spec that cannot be read: {error}", uri=uri) from error
    if nested or kind not in (None, "builtins.dict", "builtins.list", "builtins.tuple"):
        raise BadInputError(f"{uri} describes items of another layout than one mapping, tuple or list", uri=uri)
    if kind is None:
        names = ["data"]
    if len(names) != count:
        raise CorruptError(f"{uri} names {len(names)} leaves and has {count} encodings", uri=uri)
    return [str(name) for name in names]


def _scan(
    place: Place,
    chunks: Sequence[_Chunk],
    files: Sequence[ObjectMeta],
    config: _Config,
    wrap: Wrap,
    described_by: str,
) -> Scan:
    encodings = config.data_format
    names = _names(config.data_spec, len(encodings), described_by)
    table, schema = BlockTable(), None
    for shard, (chunk, meta) in enumerate(zip(chunks, files, strict=True)):
        uri = place.uri(meta)
        for offset, length, number in find_blocks(place, meta, chunk.chunk_size, wrap, BLOCK_BYTES):
            table.add(shard, offset, length, number)
            if schema is None:
                items = unwrap(place.read(meta, offset, length), number, wrap, uri)
                schema = _schema(items, names, encodings, uri)
    return Scan(table.finish(), pa.schema([]) if schema is None else schema)


def _schema(items: memoryview, names: list[str], encodings: list[str], uri: str) -> pa.Schema:
    """Return the fields: shapes are those of the first item."""
    columns: list[list[Any]] = [[] for _ in encodings]
    try:
        _take_item(items, 0, columns)
        fields = []
        for name, encoding, (value,) in zip(names, encodings, columns, strict=True):
            kind, _, detail = encoding.partition(":")
            fields.append(_LEAVES[kind].field(name, value, detail))
    except (struct.error, ValueError, IndexError, KeyError) as error:
        raise CorruptError(f"the first item of {uri} is damaged, or of an unknown type: {error}", uri=uri) from error
    return pa.schema(fields)


def _take_items(data: memoryview, count: int, columns: list[list[Any]]) -> None:
    """Append the leaves of `count` items, which `data` must hold and nothing else."""
    position = 0
    for _ in range(count):
        position = _take_item(data, position, columns)
    if position != len(data):
        raise ValueError(f"{len(data) - position} bytes are left over")


def _take_item(data: memoryview, position: int, columns: list[list[Any]]) -> int:
    """Append the leaves of the item at `position`; return where it ends."""
    sizes = struct.unpack_from(f"<{len(columns)}I", data, position)
    position += 4 * len(columns)
    for size_bytes, values in zip(sizes, columns, strict=True):
        if position + size_bytes > len(data):
            raise ValueError("a leaf reaches past the end")
        values.append(data[position : position + size_bytes])
        position += size_bytes
    return position


@dataclass(frozen=True, slots=True)
class _Leaf:
    """One encoding: `field` declares it from its name, a value and what follows the colon; `read` gives a value."""

    field: Callable[[str, memoryview, str], pa.Field]
    read: Callable[[memoryview, pa.DataType], Any]


def _plain(kind: pa.DataType) -> Callable[[str, memoryview, str], pa.Field]:
    return lambda name, _value, _detail: pa.field(name, kind, nullable=False)


def _media(kind: str) -> _Leaf:
    return _Leaf(lambda name, _value, _detail: media_field(name, kind), _bytes)


def _number(code: str) -> Callable[[memoryview, pa.DataType], Any]:
    def read(data: memoryview, _kind: pa.DataType) -> Any:
        return struct.unpack(code, data)[0]

    return read


def _bytes(data: memoryview, _kind: pa.DataType) -> memoryview:
    return data


def _text(data: memoryview, _kind: pa.DataType) -> str:
    return str(data, "utf-8")


def _numpy_dtype(number: int) -> np.dtype[Any]:
    return np.dtype(NUMPY[number])


def _torch_dtype(number: int) -> np.dtype[Any]:
    return np.dtype(TORCH[number])


def _numpy_header(data: memoryview) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    number, rank = struct.unpack_from("<II", data)
    return _numpy_dtype(number), struct.unpack_from(f"<{rank}I", data, 8), 8 + 4 * rank


def _torch_header(data: memoryview) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    number, rank = struct.unpack_from(">II", data)  # the other byte order, indeed
    return _torch_dtype(number), struct.unpack_from(f">{rank}I", data, 8), 8 + 4 * rank


def _shaped(header: Callable[[memoryview], tuple[np.dtype[Any], tuple[int, ...], int]]) -> _Leaf:
    def declare(name: str, value: memoryview, _detail: str) -> pa.Field:
        dtype, shape, _ = header(value)
        return tensor_field(name, dtype, shape)

    def read(data: memoryview, kind: Any) -> npt.NDArray[Any]:
        dtype, shape, start = header(data)
        if list(shape) != list(kind.shape) or dtype != value_dtype(kind):
            raise ValueError(f"an array is {dtype}{list(shape)}, the first one has the shape {list(kind.shape)}")
        return np.frombuffer(data, dtype, offset=start)

    return _Leaf(declare, read)


def _flat(dtype_of: Callable[[int], np.dtype[Any]]) -> _Leaf:
    def declare(name: str, _value: memoryview, detail: str) -> pa.Field:
        return pa.field(name, pa.list_(pa.from_numpy_dtype(dtype_of(int(detail)))), nullable=False)

    def read(data: memoryview, kind: Any) -> npt.NDArray[Any]:
        return np.frombuffer(data, value_dtype(kind))

    return _Leaf(declare, read)


_LEAVES: dict[str, _Leaf] = {
    "audio": _media("audio"),
    "bool": _Leaf(_plain(pa.bool_()), _number("<?")),
    "bytes": _Leaf(_plain(pa.binary()), _bytes),
    "file": _Leaf(_plain(pa.binary()), _bytes),
    "float": _Leaf(_plain(pa.float64()), _number("<d")),
    "image": _media("image"),
    "int": _Leaf(_plain(pa.int64()), _number("<q")),
    "jpeg": _media("image"),
    "no_header_numpy": _flat(_numpy_dtype),
    "no_header_tensor": _flat(_torch_dtype),
    "numpy": _shaped(_numpy_header),
    "str": _Leaf(_plain(pa.string()), _text),
    "tensor": _shaped(_torch_header),
    "text": _Leaf(_plain(pa.string()), _text),
    "video": _media("video"),
}


def _array(entry: pa.Field, read: Callable[[memoryview, pa.DataType], Any], leaves: list[memoryview]) -> pa.Array:
    values = [read(leaf, entry.type) for leaf in leaves]
    if isinstance(entry.type, pa.FixedShapeTensorType):
        storage = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(values)), entry.type.storage_type.list_size)
        return pa.ExtensionArray.from_storage(entry.type, storage)
    return pa.array(values, entry.type)
