"""Giving each sample of a global batch to a rank whose node already holds it.

The batch keeps its samples and every part its size; only who reads what changes. So the averaged gradient is the same
up to the order of summation, and no resume is affected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from connectors.errors import BadInputError
from dataflow.order.batching import GlobalBatch
from dataflow.order.split import EqualParts, by_owner

__all__ = ["LocalParts"]


@dataclass(frozen=True, slots=True, eq=False)
class LocalParts:
    """Equal parts that keep as many units as possible on the node that holds them.

    Attributes:
        home: Sample numbers (int64) -> the number of the node that holds each, or a negative one for none; a pure
            function, the same on every rank.
        node_of_replica: The node on which each replica runs.
    """

    home: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]
    node_of_replica: tuple[int, ...]

    def assign(
        self, batch: GlobalBatch, num_units: int, num_parts: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """See `Division`."""
        if len(self.node_of_replica) != num_parts:
            raise BadInputError(f"got the nodes of {len(self.node_of_replica)} replicas, and there are {num_parts}")
        sizes = np.diff(EqualParts().assign(batch, num_units, num_parts)[1])
        nodes, node_of_replica = np.unique(self.node_of_replica, return_inverse=True)
        room = np.bincount(node_of_replica, sizes, len(nodes)).astype(np.int64)
        node_of_unit = self._fill(self._homes(batch, num_units, nodes), room)
        # Both sorted by node: its units then line up with the places of its replicas.
        replicas = np.argsort(node_of_replica, kind="stable")
        owner = np.empty(num_units, dtype=np.int64)
        owner[np.argsort(node_of_unit, kind="stable")] = np.repeat(replicas, sizes[replicas])
        return by_owner(owner, num_parts)

    def _homes(self, batch: GlobalBatch, num_units: int, nodes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return each unit's home as a row of `nodes`, `len(nodes)` for none; of a pack, the first sample counts."""
        first = slice(num_units) if batch.unit_starts is None else batch.unit_starts[:num_units]
        home = np.asarray(self.home(batch.order.at(batch.positions[first])))
        row = np.minimum(np.searchsorted(nodes, home), len(nodes) - 1)
        return np.where(nodes[row] == home, row, len(nodes))

    @staticmethod
    def _fill(home: npt.NDArray[np.int64], room: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the node of each unit: its home while there is room, else wherever room is left."""
        by_home = np.argsort(home, kind="stable")
        counts = np.bincount(home, minlength=len(room) + 1)
        turn = np.arange(len(home)) - np.repeat(np.cumsum(counts) - counts, counts)
        stays = np.empty(len(home), dtype=bool)
        stays[by_home] = turn < np.append(room, 0)[home[by_home]]
        node = home.copy()
        left = room - np.bincount(home[stays], minlength=len(room))[: len(room)]
        node[~stays] = np.repeat(np.arange(len(room)), left)
        return node
