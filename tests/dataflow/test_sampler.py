import json
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.distributed
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from connectors.errors import BadInputError
from dataflow.loaders.sampler import ElasticBatchSampler
from dataflow.order import BlockOrder, FullOrder


class Numbers:
    """A dataset whose samples are their own numbers."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, number: int) -> int:
        return number


class Blocks(Numbers):
    """The same with the block table of an indexed dataset."""

    def __init__(self, sizes: list[int], fingerprint: str = "blocks") -> None:
        super().__init__(sum(sizes))
        first_sample = np.concatenate([[0], np.cumsum(np.array(sizes, dtype=np.int64))])
        self.index = SimpleNamespace(blocks=SimpleNamespace(first_sample=first_sample))
        self.fingerprint = fingerprint


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "PMI_RANK", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)


def ranks_of(dataset: Numbers, world_size: int, batch: int, **options: Any) -> list[ElasticBatchSampler]:
    return [ElasticBatchSampler(dataset, batch, rank=r, world_size=world_size, **options) for r in range(world_size)]


def global_batches(samplers: list[ElasticBatchSampler], steps: int | None = None) -> list[list[int]]:
    """What all ranks together draw, step by step; every rank must have as many steps as the others."""
    iterators: list[Iterator[list[int]]] = [iter(sampler) for sampler in samplers]
    found = []
    while steps is None or len(found) < steps:
        parts = [next(iterator, None) for iterator in iterators]
        if None in parts:
            assert parts == [None] * len(samplers), "a rank ended before the others"
            break
        found.append([number for part in parts for number in part])
    return found


datasets = st.one_of(
    st.builds(Numbers, st.integers(0, 300)), st.builds(Blocks, st.lists(st.integers(0, 30), min_size=1, max_size=15))
)
shuffles = st.sampled_from(["block", "full", False])


@given(
    dataset=datasets,
    shuffle=shuffles,
    batch=st.integers(6, 50),
    seed=st.integers(0, 5),
    window=st.integers(1, 8),
    drop_last=st.booleans(),
    worlds=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    data=st.data(),
)
def test_global_batches_survive_any_stop_and_change_of_world_size(
    dataset: Numbers,
    shuffle: Any,
    batch: int,
    seed: int,
    window: int,
    drop_last: bool,
    worlds: list[int],
    data: st.DataObject,
) -> None:
    options = {"shuffle": shuffle, "seed": seed, "window_blocks": window, "drop_last": drop_last}
    undisturbed = ranks_of(dataset, 1, batch, **options)
    expected = global_batches(undisturbed) + global_batches(undisturbed)
    steps = len(undisturbed[0])

    found: list[list[int]] = []
    state = None
    for place, world_size in enumerate(worlds):
        samplers = ranks_of(dataset, world_size, batch, **options)
        if state is not None:
            for sampler in samplers:
                sampler.load_state_dict(json.loads(json.dumps(state)))
        left = steps - len(found) % steps if steps else 0
        wanted = left if place == len(worlds) - 1 else data.draw(st.integers(0, left))
        if len(found) < 2 * steps:
            found += global_batches(samplers, wanted)
            states = [sampler.state_dict() for sampler in samplers]
            state = states[0]
            assert all(other == state for other in states)
    assert found == expected[: len(found)]


@given(dataset=datasets, shuffle=shuffles, batch=st.integers(8, 60), world_size=st.integers(1, 8))
def test_an_epoch_is_complete_and_ranks_are_disjoint(
    dataset: Numbers, shuffle: Any, batch: int, world_size: int
) -> None:
    found = global_batches(ranks_of(dataset, world_size, batch, shuffle=shuffle))
    assert sorted(number for step in found for number in step) == list(range(len(dataset)))
    assert [len(step) for step in found[:-1]] == [batch] * (len(found) - 1)


@given(num_samples=st.integers(0, 200), batch=st.integers(4, 40), world_size=st.integers(1, 4))
def test_pad_last_fills_the_last_batch_with_flagged_samples(num_samples: int, batch: int, world_size: int) -> None:
    samplers = ranks_of(Numbers(num_samples), world_size, batch, pad_last=True, shuffle=False)
    found = global_batches(samplers)
    assert all(len(step) == batch for step in found)
    parts = [[sampler.part_at(step) for sampler in samplers] for step in range(len(found))] if found else []
    for sampler in samplers:
        sampler.set_epoch(0)
    real = [part.units[: len(part.units) - part.num_padding] for step in parts for part in step]
    assert sorted(number for units in real for number in units) == list(range(num_samples))
    for step in parts:
        sizes = [len(part.units) for part in step]
        assert max(sizes) - min(sizes) <= 1


@given(num_samples=st.integers(0, 200), batch=st.integers(4, 40), world_size=st.integers(1, 4))
def test_drop_last_leaves_out_only_the_short_batch(num_samples: int, batch: int, world_size: int) -> None:
    samplers = ranks_of(Numbers(num_samples), world_size, batch, drop_last=True)
    found = global_batches(samplers)
    assert len(found) == len(samplers[0]) == num_samples // batch
    assert all(len(step) == batch for step in found)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_worker_count_does_not_change_what_torch_delivers(workers: int) -> None:
    # torch hands batch i to worker i mod N and restores the order.
    sampler = ElasticBatchSampler(Blocks([5, 0, 11, 7]), 6, rank=1, world_size=2, seed=3)
    expected = list(ElasticBatchSampler(Blocks([5, 0, 11, 7]), 6, rank=1, world_size=2, seed=3))
    loader = DataLoader(Blocks([5, 0, 11, 7]), batch_sampler=sampler, num_workers=workers)
    assert [batch.tolist() for batch in loader] == expected
    assert len(loader) == 4


def test_shuffle_names_the_order_of_the_epoch() -> None:
    dataset = Blocks([10] * 6)
    first_sample = dataset.index.blocks.first_sample
    drawn = {
        shuffle: [
            n for batch in ElasticBatchSampler(dataset, 7, seed=2, shuffle=shuffle, window_blocks=2) for n in batch
        ]
        for shuffle in ("block", "full", False)
    }
    assert drawn["block"] == BlockOrder(first_sample, 2, 0, 2).take(0, 60).tolist()
    assert drawn["full"] == FullOrder(60, 2, 0).take(0, 60).tolist()
    assert drawn[False] == list(range(60))


def test_many_steps_are_looked_up_in_parts_without_a_seam() -> None:
    sampler = ElasticBatchSampler(Numbers(50_000), 64, rank=1, world_size=2)
    order = FullOrder(50_000, 0, 0)
    assert list(sampler)[:-1] == [order.take(start + 32, start + 64).tolist() for start in range(0, 49_984, 64)]


def test_every_iteration_begins_the_next_epoch() -> None:
    sampler = ElasticBatchSampler(Numbers(40), 8)
    first, second = list(sampler), list(sampler)
    assert first != second
    assert second == [FullOrder(40, 0, 1).take(start, start + 8).tolist() for start in range(0, 40, 8)]
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_two_live_iterators_walk_two_epochs_and_an_unused_one_takes_none() -> None:
    sampler = ElasticBatchSampler(Numbers(40), 8)
    _unused, first, second = iter(sampler), iter(sampler), iter(sampler)
    assert next(first) == FullOrder(40, 0, 0).take(0, 8).tolist()
    assert next(second) == FullOrder(40, 0, 1).take(0, 8).tolist()
    assert (sampler.epoch, sampler.state_dict()["position"]) == (1, 8)


def test_state_of_an_iterator_that_is_not_drawn_yet_is_where_it_will_begin() -> None:
    sampler = ElasticBatchSampler(Numbers(40), 8)
    next(iter(sampler))
    iter(sampler)
    assert (sampler.state_dict()["epoch"], sampler.state_dict()["position"]) == (1, 0)
    assert (sampler.epoch, sampler.first_step) == (1, 0)


def test_state_before_during_and_after_an_epoch() -> None:
    sampler = ElasticBatchSampler(Numbers(20), 8)

    def where() -> tuple[int, int]:
        return sampler.state_dict()["epoch"], sampler.state_dict()["position"]

    assert where() == (0, 0)
    batches = iter(sampler)
    next(batches)
    assert where() == (0, 8)
    assert len(list(batches)) == 2
    assert where() == (1, 0)
    sampler.set_epoch(5)
    assert where() == (5, 0)


def test_state_at_counts_steps_from_the_beginning_of_the_epoch() -> None:
    sampler = ElasticBatchSampler(Numbers(20), 8, seed=4)
    sampler.load_state_dict({**sampler.state_dict(), "epoch": 3, "position": 8, "step": 1})
    iter(sampler)
    assert (sampler.epoch, sampler.first_step) == (3, 1)
    assert sampler.state_at(2) == {
        "version": 1,
        "seed": 4,
        "epoch": 3,
        "position": 16,
        "step": 2,
        "global_batch_size": 8,
        "shuffle": "full",
        "window_blocks": 64,
        "drop_last": False,
        "pad_last": False,
        "fingerprint": sampler.state_dict()["fingerprint"],
    }
    assert (sampler.state_at(3)["epoch"], sampler.state_at(3)["position"]) == (4, 0)
    with pytest.raises(BadInputError, match="step"):
        sampler.state_at(4)


def test_set_epoch_keeps_a_loaded_position_of_the_same_epoch_only() -> None:
    sampler = ElasticBatchSampler(Numbers(40), 8)
    state = {**sampler.state_dict(), "epoch": 2, "position": 24, "step": 3}
    whole = [FullOrder(40, 0, 2).take(start, start + 8).tolist() for start in range(0, 40, 8)]
    sampler.load_state_dict(state)
    sampler.set_epoch(2)
    assert list(sampler) == whole[3:]
    sampler.set_epoch(2)
    assert list(sampler) == whole
    sampler.load_state_dict(state)
    sampler.set_epoch(3)
    assert len(list(sampler)) == 5


def test_resuming_deep_inside_an_epoch_draws_nothing_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    at = FullOrder.at

    def watched(self: FullOrder, positions: np.ndarray) -> np.ndarray:
        asked.append(positions)
        return at(self, positions)

    monkeypatch.setattr(FullOrder, "at", watched)
    sampler = ElasticBatchSampler(Numbers(10**12), 1000, rank=0, world_size=4)
    sampler.load_state_dict({**sampler.state_dict(), "position": 10**12 - 5000, "step": 10**9 - 5})
    next(iter(sampler))
    assert len(asked) == 1
    assert asked[0].min() == 10**12 - 5000
    assert asked[0].size <= 8192 + 250


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "other"}, "another dataset"),
        ({"global_batch_size": 16}, "global_batch_size=16"),
        ({"shuffle": False}, "shuffle=False"),
        ({"window_blocks": 2}, "window_blocks=2"),
        ({"seed": 9}, "seed=9"),
        ({"drop_last": True}, "drop_last=True"),
        ({"version": 2}, "version 2"),
        ({"position": 3}, "position 3"),
        ({"position": 800}, "position 800"),
        ({"position": 40}, "position 40"),
        ({"position": -8}, "whole numbers"),
        ({"position": 8.0}, "8.0"),
        ({"position": 8, "step": 2}, "before step 2"),
        ({"epoch": "1"}, "'1'"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change: dict[str, Any], message: str) -> None:
    sampler = ElasticBatchSampler(Numbers(40), 8)
    before = sampler.state_dict()
    with pytest.raises(BadInputError, match=message):
        sampler.load_state_dict({**before, **change})
    assert sampler.state_dict() == before


def test_a_state_that_lacks_something_names_it() -> None:
    sampler = ElasticBatchSampler(Numbers(40), 8)
    with pytest.raises(BadInputError, match="lacks fingerprint, seed"):
        sampler.load_state_dict({k: v for k, v in sampler.state_dict().items() if k not in ("fingerprint", "seed")})
    with pytest.raises(BadInputError, match="NoneType"):
        sampler.load_state_dict(None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 4, "world_size": 4}, "rank 4 of world size 4"),
        ({"rank": 0}, "together"),
        ({"world_size": 2}, "together"),
        ({"rank": 0, "world_size": 9}, "counts the samples of all ranks together"),
        ({"drop_last": True, "pad_last": True}, "give one"),
        ({"global_batch_size": 0}, "global_batch_size"),
        ({"shuffle": "blocks"}, "'blocks'"),
        ({"window_blocks": 0}, "window_blocks"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        ElasticBatchSampler(Numbers(40), **{"global_batch_size": 8, **arguments})


def test_rank_comes_from_the_environment_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (ElasticBatchSampler(Numbers(9), 8).rank, ElasticBatchSampler(Numbers(9), 8).world_size) == (0, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    sampler = ElasticBatchSampler(Numbers(9), 8)
    assert (sampler.rank, sampler.world_size) == (1, 2)


def test_an_initialised_process_group_overrules_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        sampler = ElasticBatchSampler(Numbers(9), 8)
    finally:
        torch.distributed.destroy_process_group()
    assert (sampler.rank, sampler.world_size) == (0, 1)


def test_a_rank_that_turns_out_to_be_another_is_refused_and_one_that_was_given_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    found, given = ElasticBatchSampler(Numbers(9), 8), ElasticBatchSampler(Numbers(9), 8, rank=1, world_size=2)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(BadInputError, match=r"for rank 1 of 2, and the process is rank 0 of 1: make it afterwards"):
            iter(found)
        assert len(list(given)) == 2
    finally:
        torch.distributed.destroy_process_group()
    assert len(list(found)) == 2


def test_a_dataset_without_index_is_shuffled_whole_and_says_so() -> None:
    sampler = ElasticBatchSampler(Numbers(40), 8)
    assert sampler.shuffle == sampler.state_dict()["shuffle"] == "full"


def test_an_index_that_does_not_cover_the_dataset_is_refused() -> None:
    dataset = Blocks([5, 5])
    dataset.num_samples = 11
    with pytest.raises(BadInputError, match="does not cover its 11 samples"):
        ElasticBatchSampler(dataset, 2)


def test_dropping_everything_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert list(ElasticBatchSampler(Numbers(5), 8, drop_last=True)) == []
    assert "leaves out the 5 samples" in caplog.text


def test_fingerprint_tells_lengths_and_types_apart() -> None:
    prints = {
        ElasticBatchSampler(dataset, 2).state_dict()["fingerprint"]
        for dataset in (Numbers(8), Numbers(9), list(range(8)), Blocks([8]))
    }
    assert len(prints) == 4
    assert "blocks" in prints


@pytest.mark.parametrize(
    ("block_mib", "samples_per_block", "window_blocks"),
    [(1, 12, 64), (8, 100, 8), (8, 2048, 8), (8, 20, 26), (200, 1000, 1), (200, 1, 64), (0.1, 100, 64)],
)
def test_a_window_has_64_mib_and_512_samples_unless_those_are_too_many_blocks(
    block_mib: float, samples_per_block: int, window_blocks: int
) -> None:
    dataset: Any = Blocks([samples_per_block] * 100)
    dataset.index.num_blocks = 100
    dataset.index.ranges = SimpleNamespace(length=np.full(100, int(block_mib * (1 << 20))))
    assert ElasticBatchSampler(dataset, 4).state_dict()["window_blocks"] == window_blocks
    assert ElasticBatchSampler(dataset, 4, window_blocks=3).state_dict()["window_blocks"] == 3
