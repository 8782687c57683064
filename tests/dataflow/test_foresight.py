"""The cache is told exactly what the workers will read, in time, and nothing else changes."""

from __future__ import annotations

import logging
import pickle
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest

from cache.config import CacheConfig, TierConfig
from dataflow import DataLoader, Dataset, ShardWriter, open_dataset
from dataflow.loaders import ElasticBatchSampler, ScheduleSampler, announcer
from dataflow.loaders.announcer import block_table
from dataflow.loaders.foresight import ScheduleForesight, foresee
from dataflow.order import BucketBatches, Schedule, Shuffle
from dataflow.testing import PlannedReader

SAMPLES = 600


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("data") / "numbers")
    schema = pa.schema([pa.field("number", pa.int64(), nullable=False), pa.field("text", pa.string(), nullable=False)])
    with ShardWriter(folder, schema, block_size_bytes=1500, shard_size_bytes=20_000) as writer:
        for number in range(SAMPLES):
            writer.write({"number": number, "text": f"{number:03}" * 50})
    return folder


@pytest.fixture
def dataset(url: str) -> Iterator[Dataset]:
    found = open_dataset(url, buffer_bytes=16 * 1024)
    found._reader = PlannedReader(found._reader)
    yield found
    found.reader.close()


def reader_of(dataset: Dataset) -> PlannedReader:
    reader = dataset.reader
    assert isinstance(reader, PlannedReader)
    return reader


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announcer, "_AHEAD_BLOCKS", 40)
    monkeypatch.setattr(announcer, "_MARK_BLOCKS", 4)


def numbers(loader: DataLoader) -> list[int]:
    return [int(n) for batch in loader for n in batch["number"]]


def test_every_block_is_numbered_as_in_the_index(dataset: Dataset) -> None:
    table = block_table(dataset.index)
    assert 40 < len(table) == dataset.index.num_blocks < 100
    assert [table.ref(b) for b in range(len(table))] == [dataset.index.block_ref(b) for b in range(len(table))]


@pytest.mark.parametrize("shuffle", ["block", "full", False])
@pytest.mark.parametrize("world_size", [1, 3])
def test_what_is_read_was_announced_in_that_order(dataset: Dataset, shuffle: str, world_size: int) -> None:
    sampler = ElasticBatchSampler(
        dataset, 16, shuffle=shuffle, window_blocks=2, seed=3, rank=world_size - 1, world_size=world_size
    )
    loader = DataLoader(dataset, batch_sampler=sampler)
    reader = reader_of(dataset)
    for _ in range(3):
        numbers(loader)
        (plan,) = reader.plans
        assert "replace" not in plan.calls, "the next epoch was announced before this one ended"
    read, announced = Counter([ref for request in reader.requests for ref in request]), Counter(plan.refs)
    if shuffle == "full":
        assert set(read) <= set(announced)
    else:
        assert read <= announced
        assert max(announced.values()) <= 3 + 1, "once an epoch, and ahead"
    assert plan.position <= len(plan.blocks) <= plan.position + 3 * 40


def test_every_step_of_each_window_of_a_schedule_is_announced(dataset: Dataset) -> None:
    lengths = np.random.default_rng(0).integers(1, 60, SAMPLES)
    source = Shuffle(SAMPLES, dataset.index.blocks.first_sample, "block", 2, 3)
    schedule = Schedule(source, BucketBatches(lengths, 480, 6, None, None, window_samples=90, seed=1))
    sampler = ScheduleSampler(schedule, fingerprint=dataset.fingerprint, rank=0, world_size=1)
    loader, reader = DataLoader(dataset, batch_sampler=sampler), reader_of(dataset)
    for _ in range(2):
        assert sorted(numbers(loader)) == list(range(SAMPLES))
    (plan,) = reader.plans
    read = Counter([ref for request in reader.requests for ref in request])
    assert read <= Counter(plan.refs)
    assert "replace" not in plan.calls


def test_the_next_epoch_is_announced_before_this_one_ends(dataset: Dataset) -> None:
    sampler = ElasticBatchSampler(dataset, 20, window_blocks=2)
    loader = DataLoader(dataset, batch_sampler=sampler)
    batches = iter(loader)
    for _ in range(len(sampler) - 2):
        next(batches)
    (plan,) = reader_of(dataset).plans
    blocks = dataset.index.num_blocks
    assert len(plan.blocks) >= blocks + 10
    assert len({*plan.blocks[:blocks]}) == blocks, "each block once an epoch"
    assert plan.position >= blocks - 10


