"""Announcing to the cache the blocks of the steps to come, thousands ahead and across the end of the epoch.

    steps (epoch, number, samples) -> their blocks, each when it is first needed -> windows -> plan

The trainer works this out between its steps, so it does a little at a time: the first batch waits for some steps of it,
not for thousands. Past the end of the next epoch a plan has nothing to say: it knows each block's next use by then.

A plan changes when bytes are fetched, never which bytes are read: whatever goes wrong with it is logged, and training
goes on without.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from cache.block_table import BlockTable
from cache.reader import PlanHandle, TakesPlans
from connectors.errors import DataError
from dataflow.index import Index

if TYPE_CHECKING:
    from dataflow.dataset import Dataset

__all__ = ["Announcer", "Step", "block_table"]

_log = logging.getLogger(__name__)

Step: TypeAlias = tuple[int, int, npt.NDArray[np.int64]]
"""Epoch, step of the epoch, and the numbers of the samples that this rank reads in it."""

# Half of this is ahead, of blocks or of steps, where the epochs have so many.
_AHEAD_BLOCKS = 4096
# Looked at in one go: some milliseconds.
_STEPS_AT_ONCE = 32
_SAMPLES_AT_ONCE = 8192
# The trainer waits for each message, so a mark is one for every few blocks, and so is what the plan goes on with, or
# for less where the cache knows of little: a part of what lies ahead of the reader as far as it knows.
_MARK_BLOCKS = 16
_TOLD_SHARE = 1 / 4
# A worker keeps the decoded blocks that it used last; one behind which so few were planned is not asked for again. Less
# than the buffer holds: blocks may be larger when they are decoded, and workers do not use the same ones at a time.
_BUFFER_SHARE = 1 / 2
_NONE = np.empty(0, np.int64)


def block_table(index: Index) -> BlockTable:
    """Return what is read of the blocks of an index as a plan numbers it: by the rows of blocks, or of their pieces."""
    blocks = index.ranges
    return BlockTable.from_columns(
        [index.shard_uri(shard) for shard in range(len(index.shards))],
        index.shards.versions.to_pylist(),
        object_of=blocks.shard,
        offset=blocks.offset,
        length=blocks.length,
        crc32c=blocks.crc32c,
    )


class Announcer:
    """One loader's plan. Belongs to the thread that iterates, and to one process; a copy in another one has no plan.

    Args:
        dataset: Gives the block table and the reader.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._index = dataset.index
        self._plan: PlanHandle | None = None
        # Places of the plan: what the reader has passed, what the cache was told of that, and what is known, to the
        # cache and here.
        self._position = self._marked = self._told = self._end = 0
        self._untold: list[npt.NDArray[np.int64]] = []
        self._expected = (0, 0)
        self._blocks: Iterator[Step] = iter(())
        # Of each step that was announced: epoch, step, and the plan's length after it.
        self._ends: deque[tuple[int, int, int]] = deque()

    def __reduce__(self) -> tuple[Any, ...]:
        return Announcer, (self._dataset,)

    def expects(self, epoch: int, step: int) -> bool:
        """Say whether the steps from here on are those that were announced."""
        return self._plan is not None and (epoch, step) == self._expected

    def begin(self, epoch: int, step: int, steps: Iterator[Step]) -> None:
        """Announce from here on; what was announced before and has not been passed is taken back.

        Args:
            epoch: Of the first step.
            step: Its number in the epoch.
            steps: It and those that follow; must not hold this object, whose plan ends when the last reference goes.
        """
        try:
            if self._plan is None:
                self._position = 0
                reader = self._dataset.reader
                self._plan = reader.open_plan(block_table(self._index)) if isinstance(reader, TakesPlans) else None
            else:
                self._plan.advance(self._position)
                self._plan.replace()
        except DataError as error:
            self._give_up(error)
        self._marked = self._told = self._end = self._position
        self._untold.clear()
        self._expected = (epoch, step)
        self._blocks = _first_needed(self._index, steps, self._dataset.buffer_bytes)
        self._ends.clear()
        self._announce()

    def passed(self, steps: int) -> None:
        """The first `steps` steps of the current epoch were handed out."""
        if self._plan is None:
            return
        epoch = self._expected[0]
        while self._ends and self._ends[0][:2] < (epoch, steps):
            self._position = self._ends.popleft()[2]
        # An epoch's end is the next one's beginning.
        at_end = bool(self._ends) and self._ends[0][0] > epoch
        self._expected = (epoch + 1, 0) if at_end else (epoch, steps)
        is_far = self._position - self._marked >= _MARK_BLOCKS
        if is_far or self._has_much_to_tell() or len(self._ends) < _AHEAD_BLOCKS // 2:
            self._announce()

    def close(self) -> None:
        """End the plan."""
        plan, self._plan = self._plan, None
        if plan is not None:
            plan.close()

    def __del__(self) -> None:
        self.close()

    def _announce(self) -> None:
        """Tell how far the reader is, and make the plan longer where less than half of it is left."""
        if self._plan is None:
            return
        try:
            if min(self._end - self._position, len(self._ends)) < _AHEAD_BLOCKS // 2:
                self._untold += self._next_window()
            least = _MARK_BLOCKS
            if self._has_much_to_tell():
                self._plan.extend(np.concatenate(self._untold))
                self._untold.clear()
                self._told = self._end
                least = 1
            if self._position - self._marked >= least:
                self._plan.advance(self._position)
                self._marked = self._position
        except DataError as error:
            self._give_up(error)

    def _has_much_to_tell(self) -> bool:
        untold = self._end - self._told
        return untold > 0 and untold >= min(_MARK_BLOCKS, _TOLD_SHARE * (self._told - self._position))

    def _next_window(self) -> list[npt.NDArray[np.int64]]:
        parts: list[npt.NDArray[np.int64]] = []
        # A dataset that is decoded once and then kept by its workers has steps without a block, so both are bounded.
        for _ in range(_STEPS_AT_ONCE):
            # One step behind the next epoch says that all of it is there.
            is_enough = bool(self._ends) and self._ends[-1][0] > self._expected[0] + 1
            if is_enough or self._end - self._position >= _AHEAD_BLOCKS or len(self._ends) >= _AHEAD_BLOCKS:
                break
            found = next(self._blocks, None)
            if found is None:
                break
            epoch, step, blocks = found
            self._end += len(blocks)
            self._ends.append((epoch, step, self._end))
            if len(blocks):
                parts.append(blocks)
        return parts

    def _give_up(self, error: DataError) -> None:
        # The text alone: a record that keeps the error would keep its frames, and with them the loader.
        _log.warning("the cache fetches nothing ahead until the next epoch: %s", str(error))
        self.close()


