"""Mixing datasets in exact proportion.

After any number of periods each dataset has given its exact share, within one sample: shares are counted from the
beginning, so nothing drifts. Inside a period the slots are dealt at random. Both are computed for any position, so a
mixture is an order like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from connectors.errors import BadInputError
from dataflow.order.feistel import Permutation
from dataflow.order.shuffle import Order
from dataflow.order.source import Source

__all__ = ["Mixture", "mixture_weights"]

# Shares are whole numbers of this many parts, so that counting is exact.
_PARTS = 1 << 20


def mixture_weights(num_samples: npt.ArrayLike, temperature: float) -> npt.NDArray[np.float64]:
    """Return shares in proportion to `num_samples ** (1 / temperature)`, which sum to 1.

    Temperature 1 takes each dataset as large as it is; higher ones lift the small datasets, towards equal shares.

    >>> mixture_weights([900, 100], temperature=2.0).round(2)
    array([0.75, 0.25])
    """
    sizes = np.asarray(num_samples, dtype=np.float64)
    if not temperature > 0 or sizes.ndim != 1 or not sizes.size or not (sizes > 0).all():
        raise BadInputError(f"need a temperature above 0 and sizes above 0, got {temperature} and {sizes.tolist()}")
    scaled = (sizes / sizes.max()) ** (1 / temperature)
    return np.asarray(scaled / scaled.sum())


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """Several sources in one order. Sample numbers count through: the second dataset's begin where the first's end.

    A source that is used up begins its next epoch of its own, in a new order, while others still run; epoch `e` of the
    mixture goes on where epoch `e - 1` stopped.

    Attributes:
        sources: What is mixed.
        num_numbers: Length of each source's dataset: how many sample numbers it takes up.
        weights: Share of each source, above 0; any unit.
        epoch_samples: Positions in one epoch of the mixture.
        period: Positions over which shares are kept exactly: at most 2^20, and enough for one sample of each source.
            With the global batch size, and a multiple of it as `epoch_samples`, every batch is exact.
        seed: Any integer.
    """

    sources: tuple[Source, ...]
    num_numbers: tuple[int, ...]
    weights: tuple[float, ...]
    epoch_samples: int
    period: int
    seed: int

    def __post_init__(self) -> None:
        if not self.sources or not len(self.sources) == len(self.num_numbers) == len(self.weights):
            raise BadInputError(
                f"a mixture needs as many weights and lengths as sources, got {len(self.sources)} sources, "
                f"{len(self.num_numbers)} lengths and {len(self.weights)} weights"
            )
        if not all(0 < weight < float("inf") for weight in self.weights):
            raise BadInputError(f"weights of a mixture are positive numbers, got {self.weights}")
        if any(source.num_samples < 1 for source in self.sources):
            raise BadInputError("every source of a mixture needs at least one sample; leave empty ones out")
        if not 1 <= self.period <= _PARTS or self.epoch_samples < 0:
            raise BadInputError(
                f"period must lie in [1, 2**20] and epoch_samples be >= 0, got {self.period} and {self.epoch_samples}"
            )
        # Else rounding could take back what a source has given already.
        smallest = float(self.shares().min())
        if smallest * self.period < 1:
            raise BadInputError(
                f"the smallest share is {smallest:.2g}, less than one sample in a period of {self.period}; "
                "make the period longer, or leave the source out"
            )

    @property
    def num_samples(self) -> int:
        """See `Source`."""
        return self.epoch_samples

    def shares(self) -> npt.NDArray[np.float64]:
        """Return the exact share of each source: its weight, rounded to parts of 2^20."""
        return np.asarray(np.diff(self._borders()) / _PARTS)

    def order(self, epoch: int) -> Order:
        """See `Source`."""
        return _MixedOrder(self, epoch, self._borders())

    def given_before(self, position: int) -> npt.NDArray[np.int64]:
        """Return how many samples each source has given before a position, counted through all epochs from 0."""
        return _MixedOrder(self, 0, self._borders()).given_before(position)

    def identity(self) -> dict[str, Any]:
        """See `Source`."""
        return {
            "mixture": [source.identity() for source in self.sources],
            "num_numbers": list(self.num_numbers),
            "weights": list(self.weights),
            "epoch_samples": self.epoch_samples,
            "period": self.period,
            "mixture_seed": self.seed,
        }

    def _borders(self) -> npt.NDArray[np.int64]:
        shares = np.cumsum(self.weights) / np.sum(self.weights)
        return np.concatenate([[0], np.rint(shares * _PARTS)]).astype(np.int64)


class _MixedOrder:
    """Position -> source and place in that source's own run of epochs -> sample number."""

    def __init__(self, mixture: Mixture, epoch: int, borders: npt.NDArray[np.int64]) -> None:
        self._mixture = mixture
        self._borders = borders
        # Positions count through all epochs, so that sources go on where the epoch before left them.
        self._origin = epoch * mixture.epoch_samples
        self._slots = Permutation(mixture.seed, 0, "mixture")
        self._first_number = np.concatenate([[0], np.cumsum(mixture.num_numbers)]).astype(np.int64)
        self._orders: dict[tuple[int, int], Order] = {}

    def __len__(self) -> int:
        return self._mixture.epoch_samples

    def take(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        if not 0 <= start <= stop <= len(self):
            raise BadInputError(f"positions [{start}, {stop}) do not lie in an order of {len(self)} samples")
        return self.at(np.arange(start, stop, dtype=np.int64))

    def at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        period_samples = self._mixture.period
        period, slot = np.divmod(np.ravel(positions) + self._origin, period_samples)
        slot = self._slots.apply(slot, period_samples, period)
        before, after = self._given(period), self._given(period + 1)
        ends = np.cumsum(after - before, axis=0)
        source = (slot >= ends).sum(axis=0)
        columns = np.arange(len(slot))
        inside = slot - (ends - (after - before))[source, columns]
        place = before[source, columns] + inside
        numbers = np.empty(len(slot), dtype=np.int64)
        for which in np.unique(source).tolist():
            mine = source == which
            numbers[mine] = self._first_number[which] + self._from_source(which, place[mine])
        return numbers.reshape(np.shape(positions))

    def given_before(self, position: int) -> npt.NDArray[np.int64]:
        period, rest = divmod(position, self._mixture.period)
        before, after = self._given(np.array([period, period + 1])).T
        slots = self._slots.apply(np.arange(rest), self._mixture.period, period)
        source = np.searchsorted(np.cumsum(after - before), slots, side="right")
        return np.asarray(before + np.bincount(source, minlength=len(before)))

    def _given(self, periods: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return how many samples each source (rows) has given before each period (columns)."""
        # periods * period * border / _PARTS, rounded, in whole numbers and without an overflow.
        whole, rest = np.divmod(periods, _PARTS)
        borders, period = self._borders[:, None], self._mixture.period
        scaled = whole * period * borders + (rest * period * borders + _PARTS // 2) // _PARTS
        return np.asarray(np.diff(scaled, axis=0))

    def _from_source(self, which: int, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        source = self._mixture.sources[which]
        epochs, inside = np.divmod(places, source.num_samples)
        numbers = np.empty(len(places), dtype=np.int64)
        # A small source may run through many epochs here, so they are told apart by one sort.
        by_epoch = np.argsort(epochs, kind="stable")
        for mine in np.split(by_epoch, np.flatnonzero(np.diff(epochs[by_epoch])) + 1):
            numbers[mine] = self._order(which, int(epochs[mine[0]])).at(inside[mine])
        return numbers

    def _order(self, which: int, epoch: int) -> Order:
        order = self._orders.get((which, epoch))
        if order is None:
            # An epoch before last is not asked for again while positions grow.
            self._orders = {key: kept for key, kept in self._orders.items() if key[0] != which or key[1] == epoch - 1}
            order = self._orders[which, epoch] = self._mixture.sources[which].order(epoch)
        return order
