"""Orders: which sample stands at which position of an epoch.

An order answers any position by itself, so reading on from position 10^9 costs what reading from 0 costs, and nothing
is kept per sample. Positions and sample numbers are int64.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from connectors.errors import BadInputError
from dataflow.index.finder import BlockFinder
from dataflow.order.feistel import MAX_ELEMENTS, Permutation

__all__ = ["BlockOrder", "FullOrder", "Order", "SequentialOrder"]

# Blocks in a group, at least: its table is made in 0.1 ms, and a million blocks have a thousand groups.
_GROUP_BLOCKS = 512
_GROUP_WINDOWS = 8
# With fewer groups it would show that blocks of one row are never in one group.
_LEAST_GROUPS = 64
# Deals of rows to groups: each row has its own where groups are few, and there are enough of them where rows are long.
_DEALT_PLACES = 1 << 14


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
    epoch. Blocks may have any size, also none.

    Many blocks (32,768 or more at windows of 64) are first dealt to groups of some hundreds, of 8 windows or more: the
    table is cut into rows of one block a group, and each row is dealt by one of some random deals, turned by a random
    number of places. Blocks are permuted inside their group, and windows are cut there. So a position needs the table
    of its group alone, and an epoch begins, anywhere, with one addition per block. A group is a stratified random
    sample of the dataset: one block of each row. Fewer blocks are one group, which is permuted whole.

    Beside the table it is given it keeps some hundred kilobytes.

    Args:
        first_sample: int64, number of blocks + 1: the first sample of each block, then the number of samples. Kept, not
            copied.
        seed: Any integer.
        epoch: Each epoch has its own order.
        window_blocks: Blocks that are mixed with each other, at least 1; 1 shuffles inside each block only. Windows
            have this many blocks or a few less, so that all are alike.

    Raises:
        BadInputError: `first_sample` does not start at 0 or decreases, or `window_blocks` is below 1.
    """

    def __init__(self, first_sample: npt.NDArray[np.int64], seed: int, epoch: int, window_blocks: int) -> None:
        first_sample = np.asarray(first_sample, dtype=np.int64)
        is_table = first_sample.ndim == 1 and first_sample.size > 0 and first_sample[0] == 0
        if not is_table or (first_sample[1:] < first_sample[:-1]).any():
            raise BadInputError("first_sample must be one-dimensional, start at 0 and never decrease")
        if window_blocks < 1:
            raise BadInputError(f"window_blocks must be >= 1, got {window_blocks}")
        super().__init__(int(first_sample[-1]))
        self._first_sample = first_sample
        self._blocks = Permutation(seed, epoch, "blocks")
        self._samples = Permutation(seed, epoch, "windows")
        num_blocks = first_sample.size - 1
        group_blocks = max(_GROUP_BLOCKS, _GROUP_WINDOWS * window_blocks)
        num_groups = 1 << max(0, (num_blocks // group_blocks).bit_length() - 1)
        self._num_groups = num_groups if num_groups >= _LEAST_GROUPS else 1
        num_rows = -(-num_blocks // self._num_groups)
        self._windows_per_group = -(-num_rows // window_blocks)
        # In row r, group g has the block at place `deals[r % len(deals), (g + turns[r]) % num_groups]`.
        rows = np.arange(num_rows, dtype=np.int64)
        self._turns = Permutation(seed, epoch, "turns").apply(np.zeros_like(rows), self._num_groups, rows)
        num_deals = max(1, min(num_rows, _DEALT_PLACES // self._num_groups))
        deal, place = np.divmod(np.arange(num_deals * self._num_groups, dtype=np.int64), self._num_groups)
        dealt = Permutation(seed, epoch, "rows").apply(place, self._num_groups, deal)
        self._deals = dealt.reshape(num_deals, self._num_groups)
        self._group_ends = np.cumsum(self._group_sizes())
        none = np.empty(0, dtype=np.int64)
        self._opened = _Groups(none, none, none, none, BlockFinder(np.zeros(1, dtype=np.int64)), none)

    def at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """See `Order.at`."""
        group = _only(np.searchsorted(self._group_ends, positions, side="right"))
        opened = self._open(np.unique(group))
        positions = positions + opened.lead[np.searchsorted(opened.groups, group)]
        window = _only(np.searchsorted(opened.window_ends, positions, side="right"))
        ends = opened.window_ends[window]
        starts = np.where(window > 0, opened.window_ends[window - 1], 0)
        inside = starts + self._samples.apply(positions - starts, ends - starts, opened.windows[window])
        return np.asarray(inside + opened.shift[opened.blocks.find(inside)])

    def _group_sizes(self) -> npt.NDArray[np.int64]:
        """Return the number of samples of each group."""
        if self._num_groups == 1:
            return self._first_sample[-1:]
        sizes = np.zeros(self._num_groups, dtype=np.int64)
        deals = np.concatenate([self._deals, self._deals], axis=1)  # turned by taking a part of it
        for row, turn in enumerate(self._turns.tolist()):
            bounds = self._first_sample[row * self._num_groups : (row + 1) * self._num_groups + 1]
            own = bounds[1:] - bounds[:-1]
            if len(own) < self._num_groups:
                own = np.append(own, np.zeros(self._num_groups - len(own), dtype=np.int64))
            sizes += own[deals[row % len(deals), turn : turn + self._num_groups]]
        return sizes

    def _open(self, groups: npt.NDArray[np.int64]) -> _Groups:
        """Return the tables of some groups, ascending; those opened last are kept."""
        opened = self._opened
        if not np.isin(groups, opened.groups).all():
            opened = self._opened = self._make_tables(groups)
        return opened

    def _block_of(self, group: npt.NDArray[np.int64], row: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the block that each group has in each row; in the last row it may be one that is not there."""
        place = (group + self._turns[row]) & (self._num_groups - 1)
        return np.asarray(row * self._num_groups + self._deals[row % len(self._deals), place])

    def _make_tables(self, groups: npt.NDArray[np.int64]) -> _Groups:
        num_blocks, num_rows = len(self._first_sample) - 1, len(self._turns)
        # The last row may be short: some groups then have no block in it.
        counts = num_rows - (self._block_of(groups, np.full_like(groups, num_rows - 1)) >= num_blocks)
        firsts = np.cumsum(counts) - counts
        group, count = np.repeat(groups, counts), np.repeat(counts, counts)
        row = self._blocks.apply(np.arange(len(group)) - np.repeat(firsts, counts), _only(count), _only(group))
        block = self._block_of(group, row)
        sizes = self._first_sample[block + 1] - self._first_sample[block]
        block_starts = np.concatenate([[0], np.cumsum(sizes)])
        turn = np.arange(1, self._windows_per_group + 1, dtype=np.int64)
        window_lasts = firsts[:, None] + turn * counts[:, None] // self._windows_per_group
        return _Groups(
            groups=groups,
            lead=block_starts[firsts] - np.concatenate([[0], self._group_ends])[groups],
            windows=(groups[:, None] * self._windows_per_group + turn - 1).ravel(),
            window_ends=block_starts[window_lasts].ravel(),
            blocks=BlockFinder(block_starts),
            shift=self._first_sample[block] - block_starts[:-1],
        )


class _Groups(NamedTuple):
    """Some groups of a block order, laid out one after the other: places count from the first of them.

    Attributes:
        groups: Which, ascending.
        lead: By group: what leads from a position of the order to a place.
        windows: The number of each window in the order.
        window_ends: The place behind each window.
        blocks: Finds the block of a place.
        shift: By block: what leads from a place inside it to a sample number.
    """

    groups: npt.NDArray[np.int64]
    lead: npt.NDArray[np.int64]
    windows: npt.NDArray[np.int64]
    window_ends: npt.NDArray[np.int64]
    blocks: BlockFinder
    shift: npt.NDArray[np.int64]


def _only(numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return one number where all are the same, which is usual of a run of positions and several times faster."""
    if numbers.size and numbers.min() == numbers.max():
        return np.asarray(numbers.ravel()[0])
    return numbers
