"""From the bytes of a chunk to its values and back: the codecs of zarr that are written down. Pure.

values -> [transpose] -> bytes | vlen-utf8 | vlen-bytes -> [gzip, zstd, blosc, crc32c ...] -> stored
"""

from __future__ import annotations

import gzip
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
from crc32c import crc32c

from connectors.errors import BadInputError
from dataflow.formats.unpacking import STEP_BYTES, decompress

if TYPE_CHECKING:
    import numpy.typing as npt

    from dataflow.formats.zarr_metadata import ZarrArray

__all__ = ["ChunkCodec", "chunk_codec", "read_shard_table", "shard_table_size", "write_shard_table"]

Codecs: TypeAlias = Sequence[tuple[str, dict[str, Any]]]

ABSENT = (1 << 64) - 1
MAX_CHUNK_BYTES = 1 << 30  # of text and bytes, unpacked
_CRC_BYTES = 4
_BLOSC_HEADER_BYTES = 16


@dataclass(frozen=True, slots=True)
class ChunkCodec:
    """How the chunks of one array are stored.

    Attributes:
        shape: Of a chunk.
        dtype: As stored, with its byte order; None for text and bytes.
        is_text: Whether values are text, where they are no numbers.
        order: Axes in the order in which they are stored.
        packings: What happens to the bytes, in the order of writing.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any] | None
    is_text: bool
    order: tuple[int, ...]
    packings: tuple[tuple[str, dict[str, Any]], ...]

    @property
    def size_bytes(self) -> int | None:
        """Bytes of every chunk before compression; None where they differ."""
        return None if self.dtype is None else math.prod(self.shape) * self.dtype.itemsize

    def decode(self, data: memoryview) -> npt.NDArray[Any]:
        """Return the values of a chunk, of `shape`; a view of `data` where that is possible.

        Raises:
            ValueError: Damaged.
        """
        for name, settings in reversed(self.packings):
            data = _READ[name](data, settings, self.size_bytes)
        if self.dtype is None:
            return _read_varying(data, math.prod(self.shape), is_text=self.is_text).reshape(self.shape)
        if len(data) != self.size_bytes:
            raise ValueError(f"it has {len(data)} bytes instead of {self.size_bytes}")
        stored = [self.shape[axis] for axis in self.order]
        values = np.frombuffer(data, self.dtype).reshape(stored).transpose(np.argsort(self.order))
        return values.astype(self.dtype.newbyteorder("="), copy=False)

    def encode(self, values: npt.NDArray[Any]) -> bytes:
        """Return the bytes of a chunk. Those of equal values are equal."""
        if self.dtype is None:
            data = _write_varying(values.reshape(-1).tolist())
        else:
            data = np.ascontiguousarray(values.transpose(self.order).astype(self.dtype, copy=False)).tobytes()
        for name, settings in self.packings:
            data = _WRITTEN[name](data, settings)
        return data


def chunk_codec(array: ZarrArray, *, uri: str) -> ChunkCodec:
    """Return how the chunks of an array are stored.

    Raises:
        BadInputError: By a codec that is not supported; names it.
    """
    axes = tuple(range(len(array.shape)))
    order, dtype, packings = axes, array.dtype, []
    serialised = False
    for name, settings in array.codecs:
        if name == "transpose" and not serialised:
            chosen = settings.get("order")
            if not isinstance(chosen, list) or sorted(chosen) != list(axes):
                raise BadInputError(f"{uri} transposes its axes by {chosen!r}", uri=uri)
            order = tuple(order[axis] for axis in chosen)
        elif name == "bytes" and dtype is not None and not serialised:
            serialised = True
            dtype = dtype.newbyteorder(">" if settings.get("endian") == "big" else "<")
        elif name in ("vlen-utf8", "vlen-bytes") and dtype is None and not serialised:
            serialised = True
        elif serialised and name in _READ:
            packings.append((name, settings))
        else:
            raise BadInputError(
                f"{uri} has the codec {name!r} where it is not read; known are bytes, transpose, vlen-utf8, "
                f"vlen-bytes, {', '.join(_READ)} and sharding_indexed",
                uri=uri,
            )
    if not serialised:
        raise BadInputError(f"{uri} has no codec that says how values become bytes", uri=uri)
    return ChunkCodec(array.chunk_shape, dtype, array.is_text, order, tuple(packings))


def shard_table_size(num_chunks: int, codecs: Codecs) -> int:
    """Return the bytes of the table of a shard.

    Raises:
        BadInputError: The size is not known in advance, or the codecs are not supported.
    """
    names = [name for name, _ in codecs]
    if names[:1] != ["bytes"] or any(name != "crc32c" for name in names[1:]):
        raise BadInputError(f"the table of a shard is stored by {names}; read are bytes and crc32c")
    return 16 * num_chunks + _CRC_BYTES * (len(names) - 1)


def read_shard_table(data: memoryview, codecs: Codecs) -> npt.NDArray[np.int64]:
    """Return offset and length of every chunk of a shard, (chunks, 2); both are -1 where it is absent.

    Raises:
        ValueError: Damaged.
    """
    for name, settings in reversed(codecs[1:]):
        data = _READ[name](data, settings, None)
    byte_order = ">" if codecs[0][1].get("endian") == "big" else "<"
    table = np.frombuffer(data, f"{byte_order}u8").reshape(-1, 2)
    absent = (table == ABSENT).all(axis=1)
    if (table[~absent] >> 62).any():
        raise ValueError("it has offsets that no file has")
    return table.astype(np.int64)


def write_shard_table(table: npt.NDArray[np.int64]) -> bytes:
    """Return the table of a shard as `bytes` and `crc32c` store it."""
    return _add_crc(table.astype("<u8").tobytes(), {})


def _read_varying(data: memoryview, count: int, *, is_text: bool) -> npt.NDArray[Any]:
    values = np.empty(count, object)
    if len(data) < 4 or int.from_bytes(data[:4], "little") != count:
        raise ValueError(f"it does not hold {count} values")
    position = 4
    for place in range(count):
        end = position + 4 + int.from_bytes(data[position : position + 4], "little")
        if end > len(data):
            raise ValueError("a value reaches past the end")
        part = data[position + 4 : end]
        values[place] = str(part, "utf-8") if is_text else bytes(part)
        position = end
    if position != len(data):
        raise ValueError(f"{len(data) - position} bytes are left over")
    return values


def _write_varying(values: Sequence[str | bytes]) -> bytes:
    parts = [len(values).to_bytes(4, "little")]
    for value in values:
        data = value.encode() if isinstance(value, str) else value
        parts += [len(data).to_bytes(4, "little"), data]
    return b"".join(parts)


def _check_crc(data: memoryview, _settings: dict[str, Any], _size_bytes: int | None) -> memoryview:
    content, stored = data[:-_CRC_BYTES], data[-_CRC_BYTES:]
    if len(stored) < _CRC_BYTES or crc32c(content) != int.from_bytes(stored, "little"):
        raise ValueError("it does not match its checksum")
    return content


def _add_crc(data: bytes, _settings: dict[str, Any]) -> bytes:
    return data + struct.pack("<I", crc32c(data))


def _gzip(data: bytes, settings: dict[str, Any]) -> bytes:
    return gzip.compress(data, settings.get("level", 5), mtime=0)


def _unpacked(compression: str) -> Callable[[memoryview, dict[str, Any], int | None], memoryview]:
    def unpack(data: memoryview, _settings: dict[str, Any], size_bytes: int | None) -> memoryview:
        # One byte more than there should be shows what is too long, and a bomb is not unpacked.
        most_bytes = 1 + (MAX_CHUNK_BYTES if size_bytes is None else size_bytes)
        step_bytes = STEP_BYTES if size_bytes is None else most_bytes
        try:
            content = decompress(data, compression, most_bytes, step_bytes=step_bytes)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"it cannot be unpacked: {error}") from error
        if size_bytes is None and len(content) > MAX_CHUNK_BYTES:
            raise ValueError(f"it unpacks to more than {MAX_CHUNK_BYTES} bytes")
        return content

    return unpack


def _zstd(data: bytes, settings: dict[str, Any]) -> bytes:
    level = settings.get("level") or 3  # 0 is the default of the library
    return pa.Codec("zstd", compression_level=level).compress(data, asbytes=True)  # type: ignore[no-any-return]


def _unblosc(data: memoryview, _settings: dict[str, Any], size_bytes: int | None) -> memoryview:
    # The library believes the header. https://github.com/Blosc/c-blosc/blob/main/README_CHUNK_FORMAT.rst
    unpacked, stored = (int.from_bytes(data[place : place + 4], "little") for place in (4, 12))
    if len(data) < _BLOSC_HEADER_BYTES or stored != len(data):
        raise ValueError(f"it has {len(data)} bytes, its header says {stored}")
    if unpacked > (MAX_CHUNK_BYTES if size_bytes is None else size_bytes):
        raise ValueError(f"it would unpack to {unpacked} bytes")
    blosc = _numcodecs_blosc()
    try:
        return memoryview(blosc.decompress(data))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"it cannot be unpacked: {error}") from error


def _numcodecs_blosc() -> Any:
    try:
        from numcodecs import blosc  # type: ignore[import-untyped]
    except ImportError as missing:
        raise BadInputError("chunks by blosc need numcodecs: pip install 'tiered-dataflow[zarr]'") from missing
    return blosc


# From bytes to bytes: what unpacks them, told the size of a chunk where that is known, and what packs them.
_READ: dict[str, Callable[[memoryview, dict[str, Any], int | None], memoryview]] = {
    "blosc": _unblosc,
    "crc32c": _check_crc,
    "gzip": _unpacked("gzip"),
    "zstd": _unpacked("zstd"),
}
_WRITTEN: dict[str, Callable[[bytes, dict[str, Any]], bytes]] = {"crc32c": _add_crc, "gzip": _gzip, "zstd": _zstd}
