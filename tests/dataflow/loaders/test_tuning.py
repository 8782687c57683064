"""Ranks as threads, which wait for each other where processes would; time is what a fake clock says."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from connectors.errors import BadInputError
from dataflow.loaders import ElasticBatchSampler, WeightTuner
from dataflow.order import EqualParts, Mesh, WeightedParts

BATCH = 12
NUM_STEPS = 20


class Clock:
    """Stands still but for what is computed."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Ranks:
    """A gathering of threads."""

    def __init__(self, world_size: int) -> None:
        self._barrier = threading.Barrier(world_size, timeout=30)
        self._said: list[Any] = [None] * world_size

    def gather_of(self, rank: int) -> Callable[[Any], list[Any]]:
        def gather(own: Any) -> list[Any]:
            self._said[rank] = own
            self._barrier.wait()
            everything = list(self._said)
            self._barrier.wait()
            return everything

        return gather


def train(
    speeds: list[float], *, ahead: list[int], state: Any = None, num_steps: int = NUM_STEPS, mesh: Mesh | None = None
) -> tuple[list[Any], list[Any], Any]:
    """Let each rank train; return the sizes that each saw, its tuner, and the state at the end of all, by rank."""
    world_size = len(speeds)
    ranks = Ranks(world_size)

    def rank_of(rank: int) -> tuple[list[list[int]], WeightTuner, Any]:
        sampler = ElasticBatchSampler(
            range(BATCH * NUM_STEPS), BATCH, rank=rank, world_size=world_size, seed=3, mesh=mesh
        )
        if state is not None:
            sampler.load_state_dict(json.loads(json.dumps(state)))
        clock = Clock()
        tuner = WeightTuner(sampler, every_steps=4, gather=ranks.gather_of(rank), clock=clock)
        seen: list[list[int]] = []
        first, drawn, waiting = sampler.first_step, iter(sampler), []
        for number in range(num_steps):
            while len(waiting) <= ahead[rank]:  # as a loader with workers does
                part = next(drawn, None)
                if part is None:
                    break
                waiting.append(part)
            part = waiting.pop(0)
            with tuner.computing(len(part)):
                clock.now_s += len(part) / speeds[rank]
            assert sampler.part_at(first + number).units == part
            seen.append(part)
        return seen, tuner, sampler.state_at(first + num_steps)

    with ThreadPoolExecutor(world_size) as pool:
        found = list(pool.map(rank_of, range(world_size)))
    seen, tuners, states = zip(*found, strict=True)
    assert all(other == states[0] for other in states)
    assert all(tuner.tunings == tuners[0].tunings for tuner in tuners)
    return list(seen), list(tuners), states[0]


def whole() -> list[list[int]]:
    return list(ElasticBatchSampler(range(BATCH * NUM_STEPS), BATCH, rank=0, world_size=1, seed=3))


def sizes(seen: list[list[list[int]]]) -> list[tuple[int, ...]]:
    return [tuple(map(len, parts)) for parts in zip(*seen, strict=True)]


def joined(seen: list[list[list[int]]]) -> list[list[int]]:
    return [[number for part in parts for number in part] for parts in zip(*seen, strict=True)]


@pytest.mark.parametrize("ahead", [[0, 0], [3, 1], [0, 9]])
def test_all_ranks_deal_by_the_measured_speeds_from_the_first_step_that_nobody_has_drawn(ahead: list[int]) -> None:
    seen, tuners, _ = train([2.0, 1.0], ahead=ahead)
    assert joined(seen) == whole()
    change = 4 + max(ahead)
    assert sizes(seen) == [(6, 6)] * change + [(8, 4)] * (NUM_STEPS - change)
    first, *_, last = tuners[0].tunings
    assert (first.first_step, first.measured_step_s, first.next_step_s) == (change, 6.0, 4.0)
    assert (last.first_step, last.measured_step_s, last.predicted_step_s) == (None, 4.0, 4.0)
    assert (first.slowest_over_mean, last.slowest_over_mean) == (6.0 / 4.5, 1.0)


@pytest.mark.parametrize("stop", range(1, 20, 3))
def test_a_state_holds_the_weights_and_when_they_begin(stop: int) -> None:
    expected, _, _ = train([2.0, 1.0], ahead=[3, 1])
    begun, _, state = train([2.0, 1.0], ahead=[3, 1], num_steps=stop)
    assert ("replica_weights" in state) == (stop >= 4)
    sampler = ElasticBatchSampler(range(BATCH * NUM_STEPS), BATCH, rank=0, world_size=2, seed=3)
    sampler.load_state_dict(json.loads(json.dumps(state)))
    if stop >= 4:
        assert begun[0] + list(sampler) == expected[0]
        assert len(next(iter(sampler))) == 8, "the next epoch goes on with them"


