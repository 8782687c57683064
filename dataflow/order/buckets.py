"""Batches of samples of like length under a budget of tokens (or bytes, or pixels), padding counted.

Each window is sorted by length and cut, longest first, so that no batch costs more than the budget once its samples are
padded to its longest. Batches then go in random order. Every rank plans the same batches, so all have the same number
of steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from connectors.errors import BadInputError
from dataflow.order.batching import Steps
from dataflow.order.feistel import Permutation
from dataflow.order.lengths import check_lengths, checksum
from dataflow.order.shuffle import Order

__all__ = ["BucketBatches"]


@dataclass(frozen=True, slots=True, eq=False)
class BucketBatches:
    """Global batches of a bounded padded size.

    The last batch of each window may be short. Costs a sort of each window, and one pass over `lengths` for a state.

    Attributes:
        lengths: One integer >= 1 per sample number, in the budget's unit; may be a memory map.
        budget: Largest samples times padded length of a global batch; over all replicas.
        multiple_of: Samples per batch are a multiple of this, but for a window's last; with a multiple of the number of
            replicas their parts are equal.
        max_samples: Largest number of samples in a global batch; None for what the budget allows.
        edges: Ascending lengths that samples are padded to, each to the smallest that holds it, where the model wants
            few shapes; None pads a batch to its longest sample.
        window_samples: Samples that are sorted together: more pad less and shuffle less.
        seed: Any integer.
    """

    lengths: npt.NDArray[np.integer]
    budget: int
    multiple_of: int
    max_samples: int | None
    edges: tuple[int, ...] | None
    window_samples: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("budget", "multiple_of", "window_samples"):
            if getattr(self, name) < 1:
                raise BadInputError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.max_samples is not None and self.max_samples < self.multiple_of:
            raise BadInputError(f"max_samples {self.max_samples} is below multiple_of {self.multiple_of}")
        longest = self.budget // self.multiple_of
        if self.edges is not None:
            if list(self.edges) != sorted(set(self.edges)) or not self.edges:
                raise BadInputError(f"edges must be ascending lengths, got {self.edges}")
            longest = max((edge for edge in self.edges if edge <= longest), default=0)
        check_lengths(
            self.lengths,
            longest,
            f"{self.multiple_of} of them must fit into the budget of {self.budget}, and into the edges {self.edges}; "
            "leave them out, cut them, or allow more",
        )

    def plan(self, order: Order, epoch: int, start: int, stop: int) -> Steps:
        """See `Batching`."""
        positions = np.arange(start, stop, dtype=np.int64)
        padded = np.asarray(self.lengths[order.at(positions)], dtype=np.int64)
        if self.edges is not None:
            padded = np.array(self.edges, dtype=np.int64)[np.searchsorted(self.edges, padded)]
        by_length = np.argsort(-padded, kind="stable")
        sizes = self._cut(padded[by_length])
        shuffled = Permutation(self.seed, epoch, "steps").apply(
            np.arange(len(sizes), dtype=np.int64), len(sizes), start // self.window_samples
        )
        pieces = np.split(positions[by_length], np.cumsum(sizes)[:-1])
        step_starts = np.concatenate([[0], np.cumsum(sizes[shuffled])])
        return Steps(np.concatenate([pieces[step] for step in shuffled]), None, step_starts)

    def _cut(self, descending: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the number of samples of each batch; the first of a batch is its longest."""
        lengths, sizes, done = descending.tolist(), [], 0
        while done < len(lengths):
            size = self.budget // lengths[done]
            if self.max_samples is not None:
                size = min(size, self.max_samples)
            sizes.append(min(size - size % self.multiple_of, len(lengths) - done))
            done += sizes[-1]
        return np.array(sizes, dtype=np.int64)

    def count_steps(self, num_samples: int) -> int | None:
        """See `Batching`."""
        return None

    def identity(self) -> dict[str, Any]:
        """See `Batching`."""
        return {
            "batching": "buckets",
            "budget": self.budget,
            "multiple_of": self.multiple_of,
            "max_samples": self.max_samples,
            "edges": None if self.edges is None else list(self.edges),
            "window_samples": self.window_samples,
            "batch_seed": self.seed,
            "lengths": checksum(self.lengths),
        }
