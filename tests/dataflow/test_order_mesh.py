from types import SimpleNamespace

import numpy as np
import pytest
import torch.distributed
from torch.distributed.device_mesh import init_device_mesh

from connectors.errors import BadInputError
from dataflow.order.mesh import Mesh


def test_peers_along_the_other_axes_are_one_replica() -> None:
    mesh = Mesh.from_sizes({"pp": 2, "dp": 3, "tp": 2}, data_axes=("dp",))
    assert (mesh.num_ranks, mesh.num_replicas) == (12, 3)
    assert [mesh.replica_of(rank) for rank in range(12)] == [0, 0, 1, 1, 2, 2] * 2


def test_several_data_axes_count_in_rows() -> None:
    mesh = Mesh.from_sizes({"replicate": 2, "tp": 2, "shard": 2}, data_axes=("replicate", "shard"))
    assert [mesh.replica_of(rank) for rank in range(8)] == [0, 1, 0, 1, 2, 3, 2, 3]


def test_any_layout_of_ranks_is_followed() -> None:
    mesh = Mesh(np.array([[3, 0], [2, 1]]), ("dp", "tp"), ("dp",))
    assert [mesh.replica_of(rank) for rank in range(4)] == [0, 1, 1, 0]


def test_a_device_mesh_of_torch_is_taken_over() -> None:
    device_mesh = SimpleNamespace(mesh=torch.tensor([[3, 0], [2, 1]]), mesh_dim_names=("dp", "tp"))
    assert [Mesh.from_device_mesh(device_mesh, ("dp",)).replica_of(rank) for rank in range(4)] == [0, 1, 1, 0]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        named = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
        assert Mesh.from_device_mesh(named, ("dp",)).replica_of(0) == 0
        with pytest.raises(BadInputError, match="mesh_dim_names"):
            Mesh.from_device_mesh(init_device_mesh("cpu", (1,)), ("dp",))
    finally:
        torch.distributed.destroy_process_group()


def test_without_data_axis_all_ranks_read_the_same() -> None:
    mesh = Mesh.from_sizes({"tp": 4}, data_axes=())
    assert mesh.num_replicas == 1
    assert {mesh.replica_of(rank) for rank in range(4)} == {0}


def test_senseless_meshes_are_refused() -> None:
    with pytest.raises(BadInputError, match="exactly once"):
        Mesh(np.array([0, 0]), ("dp",), ("dp",))
    with pytest.raises(BadInputError, match="axis names"):
        Mesh(np.array([[0, 1]]), ("dp",), ("dp",))
    with pytest.raises(BadInputError, match="data_axes"):
        Mesh.from_sizes({"dp": 2}, data_axes=("tp",))
    with pytest.raises(BadInputError, match="size >= 1"):
        Mesh.from_sizes({"dp": 0}, data_axes=("dp",))
    with pytest.raises(BadInputError, match="rank 2 is not"):
        Mesh.from_sizes({"dp": 2}, data_axes=("dp",)).replica_of(2)