def test_the_first_batch_waits_for_few_steps_and_a_plan_ends_behind_the_next_epoch(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcer, "_AHEAD_BLOCKS", 4096)
    drawn: list[tuple[int, int]] = []

    def steps() -> Iterator[announcer.Step]:
        for epoch in range(1000):
            for step in range(60):
                drawn.append((epoch, step))
                yield epoch, step, np.arange(10 * step, 10 * (step + 1))

    found = announcer.Announcer(dataset)
    found.begin(0, 0, steps())
    assert len(drawn) <= 32
    for passed in range(1, 60):
        before = len(drawn)
        found.passed(passed)
        assert len(drawn) - before <= 32
    last = drawn[-1]
    assert (2, 0) <= last < (2, 32)
    plan = reader_of(dataset).plans[0]
    assert plan.position <= len(plan.blocks) <= 2 * dataset.index.num_blocks + 2
    assert plan.calls.count("advance") <= dataset.index.num_blocks // 4 + 8
    found.passed(60)
    assert drawn[-1] > last, "the next epoch has begun"
    found.close()


def test_the_samples_are_those_without_a_plan(url: str, dataset: Dataset) -> None:
    def drawn(data: Dataset) -> list[int]:
        loader = DataLoader(data, batch_sampler=ElasticBatchSampler(data, 7, seed=9))
        return numbers(loader) + numbers(loader)

    plain = open_dataset(url)
    assert drawn(dataset) == drawn(plain)
    assert reader_of(dataset).plans
    plain.reader.close()


def test_an_epoch_left_early_and_a_loaded_state_begin_a_new_future(dataset: Dataset) -> None:
    sampler = ElasticBatchSampler(dataset, 20, window_blocks=2)
    loader = DataLoader(dataset, batch_sampler=sampler)
    batches = iter(loader)
    for _ in range(5):
        next(batches)
    state = loader.state_dict()
    numbers(loader)
    (plan,) = reader_of(dataset).plans
    assert plan.calls.count("replace") == 1
    loader.load_state_dict(state)
    reader_of(dataset).requests.clear()
    place = plan.position
    numbers(loader)
    assert plan.calls.count("replace") == 2
    announced = {plan.table.ref(block) for block in plan.blocks[place:]}
    assert {ref for request in reader_of(dataset).requests for ref in request} <= announced


@pytest.mark.parametrize("passed", [2, 22])
def test_a_future_that_begins_anew_replaces_what_was_not_passed(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, passed: int
) -> None:
    def steps(epoch: int, first: int) -> Iterator[announcer.Step]:
        for step in range(first, dataset.index.num_blocks):  # one block each
            yield epoch, step, dataset.index.blocks.first_sample[step : step + 1]

    found = announcer.Announcer(dataset)
    found.begin(0, 0, steps(0, 0))
    (plan,) = reader_of(dataset).plans
    with monkeypatch.context() as patched:
        patched.setattr(announcer, "_STEPS_AT_ONCE", 1)
        found.passed(passed)
    if passed == 2:
        assert plan.position < passed, "the cache is not told of so few"
    else:
        assert found._untold, "what came last is not told yet"
    found.begin(1, 30, steps(1, 30))
    assert plan.position == passed
    assert plan.blocks[passed] == 30
    found.passed(38)
    assert plan.blocks == [*range(passed), *range(30, 30 + len(plan.blocks) - passed)]
    assert found._position == passed + 8
    del found
    assert plan.calls[-1] == "close"


