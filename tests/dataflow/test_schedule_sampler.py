from typing import Any

import numpy as np
import pytest

from connectors.errors import BadInputError
from dataflow.loaders.sampler import ElasticBatchSampler
from dataflow.loaders.schedule_sampler import Part
from dataflow.order import Mesh, WeightedParts


def samplers(world_size: int, **options: Any) -> list[ElasticBatchSampler]:
    return [ElasticBatchSampler(range(100), 12, rank=r, world_size=world_size, **options) for r in range(world_size)]


def test_tensor_and_pipeline_peers_read_the_same_and_replicas_are_disjoint() -> None:
    mesh = Mesh.from_sizes({"pp": 2, "dp": 2, "tp": 2}, data_axes=("dp",))
    drawn = [list(sampler) for sampler in samplers(8, mesh=mesh)]
    assert drawn[0] == drawn[1] == drawn[4] == drawn[5]
    assert drawn[2] == drawn[3] == drawn[6] == drawn[7]
    single = list(samplers(1)[0])
    assert [first + second for first, second in zip(drawn[0], drawn[2], strict=True)] == single


def test_a_state_moves_between_meshes() -> None:
    before = samplers(4, mesh=Mesh.from_sizes({"dp": 2, "tp": 2}, data_axes=("dp",)))[3]
    batches = iter(before)
    for _ in range(3):
        next(batches)
    after = samplers(2)
    for sampler in after:
        sampler.load_state_dict(before.state_dict())
    joined = [first + second for first, second in zip(*after, strict=True)]
    assert joined == list(samplers(1)[0])[3:]


def test_a_mesh_of_another_size_than_the_job_is_refused() -> None:
    with pytest.raises(BadInputError, match="mesh has 4 ranks and the job 2"):
        samplers(2, mesh=Mesh.from_sizes({"dp": 4}, data_axes=("dp",)))


def test_unequal_ranks_get_unequal_parts_of_the_same_batches() -> None:
    slow, fast = samplers(2, division=WeightedParts((1.0, 2.0)))
    for step, (less, more) in enumerate(zip(slow, fast, strict=True)):
        assert (len(less), len(more)) == ((4, 8) if step < 8 else (1, 3))
    assert slow.part_at(0).gradient_weight == pytest.approx(2 / 3)
    assert fast.part_at(0).gradient_weight == pytest.approx(4 / 3)
    joined = [a + b for a, b in zip(*samplers(2, division=WeightedParts((1.0, 2.0))), strict=True)]
    assert joined == list(samplers(1)[0])


def test_a_part_says_what_the_sampler_yielded() -> None:
    for sampler in samplers(3, pad_last=True):
        drawn = list(sampler)
        parts = [sampler.part_at(step) for step in range(len(drawn))]
        assert [part.units for part in parts] == drawn
        assert parts[0] == Part(units=drawn[0], gradient_weight=1.0, num_padding=0)
        assert sum(part.num_padding for part in parts) in (2, 3)
        with pytest.raises(BadInputError, match="9 steps"):
            sampler.part_at(9)


def test_averaging_weighted_gradients_equals_the_gradient_of_the_global_batch() -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    features, targets = torch.randn(100, 3).double(), torch.randn(100, 1).double()

    def gradient(rows: list[int], weight: float) -> Any:
        model.zero_grad()
        (weight * torch.nn.functional.mse_loss(model(features[rows]), targets[rows])).backward()
        return torch.cat([parameter.grad.ravel() for parameter in model.parameters()])

    ranks = samplers(3, division=WeightedParts((1.0, 2.0, 4.0)), pad_last=True)
    for sampler in ranks:
        iter(sampler)
    for step, whole in enumerate(samplers(1)[0]):
        parts = [sampler.part_at(step) for sampler in ranks]
        mean = sum(gradient(p.units[: len(p.units) - p.num_padding], p.gradient_weight) for p in parts) / 3
        assert np.allclose(mean, gradient(whole, 1.0), atol=1e-12)
