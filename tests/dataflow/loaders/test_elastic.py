"""Loaders with workers over every kind of schedule: whatever stops them, others go on with the same batches."""

import json
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflow.loaders import DataLoader, ElasticBatchSampler, ScheduleSampler
from dataflow.loaders.slots import Notices
from dataflow.loaders.workers import Tasks, decode_order, encode_order
from dataflow.order import Filtered, Mixture, PackedBatches, Schedule, Selection, Shuffle

LENGTHS = np.random.default_rng(0).integers(1, 60, 300)


class Numbers:
    """A pack's "data" are the numbers of its samples."""

    def __getitem__(self, pack: list[int]) -> list[int]:
        return pack


def schedule() -> Schedule:
    """Blocks, a filter, a mixture and packing."""
    blocks = Shuffle(200, np.arange(0, 201, 8), "block", 5, 4)
    kept = Filtered(blocks, Selection(np.random.default_rng(1).random(200) < 0.7))
    mixture = Mixture((kept, Shuffle(100, None, "full", 6, 1)), (200, 100), (1.0, 2.0), 300, 30, 7)
    return Schedule(mixture, PackedBatches(LENGTHS, 64, 9, window_samples=110, seed=1))


def run(world_size: int, num_workers: int, num_steps: int, state: Any) -> tuple[list[list[list[int]]], Any]:
    """What all ranks are handed in some steps, step by step, and the state after them."""
    handed, states = [], []
    for rank in range(world_size):
        sampler = ScheduleSampler(schedule(), fingerprint="numbers", rank=rank, world_size=world_size)
        loader = DataLoader(Numbers(), batch_sampler=sampler, num_workers=num_workers, collate_fn=list)
        if state is not None:
            loader.load_state_dict(json.loads(json.dumps(state)))
        handed.append(list(islice(loader, num_steps)))
        states.append(loader.state_dict())
    assert all(other == states[0] for other in states)
    return [[pack for part in parts for pack in part] for parts in zip(*handed, strict=True)], states[0]


@given(stops=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2), st.integers(0, 9)), min_size=1, max_size=2))
@settings(max_examples=3)
def test_any_number_of_workers_and_ranks_goes_on_with_the_same_batches(stops: list[tuple[int, int, int]]) -> None:
    expected, _ = run(1, 0, 1000, None)
    found: list[Any] = []
    state = None
    for world_size, num_workers, num_steps in stops:
        some, state = run(world_size, num_workers, num_steps, state)
        found += some
    assert found == expected[: len(found)]
    assert len(found) == min(sum(steps for _, _, steps in stops), len(expected))


class TypeNames:
    """A sample is the name of the type of its number."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, number: int) -> str:
        return type(number).__name__


@pytest.mark.parametrize(("num_workers", "workers"), [(0, "process"), (1, "process"), (1, "thread")])
def test_datasets_that_are_not_native_are_asked_for_plain_integers(num_workers: int, workers: Any) -> None:
    sampler = ElasticBatchSampler(TypeNames(), 4, rank=0, world_size=1)
    loader = DataLoader(TypeNames(), batch_sampler=sampler, num_workers=num_workers, workers=workers)
    assert [name for batch in loader for name in batch] == ["int"] * 10


@pytest.mark.parametrize(
    "indices",
    [
        [np.array([3, 1]), np.array([], np.int64), np.array([2])],
        [np.array([3, 1], np.uint8), np.array([2], np.uint8)],
        [np.array([3, 1]), np.array([2.5])],
        [np.array([[3, 1], [4, 5]])],
        [np.array([3, 1]), [2]],
        [3, "a", None, slice(4)],
        [],
    ],
    ids=str,
)
def test_what_tasks_say_is_in_batches_arrives_as_it_was(indices: list[Any]) -> None:
    sent = Tasks(1, list(range(len(indices))), indices, Notices([5], [6]))
    found = decode_order(encode_order(sent))
    assert isinstance(found, Tasks)
    assert list(map(repr, found.indices)) == list(map(repr, indices))
    assert found._replace(indices=indices) == sent
