"""Balancing cost inside a global batch: parts of equal counts and near equal cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dataflow.order.batching import GlobalBatch
from dataflow.order.split import by_owner

__all__ = ["BalancedParts"]


@dataclass(frozen=True, slots=True, eq=False)
class BalancedParts:
    """Deals units so that the most expensive part costs little more than the mean.

    Units go out in rounds of one per replica, most expensive first, the replica with the least cost so far choosing
    the most expensive of the round: longest-processing-time-first (Graham, 1969) under the condition that counts differ
    by at most one, so gradients need no weights beyond rounding.

    Attributes:
        costs: One number >= 0 per sample number (bytes, tokens, measured decode time); may be a memory map.
    """

    costs: npt.NDArray[Any]

    def assign(
        self, batch: GlobalBatch, num_units: int, num_parts: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """See `Division`."""
        cost = batch.unit_sums(np.asarray(self.costs[batch.samples()], dtype=np.float64))[:num_units]
        dearest_first = np.argsort(-cost, kind="stable")
        load = np.zeros(num_parts)
        owner = np.empty(num_units, dtype=np.int64)
        for first in range(0, num_units, num_parts):
            units = dearest_first[first : first + num_parts]
            lightest = np.argsort(load, kind="stable")[: len(units)]
            owner[units] = lightest
            load[lightest] += cost[units]
        return by_owner(owner, num_parts)
