"""Which bytes hold which samples: shards, and the blocks inside them. Pure.

Everything is a column. Nothing is kept per sample, and nothing per block is a Python object, so a table of 10^6 blocks
opens as fast as its bytes arrive and is shared by forked workers without copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from cache.keys import BlockRef
from connectors.errors import CorruptError
from connectors.objects import join_uri
from dataflow.index.finder import BlockFinder

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["Blocks", "Index", "Parts", "Pieces", "Shards"]

# Bounds what a check takes beside the table, whatever its length.
_ROWS_AT_ONCE = 1 << 18


@dataclass(frozen=True, slots=True, eq=False)
class Shards:
    """The objects that hold a dataset's blocks.

    Attributes:
        names: Keys relative to the dataset's URL; a `pyarrow.StringArray`.
        size_bytes: int64 per shard.
        versions: What `BlockRef.version` carries: a digest of the content where blocks have checksums, else the store's
            token; a `pyarrow.StringArray`.
    """

    names: pa.StringArray
    size_bytes: npt.NDArray[np.int64]
    versions: pa.StringArray

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """What native blocks consist of: a header, then the bytes of every field, one behind the other.

    Attributes:
        end: int64, (blocks, fields + 1): where each part ends, counted from the first byte of its block.
        crc32c: uint32, of the same shape: checksum of each part.
    """

    end: npt.NDArray[np.int64]
    crc32c: npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """The blocks of a dataset, in the order of their samples.

    Attributes:
        shard: int32 per block: its row in `Shards`.
        offset: int64 per block: first byte inside the shard.
        length: int64 per block: number of bytes, at least 1.
        first_sample: int64, one more than blocks: block `b` holds `[first_sample[b], first_sample[b + 1])`.
        crc32c: uint32 per block (Castagnoli, of the block's bytes), or None where the format has none.
        parts: Where the fields lie inside the blocks, or None where that is not known.
    """

    shard: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]
    first_sample: npt.NDArray[np.int64]
    crc32c: npt.NDArray[np.uint32] | None = None
    parts: Parts | None = None

    def __len__(self) -> int:
        return len(self.shard)

    def num_samples_in(self, block: int) -> int:
        """Return how many samples a block holds."""
        return int(self.first_sample[block + 1] - self.first_sample[block])


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """The byte ranges that are read of each block, where that is not the one range that the block table names.

    So it is for a block whose fields lie in objects of their own, and for one of which only some fields are read. A
    block may have no piece at all.

    Attributes:
        first: int64, one more than blocks: block `b` consists of the pieces `[first[b], first[b + 1])`.
        shard: int32 per piece: its row in `Shards`.
        offset: int64 per piece: first byte inside the shard.
        length: int64 per piece: number of bytes, at least 1.
        crc32c: uint32 per piece, or None where there is none.
    """

    first: npt.NDArray[np.int64]
    shard: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]
    crc32c: npt.NDArray[np.uint32] | None = None

    def __len__(self) -> int:
        return len(self.shard)

    def rows_of(self, blocks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the rows of the pieces of some blocks, block by block."""
        counts = self.first[blocks + 1] - self.first[blocks]
        ends = np.cumsum(counts)
        rows: npt.NDArray[np.int64] = np.repeat(self.first[blocks] - ends + counts, counts)
        return rows + np.arange(len(rows))


@dataclass(frozen=True, eq=False)
class Index:
    """Where every sample of one version of a dataset lies. Immutable, picklable.

    Attributes:
        url: The dataset's URL, which shard names are relative to.
        fingerprint: Names content, schema and block layout; equal wherever the same dataset lies.
        shards: The objects.
        blocks: The blocks inside them.
        pieces: What is read of each block; None where that is the block. Decides neither fingerprint nor order.
    """

    url: str
    fingerprint: str
    shards: Shards
    blocks: Blocks
    pieces: Pieces | None = None

    @property
    def num_samples(self) -> int:
        """Number of samples in the dataset."""
        return int(self.blocks.first_sample[-1])

    @property
    def num_blocks(self) -> int:
        """Number of blocks in the dataset."""
        return len(self.blocks)

    def locate(self, samples: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the block of each sample and the row inside that block, both int64, in the order asked.

        Args:
            samples: Sample numbers in `[0, num_samples)`.

        Raises:
            IndexError: A sample number is out of range; names it and the length.
        """
        # One look instead of two: a negative number is a huge unsigned one.
        outside = samples.view(np.uint64) >= self.num_samples
        if outside.any():
            raise IndexError(
                f"sample {samples[outside][0]} is out of range for a dataset of {self.num_samples} samples"
            )
        block = self._finder.find(samples)
        return block, samples - self.blocks.first_sample[block]

    @cached_property
    def _finder(self) -> BlockFinder:
        return BlockFinder(self.blocks.first_sample)

    @property
    def ranges(self) -> Blocks | Pieces:
        """All that is read of the dataset: its pieces, or its blocks."""
        return self.blocks if self.pieces is None else self.pieces

    def block_ref(self, block: int) -> BlockRef:
        """Name the bytes of one whole block for the cache; of a block of several pieces only where it belongs."""
        return self._ref(self.blocks, block)

    def range_ref(self, row: int) -> BlockRef:
        """Name the bytes of one of `ranges` for the cache."""
        return self._ref(self.ranges, row)

    def block_refs(self, block: int) -> list[BlockRef]:
        """Name all that is read of one block: its pieces in order, or the block itself."""
        pieces = self.pieces
        if pieces is None:
            return [self._ref(self.blocks, block)]
        return [self._ref(pieces, row) for row in range(int(pieces.first[block]), int(pieces.first[block + 1]))]

    def _ref(self, ranges: Blocks | Pieces, row: int) -> BlockRef:
        shard = int(ranges.shard[row])
        return BlockRef(
            self.shard_uri(shard),
            self.shards.versions[shard].as_py(),
            int(ranges.offset[row]),
            int(ranges.length[row]),
            None if ranges.crc32c is None else int(ranges.crc32c[row]),
        )

    def shard_uri(self, shard: int) -> str:
        """Name one shard whole."""
        return _join(self.url, self.shards.names[shard].as_py())

    def uri_of(self, sample: int) -> str:
        """Name the shard, or the file, that holds a sample; of one in several, that which its block belongs to."""
        block, _ = self.locate(np.array([sample], np.int64))
        return self.block_ref(int(block[0])).uri

    def check(self) -> None:
        """Insist that the table is consistent, in a few vectorised passes and little memory.

        Raises:
            CorruptError: Names the first shard whose blocks cannot be where the table says.
        """
        first = self.blocks.first_sample
        if (
            len(first) != self.num_blocks + 1
            or first[0] != 0
            or any(
                (np.diff(first[begin : begin + _ROWS_AT_ONCE + 1]) < 0).any()
                for begin in range(0, self.num_blocks, _ROWS_AT_ONCE)
            )
        ):
            raise CorruptError(
                f"the index of {self.url} counts samples backwards; convert the dataset again", uri=self.url
            )
        for begin in range(0, self.num_blocks, _ROWS_AT_ONCE):
            shard = self.blocks.shard[begin : begin + _ROWS_AT_ONCE]
            if shard.min() < 0 or shard.max() >= len(self.shards):
                raise CorruptError(f"the index of {self.url} names a shard that it does not list", uri=self.url)
        # Blocks of several pieces have a place among the shards to be named by, and no range there.
        for begin in range(0, len(self.ranges), _ROWS_AT_ONCE):
            self._check_ranges(slice(begin, begin + _ROWS_AT_ONCE))

    def _check_ranges(self, rows: slice) -> None:
        ranges, size_bytes = self.ranges, self.shards.size_bytes
        outside = (ranges.offset[rows] < 0) | (ranges.length[rows] < 1)
        outside |= ranges.offset[rows] + ranges.length[rows] > size_bytes[ranges.shard[rows]]
        if outside.any():
            row = rows.start + int(np.argmax(outside))
            uri, what = self.shard_uri(int(ranges.shard[row])), "block" if self.pieces is None else "piece"
            raise CorruptError(
                f"the index puts {what} {row} at [{ranges.offset[row]}, +{ranges.length[row]}) of {uri}, outside "
                f"its {size_bytes[ranges.shard[row]]} bytes; convert the dataset again",
                uri=uri,
            )


@lru_cache(maxsize=4096)
def _join(url: str, name: str) -> str:
    # Quoting costs 15 us, and a batch names the same shards again and again.
    return join_uri(url, name)
