"""Samplers that are not ours are foreseen, and neither they nor any generator notice."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from dataflow import DataLoader, Dataset, ShardWriter, open_dataset
from dataflow.loaders import announcer, rehearsal
from dataflow.loaders.generators import GeneratorStates
from dataflow.testing import PlannedReader, RecordedPlan

SAMPLES = 80
BATCH = 8
EPOCHS = 3


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("data") / "numbers")
    schema = pa.schema([pa.field("number", pa.int64(), nullable=False), pa.field("text", pa.string(), nullable=False)])
    with ShardWriter(folder, schema, block_size_bytes=400, shard_size_bytes=20_000) as writer:
        for number in range(SAMPLES):
            writer.write({"number": number, "text": f"{number:03}" * 50})
    return folder


@pytest.fixture
def dataset(url: str) -> Iterator[Dataset]:
    found = open_dataset(url, buffer_bytes=400)
    found._reader = PlannedReader(found._reader)
    yield found
    found.reader.close()


@pytest.fixture
def plain(url: str) -> Iterator[Dataset]:
    found = open_dataset(url)
    yield found
    found.reader.close()


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(announcer, "_AHEAD_BLOCKS", 30)
    monkeypatch.setattr(announcer, "_MARK_BLOCKS", 4)
    monkeypatch.setattr(rehearsal, "_CHUNK_STEPS", 3)
    before = GeneratorStates.now()
    yield
    before.restore()


class ShufflesItself:
    """Draws all at once, from Python's generator, and changes what it holds."""

    def __init__(self) -> None:
        self.indices = list(range(SAMPLES))

    def __len__(self) -> int:
        return SAMPLES // BATCH

    def __iter__(self) -> Iterator[list[int]]:
        random.shuffle(self.indices)
        return iter([self.indices[begin : begin + BATCH] for begin in range(0, SAMPLES, BATCH)])


class DrawsAsItGoes:
    """Draws each batch from numpy's generator when it is asked for, and yields numpy's numbers."""

    def __len__(self) -> int:
        return SAMPLES // BATCH

    def __iter__(self) -> Iterator[Any]:
        for _ in range(len(self)):
            yield np.random.randint(-SAMPLES, SAMPLES, BATCH)


class CountsEpochs:
    """Keeps a state of its own."""

    def __init__(self) -> None:
        self.epoch = 0
        self.drawn = 0

    def __len__(self) -> int:
        return SAMPLES // BATCH

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.drawn = state["epoch"], state["drawn"]

    def __iter__(self) -> Iterator[list[int]]:
        rng = random.Random(self.epoch)
        for _ in range(len(self)):
            self.drawn += 1
            yield rng.sample(range(SAMPLES), BATCH)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


KINDS: dict[str, Callable[[Dataset], dict[str, Any]]] = {
    "in order": lambda data: {"batch_size": BATCH},
    "shuffled": lambda data: {"batch_size": BATCH, "shuffle": True},
    "shuffled, a generator": lambda data: {"batch_size": BATCH, "shuffle": True, "generator": generator()},
    "a sampler's generator": lambda data: {"batch_size": 7, "sampler": RandomSampler(data, generator=generator())},
    "with replacement": lambda data: {
        "batch_size": BATCH,
        "sampler": RandomSampler(data, replacement=True, num_samples=70, generator=generator()),
    },
    "a subset": lambda data: {"batch_size": BATCH, "sampler": SubsetRandomSampler(range(20, 70)), "drop_last": True},
    "weighted": lambda data: {"batch_size": BATCH, "sampler": WeightedRandomSampler([1.0] * SAMPLES, 70)},
    "one of two ranks": lambda data: {"batch_size": BATCH, "sampler": DistributedSampler(data, 2, 1)},
    "a list": lambda data: {"batch_sampler": [[1, 5], [70, 3, -1], [7]]},
    "single samples": lambda data: {"batch_size": None, "sampler": SubsetRandomSampler(range(30))},
    "shuffles itself": lambda data: {"batch_sampler": ShufflesItself()},
    "draws as it goes": lambda data: {"batch_sampler": DrawsAsItGoes()},
    "counts epochs": lambda data: {"batch_sampler": CountsEpochs()},
    "batches of ours": lambda data: {"batch_sampler": BatchSampler(RandomSampler(data), BATCH, drop_last=True)},
    "no sampler of numbers": lambda data: {"batch_sampler": [torch.tensor([1, 2]), torch.tensor([31])]},
}


