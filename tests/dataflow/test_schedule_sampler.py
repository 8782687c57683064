import dataclasses
import json
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connectors.errors import BadInputError
from dataflow.loaders.sampler import ElasticBatchSampler
from dataflow.loaders.schedule_sampler import Part, ScheduleSampler
from dataflow.order import (
    BalancedParts,
    BucketBatches,
    Division,
    EqualParts,
    Filtered,
    FixedBatches,
    LocalParts,
    Mesh,
    Mixture,
    PackedBatches,
    Schedule,
    Selection,
    Shuffle,
    WeightedParts,
)


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


LENGTHS = np.random.default_rng(0).integers(1, 60, 300)


def packed_and_bucketed() -> list[Schedule]:
    source = Shuffle(300, None, "full", 0, 1)
    return [
        Schedule(source, BucketBatches(LENGTHS, 480, 6, None, None, window_samples=90, seed=1)),
        Schedule(source, PackedBatches(LENGTHS, 64, 7, window_samples=110, seed=1)),
    ]


def mixed_and_filtered() -> list[Schedule]:
    """Two sets of 200 and 100 samples: one in blocks with a filter, one shuffled whole and read several times."""
    blocks = Shuffle(200, np.arange(0, 201, 8), "block", 5, 4)
    kept = Filtered(blocks, Selection(np.random.default_rng(1).random(200) < 0.7))
    mixture = Mixture((kept, Shuffle(100, None, "full", 6, 1)), (200, 100), (1.0, 2.0), 250, 30, 7)
    return [
        Schedule(mixture, FixedBatches(30, "short")),
        Schedule(mixture, BucketBatches(LENGTHS, 480, 6, None, (20, 40, 64), window_samples=90, seed=1)),
        Schedule(mixture, PackedBatches(LENGTHS, 64, 7, window_samples=110, seed=1)),
        Schedule(kept, PackedBatches(LENGTHS[:200], 64, 7, window_samples=60, seed=1)),
    ]


SCHEDULES = [*packed_and_bucketed(), *mixed_and_filtered()]


def divisions(num_replicas: int) -> st.SearchStrategy[Division]:
    weights = st.lists(st.floats(0.5, 4), min_size=num_replicas, max_size=num_replicas).map(tuple)
    nodes = st.lists(st.integers(0, 2), min_size=num_replicas, max_size=num_replicas).map(tuple)
    return st.one_of(
        st.just(EqualParts()),
        st.just(BalancedParts(LENGTHS)),
        weights.map(WeightedParts),
        nodes.map(lambda nodes: LocalParts(lambda samples: samples % 3, nodes)),
    )


@st.composite
def jobs(draw: st.DrawFn) -> tuple[int, dict[str, Any], int]:
    """A world size, how its ranks divide the work, and for how many steps it lives."""
    if draw(st.booleans()):
        sizes = {axis: draw(st.integers(1, most)) for axis, most in (("pp", 2), ("dp", 3), ("tp", 2))}
        mesh = Mesh.from_sizes(sizes, ("dp",))
        return mesh.num_ranks, {"mesh": mesh, "division": draw(divisions(mesh.num_replicas))}, draw(st.integers(0, 25))
    world_size = draw(st.integers(1, 6))
    return world_size, {"division": draw(divisions(world_size))}, draw(st.integers(0, 25))


def run(schedule: Schedule, job: tuple[int, dict[str, Any], int], state: Any) -> tuple[list[list[Any]], Any]:
    """What all replicas together draw in the steps of a job, sorted inside each step, and the state after them."""
    world_size, options, num_steps = job
    ranks = [
        ScheduleSampler(schedule, fingerprint="set", rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    if state is not None:
        for rank in ranks:
            rank.load_state_dict(json.loads(json.dumps(state)))
    drawn = [list(islice(rank, num_steps)) for rank in ranks]
    assert len({len(steps) for steps in drawn}) == 1, "a rank has other steps"
    assert all(rank.state_dict() == ranks[0].state_dict() for rank in ranks)
    by_replica: dict[int, list[list[Any]]] = {}
    for rank, steps in zip(ranks, drawn, strict=True):
        assert by_replica.setdefault(rank.replica, steps) == steps, "peers read different samples"
    joined = [sorted(unit for part in parts for unit in part) for parts in zip(*by_replica.values(), strict=True)]
    return joined, ranks[0].state_dict()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule.batching).__name__)
@given(stops=st.lists(jobs(), min_size=1, max_size=4))
@settings(max_examples=8)
def test_all_stages_together_survive_any_stop_and_any_change_of_ranks(
    schedule: Schedule, stops: list[tuple[int, dict[str, Any], int]]
) -> None:
    expected, _ = run(schedule, (1, {}, 10_000), None)
    found: list[Any] = []
    state = None
    for job in stops:
        if len(found) < len(expected):
            some, state = run(schedule, job, state)
            found += some
    assert found == expected[: len(found)]