def test_another_number_of_ranks_begins_with_equal_parts_and_measures_anew() -> None:
    _, _, state = train([2.0, 1.0], ahead=[0, 0], num_steps=8)
    seen, _, _ = train([1.0, 1.0, 2.0], ahead=[0, 0, 0], state=state, num_steps=12)
    assert joined(seen) == whole()[8:]
    assert sizes(seen) == [(4, 4, 4)] * 4 + [(3, 3, 6)] * 8


def test_peers_count_as_the_slowest_of_their_replica() -> None:
    mesh = Mesh.from_sizes({"dp": 2, "tp": 2}, ("dp",))
    seen, _, _ = train([2.0, 2.0, 2.0, 1.0], ahead=[0, 2, 0, 0], mesh=mesh)
    assert seen[0] == seen[1]
    assert seen[2] == seen[3]
    assert sizes(seen[::2])[-1] == (8, 4)


def test_small_gains_change_nothing() -> None:
    seen, tuners, state = train([1.0, 1.01], ahead=[0, 0])
    assert set(sizes(seen)) == {(6, 6)}
    assert {tuning.first_step for tuning in tuners[0].tunings} == {None}
    assert "replica_weights" not in state


def test_steps_without_work_are_not_measured() -> None:
    sampler = ElasticBatchSampler(range(40), 4, rank=0, world_size=1)
    tuner = WeightTuner(sampler, every_steps=2, clock=Clock())
    for _ in range(2):
        with tuner.computing(0):
            pass
    assert tuner.tunings == []


def test_an_accelerator_is_measured_by_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        stream_ms = 0.0
        synchronised = 0

        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at_ms = Event.stream_ms

        def synchronize(self) -> None:
            Event.synchronised += 1

        def elapsed_time(self, end: "Event") -> float:
            return end.at_ms - self.at_ms

    backend = type("Backend", (), {"Event": Event})
    monkeypatch.setattr(torch, "get_device_module", lambda device: backend)
    sampler = ElasticBatchSampler(range(40), 4, rank=0, world_size=1)
    tuner = WeightTuner(sampler, every_steps=2, device="cuda")
    for expected in (0, 2):
        with tuner.computing(4):
            Event.stream_ms += 500.0
        assert Event.synchronised == expected, "the host waits at an exchange only"
    assert (tuner.tunings[0].measured_step_s, tuner.tunings[0].weights) == (0.5, (8.0,))


def test_what_cannot_be_tuned_is_named() -> None:
    sampler = ElasticBatchSampler(range(40), 4, rank=0, world_size=2)
    with pytest.raises(BadInputError, match=r"initialise torch\.distributed"):
        WeightTuner(sampler)
    with pytest.raises(BadInputError, match="every_steps"):
        WeightTuner(sampler, every_steps=0)
    tuner = WeightTuner(sampler, every_steps=1, gather=lambda own: [own, (1, 7, *own[2:])])
    with pytest.raises(BadInputError, match=r"epochs \[0, 7\]"), tuner.computing(1):
        pass


def test_a_step_that_was_drawn_cannot_be_dealt_otherwise() -> None:
    sampler = ElasticBatchSampler(range(40), 4, rank=0, world_size=2)
    drawn = iter(sampler)
    next(drawn)
    with pytest.raises(BadInputError, match="step 0 was drawn already"):
        sampler.set_division(WeightedParts((1.0, 3.0)), step=0)
    sampler.set_division(WeightedParts((1.0, 3.0)), step=2)
    assert [len(next(drawn)) for _ in range(3)] == [2, 1, 1]
    sampler.set_division(EqualParts(), step=4)
    assert [len(next(drawn)) for _ in range(2)] == [2, 2]


@pytest.mark.parametrize("weights", [[[0, ["x", 1.0]]], [[0]], 5])
def test_damaged_weights_of_a_state_are_refused(weights: Any) -> None:
    sampler = ElasticBatchSampler(range(40), 4, rank=0, world_size=2)
    with pytest.raises(BadInputError, match="weights"):
        sampler.load_state_dict({**sampler.state_dict(), "replica_weights": weights})