def history(data: Dataset, kind: str, num_workers: int, *, persistent: bool = False) -> list[Any]:
    """Train some epochs; return all that there is to see from outside."""
    torch.manual_seed(1)
    random.seed(2)
    np.random.seed(3)
    loader: Any = DataLoader(data, num_workers=num_workers, persistent_workers=persistent, **KINDS[kind](data))
    seen: list[Any] = []
    for epoch in range(EPOCHS):
        for part in (loader.sampler, loader.batch_sampler):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        for batch in loader:
            seen += [np.atleast_1d(batch["number"]).tolist(), loader.state_dict()]
        states = GeneratorStates.now()
        seen += [states.python, states.numpy[1].tolist(), states.numpy[2:], states.torch]
        seen += [loader.generator and loader.generator.get_state().tolist()]
    return seen


def plan_of(data: Dataset) -> RecordedPlan:
    (plan,) = reader_of(data).plans
    return plan


def reader_of(data: Dataset) -> PlannedReader:
    reader = data.reader
    assert isinstance(reader, PlannedReader)
    return reader


def blocks_of(data: Dataset, *batches: list[int]) -> list[int]:
    """What a plan of these steps says."""
    steps = ((0, step, np.array(batch) % SAMPLES) for step, batch in enumerate(batches))
    return [block for _, _, blocks in announcer._first_needed(data.index, steps, 0) for block in blocks.tolist()]


@pytest.mark.parametrize("kind", KINDS)
def test_all_epochs_are_announced_in_order_and_nobody_notices(dataset: Dataset, plain: Dataset, kind: str) -> None:
    seen = history(dataset, kind, 0)
    assert seen == history(plain, kind, 0)
    plan = plan_of(dataset)
    assert "replace" not in plan.calls, "each epoch was foretold before it began"
    batches = [part for part in seen if isinstance(part, list) and part and len(part) <= BATCH]
    expected = blocks_of(dataset, *batches)
    assert plan.blocks[: len(expected)] == expected
    assert len(expected) - 30 <= plan.position <= len(expected) < len(plan.blocks), "and another epoch after the last"


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("kind", ["shuffled, a generator", "shuffles itself"])
def test_with_workers_too(dataset: Dataset, plain: Dataset, kind: str, persistent: bool) -> None:
    assert history(dataset, kind, 2, persistent=persistent) == history(plain, kind, 2, persistent=persistent)
    plan = plan_of(dataset)
    assert "replace" not in plan.calls
    assert plan.position > 0
    # torch's own loader begins a second time where it has workers, and so this sampler is shuffled twice.
    assert len(plan.blocks) > plan.position


def test_an_order_that_the_model_disturbs_is_left_alone_after_some_epochs(dataset: Dataset, plain: Dataset) -> None:
    def train(data: Dataset) -> list[int]:
        np.random.seed(3)
        loader = DataLoader(data, batch_sampler=DrawsAsItGoes())
        numbers = []
        for _ in range(5):
            for batch in loader:
                np.random.random()
                numbers += batch["number"].tolist()
        return numbers

    assert train(dataset) == train(plain)
    assert [plan.calls[-1] for plan in reader_of(dataset).plans] == ["close"] * 3


def test_an_epoch_that_was_foretold_wrongly_is_announced_anew_and_then_none_is_foretold(
    dataset: Dataset, plain: Dataset
) -> None:
    def train(data: Dataset) -> list[int]:
        torch.manual_seed(1)
        loader = DataLoader(data, batch_size=BATCH, shuffle=True)
        numbers = []
        for _ in range(6):
            for batch in loader:
                numbers += batch["number"].tolist()
            torch.rand(1)
        return numbers

    order = train(dataset)
    assert order == train(plain)
    plan = plan_of(dataset)
    assert plan.calls.count("replace") == 5
    # Nothing follows the last epoch, and what came before is what was read.
    last = blocks_of(dataset, *(order[begin : begin + BATCH] for begin in range(5 * SAMPLES, 6 * SAMPLES, BATCH)))
    assert plan.blocks[-len(last) :] == last


def test_who_never_names_the_epoch_is_learned_from(dataset: Dataset) -> None:
    loader = DataLoader(dataset, batch_size=BATCH, sampler=DistributedSampler(dataset, 2, 0))
    orders = [[n for batch in loader for n in batch["number"].tolist()] for _ in range(4)]
    assert orders[0] == orders[3]
    assert plan_of(dataset).calls.count("replace") == 1, "the second epoch only"


