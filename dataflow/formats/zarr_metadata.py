"""What `zarr.json` says of an array, and where its chunks are in the grid. Pure.

https://zarr-specs.readthedocs.io/en/latest/v3/core/index.html and the registry of its extensions,
https://github.com/zarr-developers/zarr-extensions

An array is cut into chunks on a regular grid, and each chunk is an object. With the codec `sharding_indexed` the object
is a shard: chunks of a finer grid, and a table of where each lies. What is called a chunk here is always the smallest
unit, and a shard the object that holds chunks, of which an array without sharding has one each.
"""

from __future__ import annotations

import base64
import binascii
import math
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from connectors.errors import BadInputError, CorruptError

__all__ = ["DATA_TYPES", "METADATA_NAME", "STORED", "ZarrArray", "node_type", "read_array"]

METADATA_NAME = "zarr.json"
DATA_TYPES = {
    "bool": "?",
    **{f"{kind}{8 * size}": f"{kind[0]}{size}" for kind in ("int", "uint") for size in (1, 2, 4, 8)},
    **{f"float{8 * size}": f"f{size}" for size in (2, 4, 8)},
}
TEXT, BINARY = ("string",), ("variable_length_bytes", "bytes")
# In the attributes of arrays of ours: no chunk was left out because it holds nothing but the fill value.
STORED = "every_chunk_is_stored"


class _Named(msgspec.Struct):
    name: str
    configuration: dict[str, Any] = {}


class _Metadata(msgspec.Struct):
    shape: list[int]
    data_type: str | _Named
    chunk_grid: _Named
    chunk_key_encoding: _Named
    codecs: list[_Named | str]
    fill_value: Any = None
    attributes: dict[str, Any] = {}
    storage_transformers: list[Any] = []


class _Sharding(msgspec.Struct):
    chunk_shape: list[int]
    codecs: list[_Named | str]
    index_codecs: list[_Named | str]
    index_location: str = "end"