def test_a_server_that_is_lost_between_two_futures_is_logged_too(
    dataset: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    loader = DataLoader(dataset, batch_sampler=ElasticBatchSampler(dataset, 20, window_blocks=2))
    next(iter(loader))
    (plan,) = reader_of(dataset).plans
    plan.is_broken = True
    with caplog.at_level(logging.WARNING):
        assert len(numbers(loader)) == SAMPLES
    assert "nothing ahead until the next epoch" in caplog.text
    assert plan.calls[-1] == "close"


@pytest.mark.parametrize("batches_before", [1, SAMPLES // 20 - 3])
def test_a_lost_server_is_logged_and_training_goes_on(
    dataset: Dataset, caplog: pytest.LogCaptureFixture, batches_before: int
) -> None:
    loader = DataLoader(dataset, batch_sampler=ElasticBatchSampler(dataset, 20, window_blocks=2))
    reader = reader_of(dataset)
    batches = iter(loader)
    for _ in range(batches_before):
        next(batches)
    reader.plans[0].is_broken = True
    with caplog.at_level(logging.WARNING):
        assert len(list(batches)) == SAMPLES // 20 - batches_before
    assert "nothing ahead until the next epoch" in caplog.text
    assert reader.plans[0].calls[-1] == "close"
    assert len(numbers(loader)) == SAMPLES
    assert len(reader.plans) == 2
    assert reader.plans[1].position > 0


def test_nothing_is_announced_where_nobody_can_use_it(url: str, dataset: Dataset) -> None:
    in_place = open_dataset(url)
    assert foresee(in_place, ElasticBatchSampler(in_place, 4)) is None
    assert foresee([1, 2, 3], ElasticBatchSampler(range(3), 1)) is None
    in_place.reader.close()


def test_an_epoch_without_a_step_announces_nothing(dataset: Dataset) -> None:
    loader = DataLoader(dataset, batch_sampler=ElasticBatchSampler(dataset, 10 * SAMPLES, drop_last=True))
    assert numbers(loader) == []
    assert reader_of(dataset).plans[0].blocks == []


def test_a_copy_has_no_plan(url: str) -> None:
    with_cache = open_dataset(url, cache=CacheConfig((TierConfig("ram", 1 << 20),)))
    found = foresee(with_cache, ElasticBatchSampler(with_cache, 4))
    assert isinstance(found, ScheduleForesight)
    found.begin()
    copy = pickle.loads(pickle.dumps(found))
    assert copy._announcer._plan is None
    found.close()
    with_cache.reader.close()


@pytest.mark.parametrize(("cache", "may_grow"), [(None, True), (CacheConfig((TierConfig("ram", 1 << 20),)), False)])
def test_workers_make_no_more_ahead_where_a_plan_is_announced(
    url: str, cache: CacheConfig | None, may_grow: bool
) -> None:
    opened = open_dataset(url, cache=cache)
    loader = DataLoader(opened, batch_sampler=ElasticBatchSampler(opened, 4), num_workers=1)
    most = 0
    batches = cast("Any", iter(loader))
    for _ in range(20):
        batches._depth.waited()  # as one who always waits
        next(batches)
        most = max(most, len(batches._owed))
    del batches, loader
    opened.reader.close()
    assert (most > 2) == may_grow


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_real_cache_fetches_what_is_announced(url: str, num_workers: int) -> None:
    with_cache = open_dataset(url, cache=CacheConfig((TierConfig("ram", 1 << 16),), ring_bytes=1 << 18))
    loader = DataLoader(
        with_cache, batch_sampler=ElasticBatchSampler(with_cache, 20, window_blocks=2), num_workers=num_workers
    )
    for _ in range(2):
        assert sorted(numbers(loader)) == list(range(SAMPLES))
    stats = with_cache.reader.stats()["prefetch"]
    assert stats["plans"] == 1
    assert stats["issued"] > 0
    assert stats["useful"] + stats["late"] > 0
    del loader
    with_cache.reader.close()


def test_of_the_blocks_of_a_batch_those_stay_that_it_needs_last(dataset: Dataset) -> None:
    firsts = dataset.index.blocks.first_sample[:-1].tolist()
    kept = range(5)
    dataset.get_batch([*reversed(firsts[5:20]), *(firsts[block] for block in kept)])
    reader = reader_of(dataset)
    before = len(reader.requests)
    dataset.get_batch([firsts[block] for block in kept])
    assert len(reader.requests) == before


def test_what_comes_late_is_told_in_parts(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announcer, "_AHEAD_BLOCKS", 400)
    monkeypatch.setattr(announcer, "_STEPS_AT_ONCE", 2)
    loader = DataLoader(dataset, batch_sampler=ElasticBatchSampler(dataset, 4, window_blocks=2))
    for _ in range(3):
        for _batch in loader:
            (plan,) = reader_of(dataset).plans
            assert plan.position <= len(plan.blocks)
    blocks = 4 * dataset.index.num_blocks
    assert len(plan.blocks) >= blocks - 10
    assert plan.calls.count("extend") <= blocks // 4 + 10


def test_a_window_that_a_worker_just_keeps_is_announced_once(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    window_blocks = 6
    kept_bytes = (window_blocks - 1) * int(dataset.index.blocks.length.max())
    monkeypatch.setattr(dataset._buffer, "capacity_bytes", int(kept_bytes / announcer._BUFFER_SHARE))
    sampler = ElasticBatchSampler(dataset, 2, window_blocks=window_blocks, seed=4)
    numbers(DataLoader(dataset, batch_sampler=sampler))
    (plan,) = reader_of(dataset).plans
    ahead = 40 + window_blocks
    assert len(plan.blocks) <= dataset.index.num_blocks + ahead
