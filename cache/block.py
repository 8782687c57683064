"""The block file: its bytes and its name. Pure.

    [0, length)      the block's bytes, so that the file can be mapped or sent as it is
    checksums        crc32c of each 32 KiB of them, u32 little endian
    footer           magic, format version, key, length, crc32c over checksums and footer so far

A name says key and length (`<32 hex>-<length>`), so a scan needs no stat. Files are spread over 256 folders by the
*last* byte of the key: a kept set holds the lowest keys, whose first bytes are all alike.

A file of another length, with a flipped bit anywhere, or under the name of another block does not verify.
"""

from __future__ import annotations

import re
import struct

from crc32c import crc32c

from cache.keys import KEY_BYTES
from connectors.errors import CorruptError
from connectors.protocols import Buffer

__all__ = [
    "CHUNK_BYTES",
    "FORMAT_VERSION",
    "block_path",
    "encode_trailer",
    "file_bytes",
    "parse_name",
    "trailer_bytes",
    "verify",
]

CHUNK_BYTES = 32 * 1024
FORMAT_VERSION = 1

_MAGIC = b"DFBLOCK\n"
_FOOTER = struct.Struct(f"<8sI{KEY_BYTES}sQ")
_CRC = struct.Struct("<I")
_NAME = re.compile(rf"([0-9a-f]{{{2 * KEY_BYTES}}})-([1-9][0-9]{{0,17}})")


def trailer_bytes(length: int) -> int:
    """Return the size of the trailer behind `length` bytes of data."""
    return _chunks(length) * _CRC.size + _FOOTER.size + _CRC.size


def file_bytes(length: int) -> int:
    """Return the size of the whole file of a block."""
    return length + trailer_bytes(length)


def encode_trailer(key: bytes, data: Buffer) -> bytes:
    """Return what follows `data` in the file of the block `key`."""
    trailer = _checksums(data) + _FOOTER.pack(_MAGIC, FORMAT_VERSION, key, len(data))
    return trailer + _CRC.pack(crc32c(trailer))


def verify(key: bytes, data: Buffer, trailer: Buffer) -> None:
    """Check the two parts of the file of the block `key`.

    Raises:
        CorruptError: They are not, to the last bit, what was written for this key and this length.
    """
    if len(trailer) != trailer_bytes(len(data)):
        raise CorruptError(f"block {key.hex()}: the file is {len(data) + len(trailer)} bytes, too short or too long")
    body, (crc,) = memoryview(trailer)[: -_CRC.size], _CRC.unpack(memoryview(trailer)[-_CRC.size :])
    if crc32c(body) != crc:
        raise CorruptError(f"block {key.hex()}: the trailer does not match its own checksum")
    magic, version, found_key, length = _FOOTER.unpack(body[-_FOOTER.size :])
    if (magic, version) != (_MAGIC, FORMAT_VERSION):
        raise CorruptError(f"block {key.hex()}: the file is not a block file of format {FORMAT_VERSION}")
    if found_key != key or length != len(data):
        raise CorruptError(f"block {key.hex()}: the file holds block {found_key.hex()} of {length} bytes")
    if _checksums(data) != body[: -_FOOTER.size]:
        raise CorruptError(f"block {key.hex()}: the data does not match its checksums")


def block_path(key: bytes, length: int) -> str:
    """Return folder and name of a block's file below the root of all blocks."""
    name = key.hex()
    return f"{name[-2:]}/{name}-{length}"


def parse_name(name: str) -> tuple[bytes, int] | None:
    """Return key and length of a block file's name, None for any other name."""
    match = _NAME.fullmatch(name)
    return (bytes.fromhex(match[1]), int(match[2])) if match else None


def _chunks(length: int) -> int:
    return -(-length // CHUNK_BYTES)


def _checksums(data: Buffer) -> bytes:
    with memoryview(data) as view:
        crcs = [crc32c(view[start : start + CHUNK_BYTES]) for start in range(0, len(view), CHUNK_BYTES)]
    return struct.pack(f"<{len(crcs)}I", *crcs)
