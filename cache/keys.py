"""What identifies the bytes of a block. Pure."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from connectors.errors import BadInputError

__all__ = ["KEY_BYTES", "BlockRef", "block_key"]

KEY_BYTES = 16

_U32 = struct.Struct("<I")
_SPAN = struct.Struct("<QQ")
_MAX_OFFSET = (1 << 63) - 1  # what the kernel takes


@dataclass(frozen=True, slots=True)
class BlockRef:
    """One block: the bytes `[offset, offset + length)` of one version of one object.

    Attributes:
        uri: The object, whole (scheme, authority and key).
        version: With `crc32c`, a name for the content that the dataset's index gives; without, the store's own token,
            which every read from the store insists on.
        offset: First byte inside the object.
        length: Number of bytes; at least 1.
        crc32c: Checksum (Castagnoli) of the block's bytes where the dataset's index carries one.
    """

    uri: str
    version: str
    offset: int
    length: int
    crc32c: int | None = None

    def __post_init__(self) -> None:
        if self.offset < 0 or self.length < 1 or self.offset + self.length > _MAX_OFFSET:
            raise BadInputError(
                f"a block needs offset >= 0, length >= 1 and an end below 2**63, "
                f"got {self.offset} and {self.length} for {self.uri}",
                uri=self.uri,
            )
        if self.crc32c is not None and not 0 <= self.crc32c < 1 << 32:
            raise BadInputError(f"crc32c has 32 bits, got {self.crc32c} for {self.uri}", uri=self.uri)


def block_key(ref: BlockRef) -> bytes:
    """Return the 128-bit name of a block: blake2b over length-prefixed URI and version, offset, length and checksum.

    The checksum is part of the name because whoever asks first has the block fetched and checked: a client that names
    another checksum, or none, shares nothing with those that name the right one.
    """
    uri, version = ref.uri.encode(), ref.version.encode()
    name = b"".join(
        (
            _U32.pack(len(uri)),
            uri,
            _U32.pack(len(version)),
            version,
            _SPAN.pack(ref.offset, ref.length),
            b"" if ref.crc32c is None else _U32.pack(ref.crc32c),
        )
    )
    return hashlib.blake2b(name, digest_size=KEY_BYTES).digest()
