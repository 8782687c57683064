"""Which ranks work on the same samples: tensor, pipeline and context parallel peers are one replica."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from connectors.errors import BadInputError

__all__ = ["Mesh"]


@dataclass(frozen=True, slots=True, eq=False)
class Mesh:
    """A grid of ranks, some of whose axes divide the data; along all others ranks read identical samples.

    Attributes:
        ranks: int64, the rank at each place of the grid, each of `0 .. size - 1` once.
        axes: One name per dimension of `ranks`.
        data_axes: The axes that divide the data (data parallel, fully sharded).
    """

    ranks: npt.NDArray[np.int64]
    axes: tuple[str, ...]
    data_axes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.ranks.ndim != len(self.axes) or len(set(self.axes)) != len(self.axes):
            raise BadInputError(
                f"a mesh of shape {self.ranks.shape} needs as many different axis names, got {self.axes}"
            )
        if not np.array_equal(np.sort(self.ranks, axis=None), np.arange(self.ranks.size)):
            raise BadInputError("a mesh holds each rank from 0 to its size - 1 exactly once")
        unknown = set(self.data_axes) - set(self.axes)
        if unknown or len(set(self.data_axes)) != len(self.data_axes):
            raise BadInputError(f"data_axes {self.data_axes} must be different axes of the mesh {self.axes}")

    @classmethod
    def from_sizes(cls, sizes: Mapping[str, int], data_axes: tuple[str, ...]) -> Mesh:
        """Lay ranks out in rows: the last axis has neighbouring ranks.

        >>> mesh = Mesh.from_sizes({"dp": 2, "tp": 2}, data_axes=("dp",))
        >>> [mesh.replica_of(rank) for rank in range(4)]
        [0, 0, 1, 1]
        """
        if not sizes or any(size < 1 for size in sizes.values()):
            raise BadInputError(f"every axis of a mesh has size >= 1, got {dict(sizes)}")
        ranks = np.arange(np.prod(list(sizes.values())), dtype=np.int64).reshape(tuple(sizes.values()))
        return cls(ranks, tuple(sizes), data_axes)

    @classmethod
    def from_device_mesh(cls, device_mesh: Any, data_axes: tuple[str, ...]) -> Mesh:
        """Take over the layout of a `torch.distributed.device_mesh.DeviceMesh` with named dimensions.

        Raises:
            BadInputError: Its dimensions have no names, or it is a part of a mesh only.
        """
        axes = device_mesh.mesh_dim_names
        if axes is None:
            raise BadInputError("the device mesh has no mesh_dim_names; name its dimensions when it is made")
        return cls(np.asarray(device_mesh.mesh, dtype=np.int64), tuple(axes), data_axes)

    @property
    def num_ranks(self) -> int:
        """Ranks in the mesh."""
        return int(self.ranks.size)

    @property
    def num_replicas(self) -> int:
        """Groups of ranks with the same samples."""
        return int(np.prod([self.ranks.shape[self.axes.index(axis)] for axis in self.data_axes], dtype=np.int64))

    def replica_of(self, rank: int) -> int:
        """Return which part of each global batch a rank reads.

        Raises:
            BadInputError: The mesh has no such rank.
        """
        place = np.argwhere(self.ranks == rank)
        if not len(place):
            raise BadInputError(f"rank {rank} is not in a mesh of {self.num_ranks} ranks")
        replica = 0
        for axis in self.data_axes:
            dimension = self.axes.index(axis)
            replica = replica * self.ranks.shape[dimension] + int(place[0][dimension])
        return replica
