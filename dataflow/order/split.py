"""Dividing one global batch among replicas: disjoint, complete, and never changing the batch.

A division is the only role that knows how many replicas there are.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from connectors.errors import BadInputError
from dataflow.order.batching import GlobalBatch

__all__ = [
    "Division",
    "EqualParts",
    "Parts",
    "WeightedParts",
    "by_owner",
    "divide",
    "part_bounds",
    "part_starts",
    "split_batch",
]


def part_bounds(length: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return where the part of `rank` starts and stops in a global batch of `length` samples.

    The parts of all ranks follow each other without gap or overlap, and their sizes differ by at most one. With fewer
    samples than ranks some parts are empty.

    >>> [part_bounds(10, rank, 4) for rank in range(4)]
    [(0, 2), (2, 5), (5, 7), (7, 10)]

    Raises:
        BadInputError: Not `0 <= rank < world_size`.
    """
    if not 0 <= rank < world_size:
        raise BadInputError(f"rank must lie in [0, world_size), got rank {rank} of world size {world_size}")
    return rank * length // world_size, (rank + 1) * length // world_size


def split_batch(samples: npt.NDArray[np.int64], rank: int, world_size: int) -> npt.NDArray[np.int64]:
    """Return the part of a global batch that `rank` reads, as a view.

    >>> split_batch(np.array([7, 3, 9, 4, 1]), rank=1, world_size=2)
    array([9, 4, 1])
    """
    start, stop = part_bounds(len(samples), rank, world_size)
    return samples[start:stop]


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """Which units of a global batch each replica reads.

    Attributes:
        units: int64, each unit of the batch once, part by part.
        starts: int64, number of replicas + 1, into `units`.
        num_padding: int64 per replica: how many units at the end of its part only repeat others.
    """

    units: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    num_padding: npt.NDArray[np.int64]

    def of(self, replica: int) -> npt.NDArray[np.int64]:
        """Return the units of one replica, its padding last."""
        return self.units[self.starts[replica] : self.starts[replica + 1]]

    def gradient_weight(self, replica: int) -> float:
        """Return the factor that makes the average over replicas equal the average over the global batch.

        Each replica takes the mean loss of its own units that are not padding, multiplies it by this, and gradients are
        averaged over replicas as ever. Equal parts give 1.0, a part without such units 0.0.
        """
        real = np.diff(self.starts) - self.num_padding
        return float(real[replica] * len(real) / real.sum())


class Division(Protocol):
    """A way to deal the units of a global batch to replicas. Immutable; the same on every rank."""

    def assign(
        self, batch: GlobalBatch, num_units: int, num_parts: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Deal the first `num_units` units of `batch`.

        Returns:
            The units part by part, and where each part starts (`num_parts + 1` entries).
        """
        ...


def by_owner(owner: npt.NDArray[np.int64], num_parts: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return what `Division.assign` returns, given the part that each unit goes to."""
    starts = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=num_parts))])
    return np.argsort(owner, kind="stable"), starts


def part_starts(num_units: int, num_parts: int) -> npt.NDArray[np.int64]:
    """Return where each of some equal, contiguous parts starts, then where the last stops."""
    return np.arange(num_parts + 1, dtype=np.int64) * num_units // num_parts


@dataclass(frozen=True, slots=True)
class EqualParts:
    """Contiguous parts whose sizes differ by at most one."""

    def assign(
        self, batch: GlobalBatch, num_units: int, num_parts: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """See `Division`."""
        parts = _equal_parts(num_units, num_parts)
        return parts.units, parts.starts


# Nearly all batches of an epoch have the same size.
@lru_cache(maxsize=2)
def _equal_parts(num_units: int, num_parts: int) -> Parts:
    units, starts = np.arange(num_units, dtype=np.int64), part_starts(num_units, num_parts)
    num_padding = np.zeros(num_parts, dtype=np.int64)
    for array in (units, starts, num_padding):
        array.flags.writeable = False
    return Parts(units, starts, num_padding)


@dataclass(frozen=True, slots=True)
class WeightedParts:
    """Contiguous parts in proportion to the speed of each replica, every size within one of its exact share.

    Attributes:
        weights: One positive number per replica, in any unit.
    """

    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.weights or not all(0 < weight < float("inf") for weight in self.weights):
            raise BadInputError(f"weights must be positive numbers, one per replica, got {self.weights}")

    def assign(
        self, batch: GlobalBatch, num_units: int, num_parts: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """See `Division`."""
        if len(self.weights) != num_parts:
            raise BadInputError(f"got {len(self.weights)} weights for {num_parts} replicas")
        shares = np.cumsum(self.weights) / sum(self.weights)
        ends = np.rint(shares * num_units).astype(np.int64)
        ends[-1] = num_units
        return np.arange(num_units, dtype=np.int64), np.concatenate([[0], ends])


def divide(division: Division, batch: GlobalBatch, num_parts: int) -> Parts:
    """Divide a global batch among replicas; padding goes one by one to the part that is smallest by then."""
    num_real = batch.num_units - batch.num_padding
    if not batch.num_padding and isinstance(division, EqualParts):
        return _equal_parts(num_real, num_parts)
    units, starts = division.assign(batch, num_real, num_parts)
    if not batch.num_padding:
        return Parts(units, starts, np.zeros(num_parts, dtype=np.int64))
    filled = [(int(size), part) for part, size in enumerate(np.diff(starts))]
    heapq.heapify(filled)
    padding: list[list[int]] = [[] for _ in range(num_parts)]
    for unit in range(num_real, batch.num_units):
        size, part = filled[0]
        padding[part].append(unit)
        heapq.heapreplace(filled, (size + 1, part))
    num_padding = np.array([len(units) for units in padding], dtype=np.int64)
    pieces = [np.append(units[starts[part] : starts[part + 1]], padding[part]) for part in range(num_parts)]
    starts = starts + np.concatenate([[0], np.cumsum(num_padding)])
    return Parts(np.concatenate(pieces).astype(np.int64), starts, num_padding)
