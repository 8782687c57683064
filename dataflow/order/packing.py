"""Sequence packing: several documents fill one row of a fixed number of tokens.

Each window is packed by first-fit decreasing (Johnson, "Near-Optimal Bin Packing Algorithms", 1973: at most 11/9 of the
fewest rows, plus one), the packs go in random order, and a step takes a fixed number of them. A pack is never divided
between ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from connectors.errors import BadInputError
from dataflow.order.batching import Steps
from dataflow.order.feistel import Permutation
from dataflow.order.lengths import check_lengths, checksum
from dataflow.order.shuffle import Order

__all__ = ["Pack", "PackedBatches", "first_fit_decreasing", "lay_out_pack"]


def first_fit_decreasing(lengths: npt.NDArray[np.integer], capacity: int) -> npt.NDArray[np.int64]:
    """Return the pack of each item: longest items first, each into the first pack that still has room.

    All items of one length are placed at once, so the cost follows the number of different lengths more than that of
    items.

    >>> first_fit_decreasing(np.array([3, 7, 5, 2, 3]), capacity=10)
    array([0, 0, 1, 1, 1])

    Args:
        lengths: Integers from 1 to `capacity`.
        capacity: What a pack holds.
    """
    descending = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    values, counts = np.unique(lengths, return_counts=True)
    packs = np.empty(len(lengths), dtype=np.int64)
    room = np.full(len(lengths), capacity, dtype=np.int64)
    num_opened = done = 0
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        # As many new packs as there are items always suffice.
        fitting = np.flatnonzero(room[: num_opened + count] >= length)[:count]
        taken = room[fitting] // length
        placed = np.cumsum(taken)
        last = int(np.searchsorted(placed, count))
        fitting, taken = fitting[: last + 1], taken[: last + 1]
        taken[last] -= placed[last] - count
        room[fitting] -= taken * length
        packs[descending[done : done + count]] = np.repeat(fitting, taken)
        num_opened = max(num_opened, int(fitting[-1]) + 1)
        done += count
    return packs


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatches:
    """Global batches of a fixed number of packs.

    The last batch of each window may have fewer.

    Attributes:
        lengths: Tokens of each sample number, integers from 1 to `capacity`; may be a memory map.
        capacity: Tokens in a pack.
        packs_per_step: Packs in one step over all replicas.
        window_samples: Samples that are packed together: more leave less empty and mix packs better.
        seed: Any integer.
    """

    lengths: npt.NDArray[np.integer]
    capacity: int
    packs_per_step: int
    window_samples: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("capacity", "packs_per_step", "window_samples"):
            if getattr(self, name) < 1:
                raise BadInputError(f"{name} must be >= 1, got {getattr(self, name)}")
        check_lengths(self.lengths, self.capacity, "a pack holds no more; cut such samples when converting, or filter")

    def plan(self, order: Order, epoch: int, start: int, stop: int) -> Steps:
        """See `Batching`."""
        positions = np.arange(start, stop, dtype=np.int64)
        packs = first_fit_decreasing(self.lengths[order.at(positions)], self.capacity)
        num_packs = int(packs.max(initial=-1)) + 1
        # First-fit fills the first packs with the longest documents; training must not see them in this order.
        packs = Permutation(self.seed, epoch, "packs").apply(packs, num_packs, start // self.window_samples)
        starts = np.concatenate([[0], np.cumsum(np.bincount(packs, minlength=num_packs))])
        step_starts = np.append(np.arange(0, num_packs, self.packs_per_step, dtype=np.int64), num_packs)
        return Steps(positions[np.argsort(packs, kind="stable")], starts, step_starts)

    def count_steps(self, num_samples: int) -> int | None:
        """See `Batching`."""
        return None

    def identity(self) -> dict[str, Any]:
        """See `Batching`."""
        return {
            "batching": "packed",
            "capacity": self.capacity,
            "packs_per_step": self.packs_per_step,
            "window_samples": self.window_samples,
            "batch_seed": self.seed,
            "lengths": checksum(self.lengths),
        }


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """One row of tokens with the borders of its documents.

    Attributes:
        tokens: Documents one after the other, then filling; dtype of the documents.
        position_ids: int64, the place of each token in its own document; 0 in the filling.
        document_ids: int64, which document each token belongs to, from 0; -1 in the filling.
        boundaries: int32, where each document starts, and where the last ends (the `cu_seqlens` of variable-length
            attention kernels).
    """

    tokens: npt.NDArray[Any]
    position_ids: npt.NDArray[np.int64]
    document_ids: npt.NDArray[np.int64]
    boundaries: npt.NDArray[np.int32]


def lay_out_pack(documents: Sequence[npt.NDArray[Any]], capacity: int, filling: int) -> Pack:
    """Lay documents out in one row.

    Args:
        documents: At least one, one-dimensional, of one dtype.
        capacity: Length of the row.
        filling: Token that stands behind the last document.

    Raises:
        BadInputError: The documents do not fit.
    """
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    ends = np.cumsum(lengths)
    if not len(ends) or ends[-1] > capacity:
        raise BadInputError(f"documents of {lengths.tolist()} tokens do not make a pack of {capacity}")
    tokens = np.full(capacity, filling, dtype=documents[0].dtype)
    np.concatenate(documents, out=tokens[: ends[-1]])
    position_ids, document_ids = np.zeros(capacity, dtype=np.int64), np.full(capacity, -1, dtype=np.int64)
    position_ids[: ends[-1]] = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    document_ids[: ends[-1]] = np.repeat(np.arange(len(lengths)), lengths)
    return Pack(tokens, position_ids, document_ids, np.concatenate([[0], ends]).astype(np.int32))
