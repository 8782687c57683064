"""Telling the cache what a sampler will ask for.

    schedule -> this rank's samples, step by step -> `Announcer`
    sampler  -> a rehearsal of it                 -> `Announcer`

Orders answer any position, so foreseeing a schedule costs a second look-up of the sample numbers, and touches neither
the sampler nor a generator of random numbers. What other samplers will yield is found by rehearsing
(`dataflow.loaders.rehearsal`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from cache.block_table import MAX_TABLE_BLOCKS
from cache.reader import TakesPlans
from dataflow.index import Index
from dataflow.loaders.announcer import Announcer, Step
from dataflow.loaders.order_state import is_elastic
from dataflow.loaders.rehearsal import RehearsedForesight, Setting
from dataflow.loaders.schedule_sampler import ScheduleSampler, look_up
from dataflow.order import GlobalBatch, Place, divide

if TYPE_CHECKING:
    from dataflow.dataset import Dataset

__all__ = ["Foresight", "ScheduleForesight", "foresee"]

# Naming a shard takes 15 us, and with a file a sample the table would take longer than it saves.
_MAX_SHARDS = 1 << 16


class Foresight(Protocol):
    """What an iterator tells of its progress. Belongs to the thread that iterates."""

    def prepare(self, setting: Setting) -> None:
        """An epoch is about to begin: the sampler, and all generators, are as they were before torch drew from them."""
        ...

    def begin(self) -> None:
        """The sampler begins an epoch, or goes on in one. Where that was announced, there is nothing to do."""
        ...

    def drew(self, step: int, indices: Any) -> None:
        """The sampler yielded this in a step of the epoch."""
        ...

    def passed(self, steps: int) -> None:
        """The first `steps` steps of the current epoch were handed out."""
        ...

    def close(self) -> None:
        """End the plan."""
        ...


def foresee(dataset: Any, sampler: Any) -> Foresight | None:
    """Return what announces a sampler's future, None where the dataset or the reader has no use for it."""
    index, reader = getattr(dataset, "index", None), getattr(dataset, "reader", None)
    if not (isinstance(index, Index) and isinstance(reader, TakesPlans)):
        return None
    if not (0 < len(index.ranges) <= MAX_TABLE_BLOCKS and len(index.shards) <= _MAX_SHARDS):
        return None
    if isinstance(sampler, ScheduleSampler):
        return ScheduleForesight(dataset, sampler)
    return None if is_elastic(sampler) else RehearsedForesight(dataset)


class ScheduleForesight:
    """See `Foresight`: the future of a schedule.

    Args:
        dataset: Gives the block table and the reader.
        sampler: Gives the order.
    """

    def __init__(self, dataset: Dataset, sampler: ScheduleSampler) -> None:
        self._announcer = Announcer(dataset)
        self._sampler = sampler

    def prepare(self, setting: Setting) -> None:
        """Nothing is needed: a schedule answers any position."""

    def begin(self) -> None:
        """See `Foresight.begin`."""
        epoch, first = self._sampler.epoch, self._sampler._run.first
        if not self._announcer.expects(epoch, first.step):
            self._announcer.begin(epoch, first.step, _scheduled(self._sampler, epoch, first))

    def drew(self, step: int, indices: Any) -> None:
        """Nothing is needed: it is what the schedule says."""

    def passed(self, steps: int) -> None:
        """See `Foresight.passed`."""
        self._announcer.passed(steps)

    def close(self) -> None:
        """See `Foresight.close`."""
        self._announcer.close()


def _planned_steps(sampler: ScheduleSampler, epoch: int, first: Place) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the sample numbers of this rank, step by step, from a place in an epoch to the epoch's end."""
    plan, division = sampler.schedule.epoch(epoch), sampler.division_of(epoch)

    def own(_: int, batch: GlobalBatch) -> npt.NDArray[np.int64]:
        return divide(division, batch, sampler.num_replicas).of(sampler.replica)

    window, inside = plan.enter(first.position) if first.position else (0, 0)
    while window < plan.num_windows:
        for _, _, samples in look_up(plan, window, inside, own):
            yield samples
        window, inside = window + 1, 0


def _scheduled(sampler: ScheduleSampler, epoch: int, first: Place) -> Iterator[Step]:
    """Yield the steps of this epoch, from a place in it, and of all that follow."""
    while True:
        step = first.step
        for samples in _planned_steps(sampler, epoch, first):
            yield epoch, step, samples
            step += 1
        if step == first.step == 0:
            return  # an epoch without a step has none after it either
        epoch, first = epoch + 1, Place(0, 0)
