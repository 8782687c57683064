"""What an epoch will be for every replica, found by walking the very schedule that training walks. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from connectors.errors import BadInputError
from dataflow.order.mixture import Mixture
from dataflow.order.schedule import Schedule
from dataflow.order.source import Source
from dataflow.order.split import Division, divide, part_starts

__all__ = ["BlockTable", "EpochPlan", "ReplicaPlan", "SourcePlan", "plan_epoch"]

# Which replica touches which block is a table of this many cells at most (one byte each).
_MAX_CELLS = 1 << 28


@dataclass(frozen=True, slots=True, eq=False)
class BlockTable:
    """The columns of an index that a plan needs.

    Attributes:
        first_sample: int64, number of blocks + 1.
        length: int64, bytes of each block.
    """

    first_sample: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]

    @classmethod
    def joined(cls, tables: Sequence[BlockTable]) -> BlockTable:
        """Put the tables of some datasets one after the other, as sample numbers of a mixture count."""
        firsts = np.cumsum([0, *(int(table.first_sample[-1]) for table in tables)])
        bounds = [table.first_sample[:-1] + first for table, first in zip(tables, firsts, strict=False)]
        return cls(np.concatenate([*bounds, firsts[-1:]]), np.concatenate([table.length for table in tables]))


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    """What one replica reads in the walked steps.

    Attributes:
        num_samples: Samples, padding left out.
        num_padding: Samples that only fill up the last batch.
        sample_bytes: Bytes of its samples, each taken as the average of its block.
        num_blocks: Different blocks that hold them; None where the table would not fit (see `plan_epoch`).
        block_bytes: Bytes of those blocks: what it moves when it keeps each block until its last use.
    """

    num_samples: int
    num_padding: int
    sample_bytes: int
    num_blocks: int | None
    block_bytes: int | None


@dataclass(frozen=True, slots=True)
class SourcePlan:
    """What the walked steps take from one dataset of a mixture, or from the only one.

    Attributes:
        num_samples: Samples that it has to give, once in each epoch of its own.
        num_reads: Samples read from it, padding left out.
        share: Share of all reads.
        own_epochs: Epochs of its own that are begun, or gone on with, in this epoch.
        num_dropped: Reads missing: samples that the own epochs that lie in this epoch owe; None when not all steps
            were walked.
        num_repeated: Reads too many: samples that came more often than there are own epochs to read them in.
    """

    num_samples: int
    num_reads: int
    share: float
    own_epochs: int
    num_dropped: int | None
    num_repeated: int


@dataclass(frozen=True, slots=True)
class EpochPlan:
    """An epoch, or its first steps.

    Attributes:
        epoch: Which.
        num_samples: Positions of the epoch.
        num_steps: Steps of the epoch, the same on every rank; where samples' lengths decide, the walked steps.
        walked_steps: Steps that the figures below cover.
        batch_units: Smallest and largest number of units in a global batch.
        part_units: Smallest and largest number of units in a replica's part of a step.
        num_dropped: Samples of the epoch that no step reads; None when not all steps were walked.
        num_repeated: Reads of a sample that was read before, padding left out; of a mixture, before in the same epoch
            of its own dataset.
        balance_units: Mean over steps of the largest part over the mean part, in units; 1.0 is perfect.
        balance_bytes: The same in bytes of samples.
        balance_costs: The same in the costs given; None where none were.
        equal_costs: What `balance_costs` would be with parts of equal counts dealt in order.
        sources: One entry per dataset.
        replicas: One entry per replica.
    """

    epoch: int
    num_samples: int
    num_steps: int
    walked_steps: int
    batch_units: tuple[int, int]
    part_units: tuple[int, int]
    num_dropped: int | None
    num_repeated: int
    balance_units: float
    balance_bytes: float
    balance_costs: float | None
    equal_costs: float | None
    sources: tuple[SourcePlan, ...]
    replicas: tuple[ReplicaPlan, ...]


def plan_epoch(
    schedule: Schedule,
    division: Division,
    num_replicas: int,
    blocks: BlockTable,
    *,
    epoch: int,
    max_steps: int | None,
    costs: npt.NDArray[Any] | None = None,
) -> EpochPlan:
    """Walk an epoch and add up what each replica reads.

    Costs about a microsecond and two bytes of memory a sample. Blocks are counted per replica while replicas times
    blocks stay below 2^28.

    Args:
        schedule: The epoch's global batches; sample numbers must lie inside `blocks`.
        division: How batches are dealt.
        num_replicas: To how many.
        blocks: Where samples lie.
        epoch: Which epoch.
        max_steps: Walk only so many steps; None walks all and finds what is dropped.
        costs: What each sample costs its replica, such as its length; to find how even that is.

    Raises:
        BadInputError: `num_replicas` or `max_steps` is below 1.
    """
    if num_replicas < 1 or (max_steps is not None and max_steps < 1):
        raise BadInputError(f"num_replicas and max_steps must be >= 1, got {num_replicas} and {max_steps}")
    plan = schedule.epoch(epoch)
    tally = _Tally(blocks, num_replicas, costs)
    for batch in islice(plan.batches(), max_steps):
        parts = divide(division, batch, num_replicas)
        tally.add(
            samples=plan.order.at(batch.positions_of(parts.units)),
            units=np.diff(parts.starts),
            samples_per_unit=None if batch.unit_starts is None else np.diff(batch.unit_starts)[parts.units],
            padding=parts.num_padding,
        )
        if costs is not None:
            tally.add_equal(batch.unit_sums(np.asarray(costs[batch.samples()])))
    return tally.result(schedule, epoch, all_walked=max_steps is None)


class _Tally:
    """Adds up steps."""

    def __init__(self, blocks: BlockTable, num_replicas: int, costs: npt.NDArray[Any] | None) -> None:
        self._blocks = blocks
        self._costs = costs
        num_samples, num_blocks = int(blocks.first_sample[-1]), len(blocks.length)
        self._sample_bytes = blocks.length / np.maximum(np.diff(blocks.first_sample), 1)
        self._reads = np.zeros(num_samples, dtype=np.uint16)
        fits = num_replicas * num_blocks <= _MAX_CELLS
        self._touched = np.zeros((num_replicas, num_blocks), dtype=bool) if fits else None
        self._samples, self._padding = (np.zeros(num_replicas, dtype=np.int64) for _ in range(2))
        self._bytes = np.zeros(num_replicas)
        self._batch_units: list[int] = []
        self._part_units: list[tuple[int, int]] = []
        self._imbalance = np.zeros(3)
        self._equal_imbalance = 0.0
        self.num_steps = 0

    def add(
        self,
        *,
        samples: npt.NDArray[np.int64],
        units: npt.NDArray[np.int64],
        samples_per_unit: npt.NDArray[np.int64] | None,
        padding: npt.NDArray[np.int64],
    ) -> None:
        num_replicas = len(units)
        owner = np.repeat(np.arange(num_replicas), units)
        real = np.arange(len(owner)) < np.repeat(np.cumsum(units) - padding, units)
        if samples_per_unit is not None:
            owner, real = np.repeat(owner, samples_per_unit), np.repeat(real, samples_per_unit)
        block = np.searchsorted(self._blocks.first_sample, samples, side="right") - 1
        moved = np.bincount(owner, self._sample_bytes[block], num_replicas)
        different, times = np.unique(samples[real], return_counts=True)
        self._reads[different] += times.astype(np.uint16)
        if self._touched is not None:
            self._touched[owner, block] = True
        self._samples += np.bincount(owner[real], minlength=num_replicas)
        self._padding += padding
        self._bytes += moved
        cost = units if self._costs is None else np.bincount(owner, self._costs[samples], num_replicas)
        self._imbalance += [_largest_over_mean(part) for part in (units, moved, cost)]
        self._batch_units.append(int(units.sum()))
        self._part_units.append((int(units.min()), int(units.max())))
        self.num_steps += 1

    def add_equal(self, unit_costs: npt.NDArray[Any]) -> None:
        """Compare: what the step would cost each replica if its units were dealt in order."""
        num_replicas = len(self._samples)
        owner = np.repeat(np.arange(num_replicas), np.diff(part_starts(len(unit_costs), num_replicas)))
        self._equal_imbalance += _largest_over_mean(np.bincount(owner, unit_costs, num_replicas))

    def result(self, schedule: Schedule, epoch: int, *, all_walked: bool) -> EpochPlan:
        num_samples = schedule.source.num_samples
        num_steps = schedule.batching.count_steps(num_samples)
        balance = self._imbalance / self.num_steps if self.num_steps else np.ones(3)
        equal = self._equal_imbalance / self.num_steps if self.num_steps else 1.0
        sources = tuple(_source_plans(schedule.source, epoch, self._reads, all_walked=all_walked))
        return EpochPlan(
            epoch=epoch,
            num_samples=num_samples,
            num_steps=self.num_steps if num_steps is None else num_steps,
            walked_steps=self.num_steps,
            batch_units=(min(self._batch_units, default=0), max(self._batch_units, default=0)),
            part_units=(
                min((low for low, _ in self._part_units), default=0),
                max((high for _, high in self._part_units), default=0),
            ),
            num_dropped=sum(source.num_dropped or 0 for source in sources) if all_walked else None,
            num_repeated=sum(source.num_repeated for source in sources),
            balance_units=float(balance[0]),
            balance_bytes=float(balance[1]),
            balance_costs=None if self._costs is None else float(balance[2]),
            equal_costs=None if self._costs is None else float(equal),
            sources=sources,
            replicas=tuple(self._replica(replica) for replica in range(len(self._samples))),
        )

    def _replica(self, replica: int) -> ReplicaPlan:
        touched = None if self._touched is None else self._touched[replica]
        return ReplicaPlan(
            num_samples=int(self._samples[replica]),
            num_padding=int(self._padding[replica]),
            sample_bytes=int(self._bytes[replica]),
            num_blocks=None if touched is None else int(touched.sum()),
            block_bytes=None if touched is None else int(self._blocks.length[touched].sum()),
        )


def _largest_over_mean(parts: npt.NDArray[Any]) -> float:
    return float(parts.max() / parts.mean()) if parts.any() else 1.0


def _source_plans(
    source: Source, epoch: int, reads: npt.NDArray[np.uint16], *, all_walked: bool
) -> Iterator[SourcePlan]:
    """Compare how often each sample number was read with how often each dataset's own epochs have it."""
    num_reads = max(int(reads.sum(dtype=np.int64)), 1)
    for num_samples, own, given, widest, surest in _stretches(source, epoch, reads):
        begun = -(-widest[1] // num_samples) - widest[0] // num_samples
        whole = max(0, surest[1] // num_samples + -surest[0] // num_samples)
        least, most = np.minimum(own, whole), np.minimum(own, begun)
        owed = (whole * num_samples - int(least.sum(dtype=np.int64)), given - int(most.sum(dtype=np.int64)))
        total = int(own.sum(dtype=np.int64))
        yield SourcePlan(
            num_samples=num_samples,
            num_reads=total,
            share=total / num_reads,
            own_epochs=begun,
            num_dropped=max(owed) if all_walked else None,
            num_repeated=total - int(most.sum(dtype=np.int64)),
        )


def _stretches(
    source: Source, epoch: int, reads: npt.NDArray[np.uint16]
) -> Iterator[tuple[int, npt.NDArray[np.uint16], int, tuple[int, int], tuple[int, int]]]:
    """Yield what each dataset does in an epoch.

    That is its samples, the reads of each, how many reads are planned, and from where to where in its own run of epochs
    they lie: at most, and at least, since inside a period of a mixture they come in any order.
    """
    if not isinstance(source, Mixture):
        if source.num_samples:
            only = (epoch * source.num_samples, (epoch + 1) * source.num_samples)
            yield source.num_samples, reads, source.num_samples, only, only
        return
    begin, end, period = epoch * source.num_samples, (epoch + 1) * source.num_samples, source.period
    wide = (begin // period * period, -(-end // period) * period)
    narrow = (-(-begin // period) * period, end // period * period)
    given = np.array([source.given_before(bound) for bound in (begin, end, *wide, *narrow)]).T.tolist()
    parts = np.split(reads, np.cumsum(source.num_numbers)[:-1])
    for part, own, (first, last, *borders) in zip(source.sources, parts, given, strict=True):
        low, high, sure_low, sure_high = borders
        yield part.num_samples, own, last - first, (low, high), (sure_low, sure_high)
