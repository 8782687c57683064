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
        # A block that begins inside a stretch counts from the next one on.
        begins_before = -(-first_sample[1:-1] >> self._shift)
        counts = np.bincount(begins_before, minlength=num_stretches + 1)[:num_stretches]
        self._first_block = np.cumsum(counts).astype(np.int32)

    def find(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the block of each sample number, int64; each must lie in `[0, number of samples)`."""
        block: npt.NDArray[np.int64] = self._first_block[samples >> self._shift].astype(np.int64)
        for _ in range(_MAX_TURNS):
            is_behind = self._first_sample[block + 1] <= samples
            if not is_behind.any():
                return block
            block += is_behind
        return np.asarray(np.searchsorted(self._first_sample, samples, side="right") - 1)