def _first_needed(index: Index, steps: Iterator[Step], buffer_bytes: int) -> Iterator[Step]:
    """Yield for each step the rows of the table that workers with such buffers lack in it, in place of its samples."""
    block_bytes = max(1, int(index.ranges.length.sum())) / max(1, index.num_blocks)
    buffered = max(1, int(_BUFFER_SHARE * buffer_bytes / block_bytes))
    # How many blocks were planned by the time each was used last.
    last = np.full(index.num_blocks, -buffered, np.int64)
    planned = 0
    while some := _next_few(steps):
        used, ends = _used_blocks(index, [samples for _, _, samples in some])
        if (planned - last[used] < buffered).all():
            last[used] = planned
            yield from ((epoch, step, _NONE) for epoch, step, _ in some)
            continue
        for (epoch, step, _), (begin, end) in zip(some, pairwise([0, *ends]), strict=True):
            own = used[begin:end]
            is_new = planned - last[own] >= buffered
            blocks = own[is_new]
            last[own] = planned + is_new.cumsum()
            planned += len(blocks)
            yield epoch, step, blocks if index.pieces is None else index.pieces.rows_of(blocks)


def _next_few(steps: Iterator[Step]) -> list[Step]:
    """Return some steps: enough that numpy's cost per call vanishes, few enough that no first batch waits for them."""
    some: list[Step] = []
    num_samples = 0
    while len(some) < _STEPS_AT_ONCE and num_samples < _SAMPLES_AT_ONCE and (step := next(steps, None)) is not None:
        some.append(step)
        num_samples += len(step[2])
    return some


def _used_blocks(index: Index, steps: list[npt.NDArray[np.int64]]) -> tuple[npt.NDArray[np.int64], list[int]]:
    """Return the blocks of the samples of each step, ascending in each, and where the steps end among them."""
    step = np.repeat(np.arange(len(steps)), [len(samples) for samples in steps])
    block, _ = index.locate(np.concatenate(steps))
    step, block = np.divmod(np.unique(step * index.num_blocks + block), index.num_blocks)
    return block, np.searchsorted(step, np.arange(1, len(steps) + 1)).tolist()
