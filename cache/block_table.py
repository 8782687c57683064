"""The blocks of a dataset as columns, numbered: what a plan's numbers refer to. Pure.

A table is sent to a server once, in pages of a fixed number of blocks, so that a plan costs four bytes a block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from cache.keys import BlockRef
from connectors.errors import BadInputError

__all__ = ["MAX_TABLE_BLOCKS", "PAGE_BLOCKS", "BlockTable", "TableDigest", "TablePage"]

PAGE_BLOCKS = 4096
"""Blocks in every page of a table but the last."""

MAX_TABLE_BLOCKS = 1 << 23
"""A table takes some 30 bytes a block in the server, and its URIs."""


class TablePage(msgspec.Struct, tag="page", frozen=True):
    """Some blocks; columns as little-endian bytes.

    Attributes:
        uris: The objects that they lie in.
        versions: One per object.
        object: int32 per block: its row in `uris`.
        offset: int64 per block.
        length: int64 per block.
        crc32c: uint32 per block, None where there is none.
    """

    uris: list[str]
    versions: list[str]
    object: bytes
    offset: bytes
    length: bytes
    crc32c: bytes | None

    @property
    def num_blocks(self) -> int:
        """Blocks in this page."""
        return len(self.object) // 4

    @property
    def size_bytes(self) -> int:
        """Memory that the page takes, about; the same for equal pages, as `sys.getsizeof` is not."""
        columns = (self.object, self.offset, self.length, self.crc32c or b"")
        texts = sum(64 + len(text) * (1 if text.isascii() else 4) for text in (*self.uris, *self.versions))
        return 512 + sum(map(len, columns)) + texts

    def check(self) -> None:
        """Insist that the columns fit each other.

        Raises:
            BadInputError: They do not.
        """
        blocks = self.num_blocks
        objects = np.frombuffer(self.object, "<i4") if len(self.object) % 4 == 0 else np.empty(0)
        if (
            not 0 < blocks <= PAGE_BLOCKS
            or len(self.object) != 4 * blocks
            or len(self.offset) != 8 * blocks
            or len(self.length) != 8 * blocks
            or (self.crc32c is not None and len(self.crc32c) != 4 * blocks)
            or len(self.versions) != len(self.uris)
            or len(self.uris) > blocks
            or objects.min() < 0
            or objects.max() >= len(self.uris)
            or np.frombuffer(self.offset, "<i8").min() < 0
            or np.frombuffer(self.length, "<i8").min() < 1
        ):
            raise BadInputError(f"a page of a block table has columns that do not fit its {blocks} blocks")

    def ref(self, row: int) -> BlockRef:
        """Name the bytes of one block."""
        place = int.from_bytes(self.object[4 * row : 4 * row + 4], "little")
        crc32c = self.crc32c
        return BlockRef(
            self.uris[place],
            self.versions[place],
            int.from_bytes(self.offset[8 * row : 8 * row + 8], "little"),
            int.from_bytes(self.length[8 * row : 8 * row + 8], "little"),
            None if crc32c is None else int.from_bytes(crc32c[4 * row : 4 * row + 4], "little"),
        )


class TableDigest:
    """The digest of a table, page by page."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, page: TablePage) -> None:
        """Take the next page."""
        self._digest.update(msgspec.msgpack.encode(page))

    def value(self) -> bytes:
        """Return the digest of the pages so far."""
        return self._digest.digest()


class BlockTable:
    """Numbered blocks.

    Args:
        pages: All of `PAGE_BLOCKS` blocks but the last one; checked here.

    Raises:
        BadInputError: The pages are not like that.
    """

    def __init__(self, pages: Sequence[TablePage]) -> None:
        for page in pages:
            page.check()
        if any(page.num_blocks != PAGE_BLOCKS for page in pages[:-1]):
            raise BadInputError(f"every page of a block table but the last has {PAGE_BLOCKS} blocks")
        self.pages = list(pages)

    @classmethod
    def from_columns(
        cls,
        uris: Sequence[str],
        versions: Sequence[str],
        *,
        object_of: npt.NDArray[np.integer[Any]],
        offset: npt.NDArray[np.integer[Any]],
        length: npt.NDArray[np.integer[Any]],
        crc32c: npt.NDArray[np.integer[Any]] | None,
    ) -> BlockTable:
        """Cut columns over all blocks into pages, each of which names only its own objects.

        Args:
            uris: All objects; anything that is indexed by number.
            versions: One per object.
            object_of: Per block its row in `uris`.
            offset: Per block.
            length: Per block.
            crc32c: Per block, or None.
        """
        pages = []
        for begin in range(0, len(object_of), PAGE_BLOCKS):
            rows = slice(begin, begin + PAGE_BLOCKS)
            objects, inside = np.unique(object_of[rows], return_inverse=True)
            pages.append(
                TablePage(
                    [uris[place] for place in objects.tolist()],
                    [versions[place] for place in objects.tolist()],
                    inside.astype("<i4").tobytes(),
                    offset[rows].astype("<i8").tobytes(),
                    length[rows].astype("<i8").tobytes(),
                    None if crc32c is None else crc32c[rows].astype("<u4").tobytes(),
                )
            )
        return cls(pages)

    def __len__(self) -> int:
        return (len(self.pages) - 1) * PAGE_BLOCKS + self.pages[-1].num_blocks if self.pages else 0

    @cached_property
    def size_bytes(self) -> int:
        """Memory that the table takes."""
        return sum(page.size_bytes for page in self.pages)

    def ref(self, block: int) -> BlockRef:
        """Name the bytes of one block."""
        page, row = divmod(block, PAGE_BLOCKS)
        return self.pages[page].ref(row)

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that name the table, so that several ranks need to send it only once."""
        digest = TableDigest()
        for page in self.pages:
            digest.add(page)
        return digest.value()
