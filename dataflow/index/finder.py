"""Finding the block of a sample at a cost that does not grow with the number of blocks.

A binary search among a million blocks misses the caches at nearly each of its twenty turns. Here sample numbers are cut
into stretches as long as a block is on average, and the block at the beginning of each stretch is noted; from there it
is rarely more than one or two blocks on.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["BlockFinder"]

# Where blocks are very unequal a stretch may hold thousands; a search is then faster than walking.
_MAX_TURNS = 8
# Bounds what building takes beside the result.
_BLOCKS_AT_ONCE = 1 << 18


class BlockFinder:
    """Finds blocks. Immutable; takes 4 to 8 bytes a block.

    Args:
        first_sample: int64, number of blocks + 1: where each block begins, ascending from 0, then the number of
            samples. Kept, not copied.
    """

    def __init__(self, first_sample: npt.NDArray[np.int64]) -> None:
        self._first_sample = first_sample
        num_blocks, num_samples = len(first_sample) - 1, int(first_sample[-1])
        self._shift = max(0, (num_samples // max(num_blocks, 1)).bit_length() - 1)
        num_stretches = -(-num_samples >> self._shift)
        first_block = np.zeros(num_stretches + 1, np.int32)
        for first in range(1, num_blocks, _BLOCKS_AT_ONCE):
            # A block that begins inside a stretch counts from the next one on.
            begins_before = -(-first_sample[first : min(first + _BLOCKS_AT_ONCE, num_blocks)] >> self._shift)
            low = int(begins_before[0])
            counts = np.bincount(begins_before - low)
            first_block[low : low + len(counts)] += counts.astype(np.int32)
        self._first_block = np.cumsum(first_block[:num_stretches], dtype=np.int32, out=first_block[:num_stretches])

    def find(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the block of each sample number, int64; each must lie in `[0, number of samples)`."""
        block: npt.NDArray[np.int64] = self._first_block[samples >> self._shift].astype(np.int64)
        for _ in range(_MAX_TURNS):
            is_behind = self._first_sample[block + 1] <= samples
            if not is_behind.any():
                return block
            block += is_behind
        return np.asarray(np.searchsorted(self._first_sample, samples, side="right") - 1)