@dataclass(frozen=True, slots=True)
class ZarrArray:
    """One array.

    Attributes:
        path: Of the array below the dataset, empty for the dataset itself.
        shape: Of the array.
        dtype: Of its numbers; None for text and bytes.
        is_text: Whether values are text, where they are no numbers.
        chunk_shape: Of a chunk.
        shard_shape: Of a shard; equal where chunks are objects of their own.
        codecs: Of a chunk: names and settings, in the order of writing.
        index_codecs: Of the table of a shard; None where chunks are objects of their own.
        index_first: Whether that table is at the beginning of its shard.
        separator: Between the numbers in names of objects.
        prefix: What those names begin with.
        fill: What absent chunks hold.
        all_stored: Whether absent chunks are missing ones.
        attributes: What else the array says.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any] | None
    is_text: bool
    chunk_shape: tuple[int, ...]
    shard_shape: tuple[int, ...]
    codecs: tuple[tuple[str, dict[str, Any]], ...]
    index_codecs: tuple[tuple[str, dict[str, Any]], ...] | None
    index_first: bool
    separator: str
    prefix: str
    fill: Any
    all_stored: bool
    attributes: dict[str, Any]

    @property
    def is_sharded(self) -> bool:
        """Whether several chunks share an object."""
        return self.index_codecs is not None

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of shards along every axis."""
        return tuple(-(-size // step) for size, step in zip(self.shape, self.shard_shape, strict=True))

    @property
    def inner(self) -> tuple[int, ...]:
        """Number of chunks of one shard along every axis."""
        return tuple(whole // part for whole, part in zip(self.shard_shape, self.chunk_shape, strict=True))

    def shard_key(self, place: tuple[int, ...]) -> str:
        """Return the name of the object at a place of `grid`."""
        numbers = self.separator.join(map(str, place))
        key = f"{self.prefix}{self.separator}{numbers}" if self.prefix and numbers else self.prefix + numbers
        return f"{self.path}/{key or '0'}" if self.path else key or "0"


def node_type(data: bytes, *, uri: str) -> str:
    """Return `array` or `group`.

    Raises:
        CorruptError: It is not the metadata of a node.
        BadInputError: It is one of another version of zarr.
    """
    try:
        content = msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CorruptError(f"{uri} is not the metadata of a zarr array or group: {error}", uri=uri) from error
    if content.get("zarr_format") != 3:
        raise BadInputError(f"{uri} has zarr_format {content.get('zarr_format')}, and 3 is what is read", uri=uri)
    kind = content.get("node_type")
    if kind not in ("array", "group"):
        raise CorruptError(f"{uri} has the node_type {kind!r}, neither array nor group", uri=uri)
    return str(kind)


def read_array(data: bytes, path: str, *, uri: str) -> ZarrArray:
    """Read the metadata of an array.

    Raises:
        CorruptError: It is damaged, or contradicts itself.
        BadInputError: It uses something that is not supported; says what.
    """
    try:
        found = msgspec.json.decode(data, type=_Metadata)
        grid = found.chunk_grid
        if grid.name != "regular":
            raise BadInputError(f"{uri} has the chunk grid {grid.name!r}, and `regular` is what is read", uri=uri)
        if found.storage_transformers:
            raise BadInputError(f"{uri} has storage transformers, which are not read", uri=uri)
        shard_shape = msgspec.convert(grid.configuration.get("chunk_shape"), list[int])
        codecs = _codecs(found.codecs)
        sharding = None
        if codecs and codecs[0][0] == "sharding_indexed":
            sharding = msgspec.convert(codecs[0][1], _Sharding)
            if len(codecs) > 1 or any(name == "sharding_indexed" for name, _ in _codecs(sharding.codecs)):
                raise BadInputError(f"{uri} packs shards into shards, or compresses them; write it again", uri=uri)
        dtype, is_text = _data_type(found.data_type, uri)
        separator, prefix = _key_encoding(found.chunk_key_encoding, uri)
        own = found.attributes.get("dataflow")
        array = ZarrArray(
            path=path,
            shape=tuple(found.shape),
            dtype=dtype,
            is_text=is_text,
            chunk_shape=tuple(shard_shape if sharding is None else sharding.chunk_shape),
            shard_shape=tuple(shard_shape),
            codecs=codecs if sharding is None else _codecs(sharding.codecs),
            index_codecs=None if sharding is None else _codecs(sharding.index_codecs),
            index_first=sharding is not None and sharding.index_location == "start",
            separator=separator,
            prefix=prefix,
            fill=_fill(found.fill_value, dtype, is_text=is_text),
            all_stored=isinstance(own, dict) and own.get(STORED) is True,
            attributes=own if isinstance(own, dict) else {},
        )
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, BadInputError):
            raise
        raise CorruptError(f"{uri} is not the metadata of a zarr array: {error}", uri=uri) from error
    _check_shapes(array, uri)
    return array


def _codecs(found: list[_Named | str]) -> tuple[tuple[str, dict[str, Any]], ...]:
    return tuple((codec, {}) if isinstance(codec, str) else (codec.name, codec.configuration) for codec in found)


def _data_type(found: str | _Named, uri: str) -> tuple[np.dtype[Any] | None, bool]:
    name = found if isinstance(found, str) else found.name
    if isinstance(found, str) and name in DATA_TYPES:
        return np.dtype(DATA_TYPES[name]), False
    if name in TEXT or name in BINARY:
        return None, name in TEXT
    raise BadInputError(
        f"{uri} has the data type {name!r}; read are {', '.join([*DATA_TYPES, *TEXT, *BINARY])}", uri=uri
    )


def _key_encoding(found: _Named, uri: str) -> tuple[str, str]:
    """Return separator and prefix of the names of chunks."""
    defaults = {"default": ("/", "c"), "v2": (".", "")}
    if found.name not in defaults:
        raise BadInputError(f"{uri} names its chunks by {found.name!r}; known are default and v2", uri=uri)
    separator, prefix = defaults[found.name]
    return str(found.configuration.get("separator", separator)), prefix


def _fill(value: Any, dtype: np.dtype[Any] | None, *, is_text: bool) -> Any:
    """Return the value of absent chunks. Floats may be written as names, or as their bits in hexadecimal."""
    if dtype is None:
        if is_text:
            return str(value or "")
        try:
            return base64.b64decode(value or "", validate=True) if isinstance(value, str) else bytes(value or [])
        except binascii.Error as error:
            raise ValueError(f"the fill value {value!r} is not base64") from error
    if isinstance(value, str):
        if value.startswith("0x"):
            bits = int(value, 16).to_bytes(dtype.itemsize, "little")
            return np.frombuffer(bits, dtype.newbyteorder("<"))[0].astype(dtype)
        return dtype.type(float(value))  # NaN, Infinity, -Infinity
    return dtype.type(0 if value is None else value)


def _check_shapes(array: ZarrArray, uri: str) -> None:
    shapes = (array.shape, array.shard_shape, array.chunk_shape)
    if len({len(shape) for shape in shapes}) > 1 or min((*array.shape, 0)) < 0:
        raise CorruptError(f"{uri} has a shape and chunks that do not fit: {shapes}", uri=uri)
    if min((*array.chunk_shape, *array.shard_shape, 1)) < 1:
        raise CorruptError(f"{uri} has chunks of no size: {shapes[1:]}", uri=uri)
    if any(whole % part for whole, part in zip(array.shard_shape, array.chunk_shape, strict=True)):
        raise CorruptError(f"{uri} has shards {array.shard_shape} that are no multiple of {array.chunk_shape}", uri=uri)
    if math.prod(array.chunk_shape) * (array.dtype.itemsize if array.dtype else 1) >= 1 << 31:
        raise BadInputError(f"{uri} has chunks of 2 GiB and more; write it again with smaller ones", uri=uri)
