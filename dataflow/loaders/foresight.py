"""Telling the cache what a sampler will ask for, thousands of blocks ahead and across the end of the epoch.

    schedule -> this rank's samples, step by step -> their blocks, each when it is first needed -> windows -> plan

Orders answer any position, so this costs a second look-up of the sample numbers, and touches neither the sampler nor a
generator of random numbers. A plan changes when bytes are fetched, never which bytes are read: whatever goes wrong with
it is logged, and training goes on without.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from cache.block_table import MAX_TABLE_BLOCKS, BlockTable
from cache.reader import PlanHandle, TakesPlans
from connectors.errors import DataError
from dataflow.index import Index
from dataflow.loaders.schedule_sampler import ScheduleSampler
from dataflow.order import Place, divide

if TYPE_CHECKING:
    from dataflow.dataset import Dataset

__all__ = ["Foresight", "block_table", "foresee", "planned_steps"]

_log = logging.getLogger(__name__)

_Step: TypeAlias = tuple[int, int, npt.NDArray[np.int64]]
"""Epoch, step, and the blocks that are first needed in it."""

_AHEAD_BLOCKS = 4096
# Samples looked up at once: enough that numpy's cost per call vanishes.
_CHUNK_SAMPLES = 8192
# Naming a shard takes 15 us, and with a file a sample the table would take longer than it saves.
_MAX_SHARDS = 1 << 16
# Each mark is a message, so one for every few blocks.
_MARK_BLOCKS = 16
# A worker keeps decoded blocks for a while; one that was planned this few blocks ago is not asked for again.
_BUFFERED_BYTES = 64 << 20


def foresee(dataset: Any, sampler: Any) -> Foresight | None:
    """Return what announces a sampler's future, None where the order or the reader has no use for it."""
    index, reader = getattr(dataset, "index", None), getattr(dataset, "reader", None)
    if not (isinstance(sampler, ScheduleSampler) and isinstance(index, Index) and isinstance(reader, TakesPlans)):
        return None
    fits = 0 < index.num_blocks <= MAX_TABLE_BLOCKS and len(index.shards) <= _MAX_SHARDS
    return Foresight(dataset, sampler) if fits else None


def block_table(index: Index) -> BlockTable:
    """Return the blocks of an index as a plan numbers them: by their rows."""
    blocks = index.blocks
    return BlockTable.from_columns(
        [index.shard_uri(shard) for shard in range(len(index.shards))],
        index.shards.versions.to_pylist(),
        object_of=blocks.shard,
        offset=blocks.offset,
        length=blocks.length,
        crc32c=blocks.crc32c,
    )


def planned_steps(sampler: ScheduleSampler, epoch: int, first: Place) -> Iterator[list[npt.NDArray[np.int64]]]:
    """Yield the sample numbers of this rank, some steps at a time, from a place in an epoch to the epoch's end."""
    plan, division = sampler.schedule.epoch(epoch), sampler.division_of(epoch)
    window, inside = plan.enter(first.position) if first.position else (0, 0)
    waiting: list[npt.NDArray[np.int64]] = []
    num_waiting = 0
    while window < plan.num_windows:
        steps = plan.window(window)
        for step in range(inside, len(steps)):
            batch = steps.batch(plan.order, step)
            waiting.append(batch.positions_of(divide(division, batch, sampler.num_replicas).of(sampler.replica)))
            num_waiting += len(waiting[-1])
            if num_waiting >= _CHUNK_SAMPLES:
                yield _look_up(plan.order, waiting)
                waiting, num_waiting = [], 0
        window, inside = window + 1, 0
    if waiting:
        yield _look_up(plan.order, waiting)


class Foresight:
    """One loader's plan. Belongs to the thread that iterates, and to one process.

    Args:
        dataset: Gives the block table and the reader.
        sampler: Gives the order.
    """

    def __init__(self, dataset: Dataset, sampler: ScheduleSampler) -> None:
        self._dataset = dataset
        self._index = dataset.index
        self._sampler = sampler
        self._plan: PlanHandle | None = None
        # Places of the plan: what the reader has passed, what the cache was told of that, and what is known.
        self._position = self._marked = self._end = 0
        self._expected = (0, 0)
        self._steps: Iterator[_Step] = iter(())
        # Of each step that was announced: epoch, step, and the plan's length after it.
        self._ends: deque[tuple[int, int, int]] = deque()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy in another process has no plan.
        return Foresight, (self._dataset, self._sampler)

    def begin(self, sampler: ScheduleSampler) -> None:
        """The sampler begins an epoch, or goes on in one. Where that was announced, there is nothing to do."""
        epoch, first = sampler.epoch, sampler._run.first
        if self._plan is not None and (epoch, first.step) == self._expected:
            return
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
        self._marked = self._end = self._position
        self._expected = (epoch, first.step)
        # It must not hold this object: the plan ends when the last reference goes.
        self._steps = _future(self._index, sampler, epoch, first)
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
        if self._position - self._marked >= _MARK_BLOCKS or len(self._ends) < _AHEAD_BLOCKS // 2:
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
            if self._position > self._marked:
                self._plan.advance(self._position)
                self._marked = self._position
            if min(self._end - self._position, len(self._ends)) < _AHEAD_BLOCKS // 2:
                window = self._next_window()
                if len(window):
                    self._plan.extend(window)
        except DataError as error:
            self._give_up(error)

    def _next_window(self) -> npt.NDArray[np.int64]:
        parts: list[npt.NDArray[np.int64]] = []
        # A data set that is decoded once and then kept by its workers has steps without a block, so both are bounded.
        while self._end - self._position < _AHEAD_BLOCKS and len(self._ends) < _AHEAD_BLOCKS:
            found = next(self._steps, None)
            if found is None:
                break
            epoch, step, blocks = found
            self._end += len(blocks)
            self._ends.append((epoch, step, self._end))
            parts.append(blocks)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _give_up(self, error: DataError) -> None:
        # The text alone: a record that keeps the error would keep its frames, and with them the loader.
        _log.warning("the cache fetches nothing ahead until the next epoch: %s", str(error))
        self.close()


def _future(index: Index, sampler: ScheduleSampler, epoch: int, first: Place) -> Iterator[_Step]:
    """Yield epoch, step and the blocks that are first needed in it, for this epoch and all that follow."""
    lengths = index.blocks.length
    buffered = max(1, int(_BUFFERED_BYTES // max(1, int(lengths.mean()))))
    # When each block was planned last, counted in planned blocks.
    last = np.full(index.num_blocks, -buffered - 1, np.int64)
    planned = 0
    while True:
        step = first.step
        for samples in planned_steps(sampler, epoch, first):
            for own in samples:
                blocks = np.unique(index.locate(own)[0])
                blocks = blocks[planned - last[blocks] > buffered]
                last[blocks] = planned + np.arange(len(blocks))
                planned += len(blocks)
                yield epoch, step, blocks
                step += 1
        if step == first.step == 0:
            return  # an epoch without a step has none after it either
        epoch, first = epoch + 1, Place(0, 0)


def _look_up(order: Any, waiting: list[npt.NDArray[np.int64]]) -> list[npt.NDArray[np.int64]]:
    samples = order.at(np.concatenate(waiting))
    return np.split(samples, np.cumsum([len(positions) for positions in waiting[:-1]]))