def test_a_loaded_state_is_announced_from_where_it_stands(dataset: Dataset) -> None:
    loader = DataLoader(dataset, batch_size=BATCH, shuffle=True, generator=generator())
    batches = iter(loader)
    for _ in range(5):
        next(batches)
    state = loader.state_dict()
    rest = [n for batch in batches for n in batch["number"].tolist()]
    loader.load_state_dict(state)
    plan = plan_of(dataset)
    place = plan.position
    assert [n for batch in loader for n in batch["number"].tolist()] == rest
    expected = blocks_of(dataset, *(rest[begin : begin + BATCH] for begin in range(0, len(rest), BATCH)))
    assert plan.blocks[place : place + len(expected)] == expected
    calls = len(plan.calls)
    assert len([*loader]) == SAMPLES // BATCH
    assert "replace" not in plan.calls[calls:], "the epoch after it was foretold"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_epoch_that_is_set_behind_iter_is_announced(dataset: Dataset, num_workers: int) -> None:
    sampler = DistributedSampler(dataset, 1, 0)
    loader = DataLoader(dataset, batch_size=BATCH, sampler=sampler, num_workers=num_workers)
    batches = iter(loader)
    sampler.set_epoch(3)
    drawn = [batch["number"].tolist() for batch in batches]
    plan, expected = plan_of(dataset), blocks_of(dataset, *drawn)
    assert plan.blocks[: len(expected)] == expected
    assert plan.calls.count("replace") == 1, "as it was set, not as it was seen to be drawn"


def test_an_epoch_left_early_is_followed_by_a_new_one(dataset: Dataset) -> None:
    loader = DataLoader(dataset, batch_size=BATCH, shuffle=True)
    for _ in range(3):
        next(iter(loader))
    place = plan_of(dataset).position
    order = [n for batch in loader for n in batch["number"].tolist()]
    assert set(plan_of(dataset).blocks[place:]) >= set(blocks_of(dataset, order))


def test_of_two_live_iterators_the_newer_one_tells(dataset: Dataset) -> None:
    loader = DataLoader(dataset, batch_size=BATCH, shuffle=True)
    older, newer = iter(loader), iter(loader)
    seen = []
    for batch, _ in zip(newer, older, strict=True):
        seen.append(batch["number"].tolist())
    expected = blocks_of(dataset, *seen)
    assert plan_of(dataset).blocks[: len(expected)] == expected


@pytest.mark.parametrize(
    "sampler", [iter([[1, 2], [3]]), ([n] for n in range(4)), [["a"], ["b"]]], ids=["iterator", "generator", "names"]
)
def test_what_cannot_be_copied_or_numbered_is_left_alone(dataset: Dataset, sampler: Any) -> None:
    try:
        for batch in DataLoader(dataset, batch_sampler=sampler):
            assert len(batch["number"])
    except (TypeError, ValueError, IndexError):
        assert isinstance(sampler, list), "the dataset's own complaint"
    assert all(plan.blocks == [] for plan in reader_of(dataset).plans) or isinstance(sampler, type(iter([])))


def test_a_sampler_that_fails_says_so_itself(dataset: Dataset) -> None:
    class Fails:
        def __iter__(self) -> Iterator[list[int]]:
            yield [3, 4]
            yield [SAMPLES]

    batches = iter(DataLoader(dataset, batch_sampler=Fails()))
    assert next(batches)["number"].tolist() == [3, 4]
    with pytest.raises(IndexError, match=str(SAMPLES)):
        next(batches)


def test_in_a_job_of_several_processes_only_samplers_of_torch_are_rehearsed(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)

    def rehearse(sampler: Any) -> rehearsal.Rehearsal:
        return rehearsal.Rehearsal(
            rehearsal.Setting(sampler, None, ("iter",), ("iter",)), dataset, epoch=0, epoch_stride=1
        )

    for sampler in (ShufflesItself(), BatchSampler(ShufflesItself(), 4, drop_last=False)):
        with pytest.raises(ValueError, match="other ranks"):
            rehearse(sampler)
    for sampler in (BatchSampler(SequentialSampler(dataset), 4, drop_last=False), [[1], [2]]):
        assert next(rehearse(sampler).steps())[1] == 0


@pytest.mark.parametrize("kind", ["shuffled", "shuffled, a generator", "a sampler's generator"])
def test_while_worker_threads_are_at_work_no_generator_is_swapped(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    loader: Any = DataLoader(dataset, num_workers=2, workers="thread", **KINDS[kind](dataset))
    for _ in range(2):
        batches = iter(loader)
        with monkeypatch.context() as patched:
            patched.setattr(GeneratorStates, "restore", lambda states: pytest.fail("swapped"))
            order = [batch["number"].tolist() for batch in batches]
    plan = plan_of(dataset)
    is_private = kind == "shuffled, a generator"
    assert ("replace" not in plan.calls) == is_private
    expected = blocks_of(dataset, *order)
    place = next(n for n in range(len(plan.blocks)) if plan.blocks[n : n + len(expected)] == expected)
    assert (len(plan.blocks) > place + len(expected)) == is_private, "and the epoch after it, where nobody else draws"


def test_samplers_of_others_are_left_alone_where_threads_work(dataset: Dataset) -> None:
    loader = DataLoader(dataset, batch_sampler=ShufflesItself(), num_workers=2, workers="thread")
    assert len([*loader]) == SAMPLES // BATCH
    assert reader_of(dataset).plans == []
