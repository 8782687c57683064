"""Batchings: how the positions of an epoch become global batches.

A batching takes the epoch in windows of `window_samples` positions and plans each window alone, by a pure function of
the order, the epoch and the window; nothing is carried over. So the place in an epoch is one number, the positions
consumed, and going on from it means planning one window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from connectors.errors import BadInputError
from dataflow.order.shuffle import Order

__all__ = ["Batching", "FixedBatches", "GlobalBatch", "Steps"]

# A window of a fixed batching: 2 MB of positions, so that even a rank of a thousand looks up hundreds at once.
_FIXED_WINDOW_SAMPLES = 1 << 18


@dataclass(frozen=True, slots=True, eq=False)
class GlobalBatch:
    """What all replicas together read in one step.

    Attributes:
        order: The epoch's order. positions: int64, the positions of the order that are read, unit by unit. unit_starts:
            int64, the first of `positions` of each unit, then their number; None where each position is a unit.
        num_padding: How many units at the end only repeat others, so that the batch is full. Only where each position
            is a unit.
    """

    order: Order
    positions: npt.NDArray[np.int64]
    unit_starts: npt.NDArray[np.int64] | None
    num_padding: int

    @property
    def num_units(self) -> int:
        """How many parts that are never divided: samples, or packs of samples."""
        return len(self.positions) if self.unit_starts is None else len(self.unit_starts) - 1

    def samples(self) -> npt.NDArray[np.int64]:
        """Return the sample numbers, unit by unit."""
        return self.order.at(self.positions)

    def unit_sums(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Add up one value per sample over each unit."""
        if self.unit_starts is None:
            return values
        sums: npt.NDArray[Any] = np.add.reduceat(values, self.unit_starts[:-1])
        return sums

    def positions_of(self, units: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the positions of some units, unit by unit."""
        if self.unit_starts is None:
            return self.positions[units]
        starts, lengths = self.unit_starts[units], np.diff(self.unit_starts)[units]
        ends = np.cumsum(lengths)
        inside = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
        return np.asarray(self.positions[np.repeat(starts, lengths) + inside])


@dataclass(frozen=True, slots=True, eq=False)
class Steps:
    """The global batches of one window, as columns.

    Attributes:
        positions: int64, batch by batch and unit by unit. Without padding: each position of the window at most once.
        unit_starts: int64, number of units + 1, into `positions`; None where each position is a unit.
        step_starts: int64, number of batches + 1, into the units.
        num_padding: Units at the end of the last batch that only repeat others; only where each position is a unit.
    """

    positions: npt.NDArray[np.int64]
    unit_starts: npt.NDArray[np.int64] | None
    step_starts: npt.NDArray[np.int64]
    num_padding: int = 0

    def __len__(self) -> int:
        """The number of global batches."""
        return len(self.step_starts) - 1

    def batch(self, order: Order, step: int) -> GlobalBatch:
        """Return one global batch, counted inside the window."""
        first, last = self.step_starts[step : step + 2].tolist()
        padding = self.num_padding if step == len(self) - 1 else 0
        if self.unit_starts is None:
            return GlobalBatch(order, self.positions[first:last], None, padding)
        starts = self.unit_starts[first : last + 1]
        return GlobalBatch(order, self.positions[starts[0] : starts[-1]], starts - starts[0], padding)

    def consumed(self) -> npt.NDArray[np.int64]:
        """Return how many positions of the window are used up before each batch, and after the last."""
        ends = self.step_starts.copy() if self.unit_starts is None else self.unit_starts[self.step_starts]
        ends[-1] -= self.num_padding
        return ends


class Batching(Protocol):
    """Turns windows of an epoch into global batches. Immutable; may be shared and pickled."""

    @property
    def window_samples(self) -> int:
        """Positions in one window; only the last of an epoch has fewer."""
        ...

    def plan(self, order: Order, epoch: int, start: int, stop: int) -> Steps:
        """Return the global batches of the window `[start, stop)`, none of them empty."""
        ...

    def count_steps(self, num_samples: int) -> int | None:
        """Return the number of global batches of an epoch, or None where only planning tells."""
        ...

    def identity(self) -> dict[str, Any]:
        """Return as plain JSON what decides the batches, for a state to be compared with."""
        ...


@dataclass(frozen=True, slots=True)
class FixedBatches:
    """Global batches of a fixed number of samples, in the order's own sequence.

    Attributes:
        global_batch_size: Samples in one step over all replicas.
        tail: What becomes of the last samples of an epoch when they do not fill a batch: "short" keeps them as they
            are, "drop" leaves them out, "pad" fills up with samples from the beginning of the epoch, flagged as
            padding.
    """

    global_batch_size: int
    tail: Literal["short", "drop", "pad"]

    def __post_init__(self) -> None:
        if self.global_batch_size < 1:
            raise BadInputError(f"global_batch_size must be >= 1, got {self.global_batch_size}")
        if self.tail not in ("short", "drop", "pad"):
            raise BadInputError(f'tail must be "short", "drop" or "pad", got {self.tail!r}')

    @property
    def window_samples(self) -> int:
        """See `Batching`."""
        return self.global_batch_size * max(1, _FIXED_WINDOW_SAMPLES // self.global_batch_size)

    def plan(self, order: Order, epoch: int, start: int, stop: int) -> Steps:
        """See `Batching`."""
        whole, rest = divmod(stop - start, self.global_batch_size)
        step_starts = np.arange(whole + 1, dtype=np.int64) * self.global_batch_size
        positions = np.arange(start, stop, dtype=np.int64)
        if not rest:
            return Steps(positions, None, step_starts)
        if self.tail == "drop":
            return Steps(positions[: whole * self.global_batch_size], None, step_starts)
        num_padding = self.global_batch_size - rest if self.tail == "pad" else 0
        padding = np.arange(num_padding, dtype=np.int64) % len(order)
        positions = np.concatenate([positions, padding])
        return Steps(positions, None, np.append(step_starts, len(positions)), num_padding)

    def count_steps(self, num_samples: int) -> int:
        """See `Batching`."""
        whole, rest = divmod(num_samples, self.global_batch_size)
        return whole + (1 if rest and self.tail != "drop" else 0)

    def identity(self) -> dict[str, Any]:
        """See `Batching`."""
        return {
            "global_batch_size": self.global_batch_size,
            "drop_last": self.tail == "drop",
            "pad_last": self.tail == "pad",
        }
