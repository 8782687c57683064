"""Splitting one global batch among ranks: contiguous parts, disjoint and complete."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from connectors.errors import BadInputError

__all__ = ["part_bounds", "split_batch"]


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
