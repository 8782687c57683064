"""How many batches are handed over together, and that nobody can tell by what arrives."""

import random
import time

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data import Dataset

from dataflow import ShardWriter, open_dataset, tensor_field
from dataflow.loaders import DataLoader
from dataflow.loaders.collate import Fetch
from dataflow.loaders.pace import MAX_BATCHES, PARCEL_BYTES, PARCEL_S, Pace
from dataflow.loaders.process_iterator import ProcessIterator
from dataflow.loaders.testing import Failing, Numbers
from dataflow.transforms import Cast, Padded, TransformedDataset


def after(batches, seconds, size_bytes):
    pace = Pace()
    pace.made(batches, seconds, size_bytes)
    return pace.batches


def test_the_first_batch_is_handed_over_alone():
    assert Pace().batches == 1


def test_as_many_are_made_as_take_a_moment_together():
    assert after(1, PARCEL_S / 3.5, 0) == 3
    assert after(4, PARCEL_S, 0) == 4
    assert after(4, 2 * PARCEL_S, 0) == 2
    assert after(1, 100 * PARCEL_S, 0) == 1
    assert after(1, 0, 0) == MAX_BATCHES


def test_as_many_are_made_as_share_a_slot_of_moderate_size():
    assert after(1, 0, PARCEL_BYTES // 4) == 4
    assert after(2, 0, PARCEL_BYTES) == 2
    assert after(1, 0, 2 * PARCEL_BYTES) == 1


@pytest.fixture
def together(monkeypatch):
    """Make every hand-over as large as it may be, and count the batches of each that arrives."""
    sizes = []
    take = ProcessIterator._take

    def note(self, worker, result):
        sizes.append(len(result.made))
        take(self, worker, result)

    monkeypatch.setattr(ProcessIterator, "_take", note)
    monkeypatch.setattr(Pace, "made", lambda self, *_: setattr(self, "batches", MAX_BATCHES))
    return sizes


class Drawing(Dataset):
    """Samples that depend on what was drawn from the worker's generators before."""

    def __len__(self):
        return 600

    def __getitem__(self, number):
        return number, torch.rand(3), random.random(), np.random.random()


def test_random_samples_are_torchs_however_many_batches_travel_together(together):
    found = []
    for kind in (TorchLoader, DataLoader):
        torch.manual_seed(3)
        batches = kind(Drawing(), batch_size=2, shuffle=True, num_workers=2, prefetch_factor=8)
        found.append([[part.tolist() for part in batch] for batch in batches])
    assert found[0] == found[1]
    assert max(together) > 1


def test_an_error_costs_its_own_batch_only(together):
    batches = iter(DataLoader(Failing(160, {41: KeyError("gone")}), num_workers=2, prefetch_factor=8))
    arrived = []
    for number in range(160):
        if number == 41:
            with pytest.raises(KeyError, match="gone"):
                next(batches)
        else:
            arrived.append(next(batches)[0, 0].item())
    assert arrived == [number for number in range(160) if number != 41]
    assert max(together) > 1


class Unpicklable(Numbers):
    def __getitem__(self, index):
        return (lambda: index) if index == 41 else super().__getitem__(index)


def test_a_batch_that_cannot_be_pickled_costs_no_other(together):
    batches = iter(DataLoader(Unpicklable(100), batch_size=None, num_workers=1, prefetch_factor=16))
    for number in range(100):
        if number == 41:
            with pytest.raises(Exception, match="pickle"):
                next(batches)
        else:
            assert next(batches)[0].item() == number
    assert max(together) > 1


def test_batches_that_nobody_wants_give_their_slots_back(together):
    loader = DataLoader(Numbers(4000, width=600), batch_size=4, num_workers=1, persistent_workers=True)
    adopted = set()
    for _ in range(40):
        batches = iter(loader)
        next(batches)
        adopted |= batches._crew.workers[0].slots._memory.keys()
    # Without them, each epoch would leave as many behind as it had asked for.
    assert len(adopted) < 20


@pytest.fixture
def native(tmp_path):
    values = np.arange(1200, dtype=np.uint16).reshape(400, 3)
    fields = [tensor_field("values", "uint16", (3,)), pa.field("name", pa.string())]
    with ShardWriter(tmp_path / "data", pa.schema(fields)) as writer:
        for number, row in enumerate(values):
            writer.write({"values": row, "name": f"sample {number}"})
    return open_dataset(tmp_path / "data")


@pytest.mark.parametrize("workers", ["process", "thread"])
@pytest.mark.parametrize("transforms", [[], [Cast("values", "int64")], [Padded("values")]])
def test_native_batches_are_the_same_gathered_together_or_one_by_one(together, native, workers, transforms):
    dataset = TransformedDataset(native, transforms) if transforms else native
    assert dataset.is_rowwise == (transforms != [Padded("values")])

    def epoch(**options):
        torch.manual_seed(1)
        return [
            ({name: getattr(column, "tolist", lambda column=column: column)() for name, column in batch.items()})
            for batch in DataLoader(dataset, batch_size=3, shuffle=True, **options)
        ]

    assert epoch(num_workers=2, workers=workers, prefetch_factor=8) == epoch()


def test_threads_gather_several_batches_by_one_call(together, native, monkeypatch):
    calls = []
    gather = type(native).get_batch

    def count(self, numbers, allocate=None):
        calls.append(len(numbers))
        return gather(self, numbers, allocate)

    monkeypatch.setattr(type(native), "get_batch", count)
    loader = DataLoader(native, batch_size=1, num_workers=1, workers="thread", prefetch_factor=4)
    iterator = iter(loader)
    iterator._depth.at_once = 4
    assert sorted(int(batch["values"][0, 0]) for batch in iterator) == list(range(0, 1200, 3))
    assert sum(calls) == 400
    assert max(calls) > 1


class Slow(Numbers):
    """Numbers that take longer than batches wait for each other."""

    def __getitem__(self, index):
        time.sleep(1.5 * PARCEL_S)
        return super().__getitem__(index)


def test_batches_that_take_long_do_not_wait_for_each_other(together):
    loader = DataLoader(Slow(20), num_workers=1, prefetch_factor=8)
    assert [int(batch[0, 0]) for batch in loader] == list(range(20))
    assert set(together) == {1}


@pytest.mark.parametrize("workers", ["process", "thread"])
def test_batches_with_a_deadline_are_made_one_by_one(together, native, monkeypatch, workers):
    monkeypatch.setattr(Fetch, "together", None)
    loader = DataLoader(native, num_workers=1, workers=workers, prefetch_factor=8, worker_deadline_s=100)
    assert len(list(loader)) == 400
    assert set(together) <= {1}


def test_who_keeps_small_fields_keeps_no_slots(together, tmp_path):
    schema = pa.schema([tensor_field("row", "float32", (600,)), pa.field("label", pa.int64())])
    with ShardWriter(tmp_path / "data", schema) as writer:
        for number in range(400):
            writer.write({"row": np.full(600, number, np.float32), "label": number})
    loader = DataLoader(open_dataset(tmp_path / "data"), batch_size=2, num_workers=1, prefetch_factor=8)
    iterator = iter(loader)
    labels = [batch["label"] for batch in iterator]
    assert torch.cat(labels).tolist() == list(range(400))
    assert not iterator._crew._holdings.ring
    assert max(together) > 1