@st.composite
def any_schedule(draw: st.DrawFn) -> Schedule:
    """Any source, of any length, filtered or not, mixed or not, in any batches."""
    length = draw(st.integers(20, 300))
    table = np.unique([0, length, *draw(st.lists(st.integers(0, length), max_size=20))])
    blocks = draw(st.sampled_from([None, table]))
    stored = Shuffle(length, blocks, draw(st.sampled_from(["block", "full", False])), draw(st.integers(0, 9)), 3)
    source: Any = stored
    if draw(st.booleans()):
        keep = np.random.default_rng(draw(st.integers(0, 9))).random(length) < draw(st.floats(0.2, 1.0))
        keep[0] = True
        source = Filtered(stored, Selection(keep))
    if length <= 200 and draw(st.booleans()):
        shares = (draw(st.floats(0.2, 5)), 1.0)
        source = Mixture(
            (source, Shuffle(90, None, "full", 1, 1)), (length, 90), shares, draw(st.integers(0, 300)), 20, 2
        )
    size = draw(st.integers(1, 40))
    batching: Any = draw(
        st.sampled_from(
            [
                FixedBatches(size, draw(st.sampled_from(["short", "drop"]))),
                BucketBatches(LENGTHS, 60 * size, size, None, None, draw(st.integers(30, 300)), 1),
                PackedBatches(LENGTHS, 64, size, draw(st.integers(30, 300)), 1),
            ]
        )
    )
    return Schedule(source, batching)


@given(schedule=any_schedule(), stops=st.lists(jobs(), min_size=1, max_size=3))
@settings(max_examples=10)
def test_any_schedule_is_complete_and_survives_any_stop_and_change_of_ranks(
    schedule: Schedule, stops: list[tuple[int, dict[str, Any], int]]
) -> None:
    expected, _ = run(schedule, (1, {}, 10_000), None)
    units = [unit for step in expected for unit in step]
    samples = [sample for unit in units for sample in (unit if isinstance(unit, list) else [unit])]
    whole = schedule.source.order(0).take(0, schedule.source.num_samples).tolist()
    if isinstance(schedule.batching, FixedBatches) and schedule.batching.tail == "drop":
        whole = whole[: len(expected) * schedule.batching.global_batch_size]
    assert sorted(samples) == sorted(whole)
    found: list[Any] = []
    state = None
    for job in stops:
        if len(found) < len(expected):
            some, state = run(schedule, job, state)
            found += some
    assert found == expected[: len(found)]


def test_packs_are_lists_of_samples_and_parts_of_steps_say_the_same() -> None:
    _, schedule = packed_and_bucketed()
    sampler = ScheduleSampler(schedule, fingerprint="set", rank=1, world_size=2)
    assert len(sampler) == len(drawn := list(sampler))
    assert all(isinstance(pack, list) for part in drawn for pack in part)
    assert [sampler.part_at(step).units for step in range(len(drawn))] == drawn
    sampler.load_state_dict(sampler.state_at(3))
    assert sampler.first_step == 3
    assert list(sampler) == drawn[3:]


def test_other_lengths_are_refused() -> None:
    bucketed, packed = packed_and_bucketed()
    state = ScheduleSampler(packed, fingerprint="set").state_dict()
    changed = dataclasses.replace(packed.batching, lengths=packed.batching.lengths[::-1])
    with pytest.raises(BadInputError, match="lengths"):
        ScheduleSampler(Schedule(packed.source, changed), fingerprint="set").load_state_dict(state)
    with pytest.raises(BadInputError, match="budget"):
        ScheduleSampler(bucketed, fingerprint="set").load_state_dict(state)


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


def test_new_weights_hold_from_the_next_epoch_on() -> None:
    ranks = samplers(2, division=WeightedParts((1.0, 2.0)))
    for sampler in ranks:
        epoch = iter(sampler)
        next(epoch)
        sampler.set_division(WeightedParts((2.0, 1.0)))
        assert len(sampler.part_at(1).units) == len(next(epoch)) == (4, 8)[sampler.rank]
        assert [sampler.division_of(epoch).weights for epoch in (0, 1)] == [(1.0, 2.0), (2.0, 1.0)]
        assert len(next(iter(sampler))) == len(sampler.part_at(0).units) == (8, 4)[sampler.rank]
    for sampler in ranks:
        sampler.set_epoch(7)
    whole = samplers(1)[0]
    whole.set_epoch(7)
    assert [first + second for first, second in zip(*ranks, strict=True)] == list(whole)


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


def test_an_iterator_gives_its_steps_as_arrays_too() -> None:
    (one,), (other,) = samplers(1), samplers(1)
    arrays = list(iter(one).arrays)
    assert {part.dtype for part in arrays} == {np.dtype(np.int64)}
    assert [part.tolist() for part in arrays] == list(other)
    assert one.state_dict() == other.state_dict()
