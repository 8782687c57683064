"""Orders: which sample stands at which position of an epoch.

An order answers any position by itself, so reading on from position 10^9 costs what reading from 0 costs, and nothing
is kept per sample. Positions and sample numbers are int64.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from connectors.errors import BadInputError
from dataflow.order.feistel import MAX_ELEMENTS, Permutation

__all__ = ["BlockOrder", "FullOrder", "Order", "SequentialOrder"]


class Order(Protocol):
    """A sequence of all sample numbers of one epoch, each exactly once. Immutable; may be shared and pickled."""

    def __len__(self) -> int:
        """The number of positions."""
        ...

    def at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the sample numbers at `positions`, in their order and shape. Each must lie in `[0, len)`."""
        ...

    def take(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the sample numbers at positions `start` to `stop - 1`.

        Raises:
            BadInputError: Not `0 <= start <= stop <= len`.
        """
        ...


class _Positions:
    """What all orders share: a length, and `take` in terms of `at`."""

    def __init__(self, num_samples: int) -> None:
        if not 0 <= num_samples <= MAX_ELEMENTS:
            raise BadInputError(f"an order has 0 to 2**62 samples, got {num_samples}")
        self._num_samples = num_samples

    def __len__(self) -> int:
        return self._num_samples

    def at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return positions

    def take(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        if not 0 <= start <= stop <= self._num_samples:
            raise BadInputError(
                f"positions [{start}, {stop}) do not lie inside an order of {self._num_samples} samples"
            )
        return self.at(np.arange(start, stop, dtype=np.int64))


class SequentialOrder(_Positions):
    """Samples in the order in which they are stored.

    Args:
        num_samples: Length of the dataset.
    """


class FullOrder(_Positions):
    """A random permutation of all samples: the best mixing, and a block read anew for nearly every sample.

    Args:
        num_samples: Length of the dataset.
        seed: Any integer.
        epoch: Each epoch has its own permutation.
    """

    def __init__(self, num_samples: int, seed: int, epoch: int) -> None:
        super().__init__(num_samples)
        self._permutation = Permutation(seed, epoch, "samples")

    def at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """See `Order.at`."""
        return self._permutation.apply(positions, self._num_samples)


class BlockOrder(_Positions):
    """Blocks in random order, and samples in random order inside windows of consecutive blocks of that order.

    All samples of a block lie inside one window, so a reader that holds one window of blocks reads each block once an
    epoch. Windows differ by at most one block. Blocks may have any size, also none. Memory: 16 bytes a block.

    Args:
        first_sample: int64, number of blocks + 1: the first sample of each block, then the number of samples.
        seed: Any integer.
        epoch: Each epoch has its own order.
        window_blocks: Blocks that are mixed with each other, at least 1; 1 shuffles inside each block only.

    Raises:
        BadInputError: `first_sample` does not start at 0 or decreases, or `window_blocks` is below 1.
    """

    def __init__(self, first_sample: npt.NDArray[np.int64], seed: int, epoch: int, window_blocks: int) -> None:
        first_sample = np.asarray(first_sample, dtype=np.int64)
        sizes = np.diff(first_sample)
        if first_sample.ndim != 1 or first_sample.size == 0 or first_sample[0] != 0 or (sizes < 0).any():
            raise BadInputError("first_sample must be one-dimensional, start at 0 and never decrease")
        if window_blocks < 1:
            raise BadInputError(f"window_blocks must be >= 1, got {window_blocks}")
        super().__init__(int(first_sample[-1]))
        num_blocks = sizes.size
        blocks = Permutation(seed, epoch, "blocks").apply(np.arange(num_blocks, dtype=np.int64), num_blocks)
        ends = np.cumsum(sizes[blocks])
        starts = ends - sizes[blocks]
        # From a position inside the reordered blocks to its sample number, one addition per reordered block.
        self._ends = ends
        self._shift = first_sample[blocks] - starts
        num_windows = -(-num_blocks // window_blocks)
        last_blocks = np.arange(1, num_windows + 1, dtype=np.int64) * num_blocks // max(num_windows, 1) - 1
        self._window_ends = ends[last_blocks]
        self._permutation = Permutation(seed, epoch, "windows")

    def at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """See `Order.at`."""
        window = np.searchsorted(self._window_ends, positions, side="right")
        if window.size and window.min() == window.max():
            window = window.ravel()[0]  # the usual case of a run of positions, and several times faster
        ends = self._window_ends[window]
        starts = np.where(window > 0, self._window_ends[window - 1], 0)
        inside = starts + self._permutation.apply(positions - starts, ends - starts, window)
        # `right` steps over the empty blocks, whose end is that of the block before them.
        return np.asarray(inside + self._shift[np.searchsorted(self._ends, inside, side="right")])
