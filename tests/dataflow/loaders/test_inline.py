"""Batches made in the trainer's process: small native ones several at once, which nobody can tell from one by one."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from connectors.errors import CorruptError
from dataflow import DataLoader, ElasticBatchSampler, ShardWriter, open_dataset, tensor_field
from dataflow.dataset import Dataset
from dataflow.testing import PlannedReader
from dataflow.transforms import Cast, TransformedDataset

SAMPLES, BATCH = 100, 4


@pytest.fixture
def dataset(tmp_path):
    schema = pa.schema([tensor_field("x", "uint16", (3000,)), ("note", pa.string())])
    with ShardWriter(tmp_path / "set", schema, block_size_bytes=50_000) as writer:
        for number in range(SAMPLES):
            writer.write({"x": np.full(3000, number, np.uint16), "note": str(number)})
    return open_dataset(tmp_path / "set")


@pytest.fixture(autouse=True)
def slow_machine(monkeypatch):
    """How many are made at once depends on their number and size alone."""
    monkeypatch.setattr("dataflow.loaders.pace.PARCEL_S", 1000)
    monkeypatch.setattr("dataflow.loaders.pace.MAX_BATCHES", 5)


@pytest.fixture
def gathers(monkeypatch):
    """The sizes of all gathers."""
    sizes, get_batch = [], Dataset.get_batch

    def counted(self, numbers, allocate=None):
        sizes.append(len(numbers))
        return get_batch(self, numbers, allocate)

    monkeypatch.setattr(Dataset, "get_batch", counted)
    return sizes


def loader_of(dataset, **options):
    sampler = ElasticBatchSampler(dataset, BATCH, rank=0, world_size=1, seed=3, **options)
    return DataLoader(dataset, batch_sampler=sampler)


def numbers_of(batch) -> list[int]:
    assert batch["x"].shape == (len(batch["note"]), 3000)
    assert torch.equal(batch["x"], batch["x"][:, :1].expand_as(batch["x"]))
    assert batch["note"] == [str(number) for number in batch["x"][:, 0].tolist()]
    return [int(note) for note in batch["note"]]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("casts", [False, True])
def test_several_are_made_at_once_and_are_what_they_are_one_by_one(dataset, casts, drop_last, gathers, monkeypatch):
    read = TransformedDataset(dataset, Cast("x", "int64")) if casts else dataset
    together = [numbers_of(batch) for batch in loader_of(read, drop_last=drop_last)]
    assert gathers == [4, 20, 20, 20, 20, 16]
    monkeypatch.setattr("dataflow.loaders.pace.MAX_BATCHES", 1)
    assert [numbers_of(batch) for batch in loader_of(read, drop_last=drop_last)] == together
    assert sorted(number for batch in together for number in batch) == list(range(SAMPLES))


@pytest.mark.parametrize("stop", [0, 1, 2, 5, 6, 24, 25])
def test_a_state_says_what_was_handed_out_and_not_what_was_drawn(dataset, stop):
    whole = [numbers_of(batch) for batch in loader_of(dataset)]
    loader = loader_of(dataset)
    iterator = iter(loader)
    head = [numbers_of(next(iterator)) for _ in range(stop)]
    state = loader.state_dict()
    resumed = loader_of(dataset)
    resumed.load_state_dict(state)
    tail = [numbers_of(batch) for batch in resumed]
    assert head + (tail if stop < len(whole) else []) == whole
    assert len(tail) == (len(whole) - stop or len(whole))
    rest = [numbers_of(batch) for batch in iterator]
    assert rest == whole[stop:]


@pytest.mark.parametrize(("batch", "sizes"), [(1, [1, 3, 3, 3]), (4, [4, 4, 4, 4])])
def test_through_a_cache_no_more_are_made_at_once_than_a_part_of_an_epoch(dataset, batch, sizes, gathers, monkeypatch):
    monkeypatch.setattr("dataflow.loaders.iterators._AHEAD_SHARE", 3 / SAMPLES)
    dataset._reader = PlannedReader(dataset.reader)
    sampler = ElasticBatchSampler(dataset, batch, rank=0, world_size=1)
    iterator = iter(DataLoader(dataset, batch_sampler=sampler))
    while len(gathers) < 4:
        next(iterator)
    assert gathers == sizes


def test_samplers_of_others_are_asked_for_one_batch_after_the_other(dataset, gathers):
    drawn = []

    class Sampler:
        def __iter__(self):
            for start in range(0, SAMPLES, BATCH):
                drawn.append(start)
                yield range(start, start + BATCH)

    iterator = iter(DataLoader(dataset, batch_sampler=Sampler()))
    for step in range(1, 9):
        next(iterator)
        assert len(drawn) == len(gathers) == step


def test_a_batch_that_cannot_be_made_fails_in_its_turn_and_the_others_come(dataset, monkeypatch):
    expected = [numbers_of(batch) for batch in loader_of(dataset)]
    bad = expected[3][1]
    get_batch = Dataset.get_batch

    def fails(self, numbers, allocate=None):
        if bad in list(numbers):
            raise CorruptError(f"sample {bad} is damaged")
        return get_batch(self, numbers, allocate)

    monkeypatch.setattr(Dataset, "get_batch", fails)
    iterator, found = iter(loader_of(dataset)), []
    for step in range(len(expected)):
        if step == 3:
            with pytest.raises(CorruptError, match=f"sample {bad} is damaged"):
                next(iterator)
        else:
            found.append(numbers_of(next(iterator)))
    assert found == expected[:3] + expected[4:]
    assert list(iterator) == []


def test_a_sampler_that_fails_does_so_behind_the_batches_that_it_gave(dataset):
    class Broken(ElasticBatchSampler):
        def __iter__(self):
            for step, batch in enumerate(super().__iter__()):
                if step == 3:
                    raise ZeroDivisionError
                yield batch

    iterator = iter(DataLoader(dataset, batch_sampler=Broken(dataset, BATCH, rank=0, world_size=1)))
    for _ in range(3):
        numbers_of(next(iterator))
    with pytest.raises(ZeroDivisionError):
        next(iterator)


def test_each_batch_is_a_tensor_of_its_own(dataset):
    first, *others = loader_of(dataset)
    assert {batch["x"].untyped_storage().nbytes() for batch in others} == {BATCH * 3000 * 2}
    expected = [numbers_of(batch) for batch in others]
    first["x"].zero_()
    others[1]["x"].zero_()
    del expected[1], others[1]
    assert [numbers_of(batch) for batch in others] == expected
