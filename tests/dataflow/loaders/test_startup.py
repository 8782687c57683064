"""What a loader costs before its first batch, and what its workers hold after many: nothing per sample."""

import gc
import re
import tracemalloc
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

import dataflow.loaders.iterators
from dataflow import DataLoader, ElasticBatchSampler, ShardWriter, open_dataset
from dataflow.loaders.testing import Numbers

MIB = 1 << 20


def private_bytes(process):
    """The memory that a process shares with nobody."""
    text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    return 1024 * sum(int(size) for size in re.findall(r"Private_\w+: +(\d+) kB", text))


def open_loader(length):
    dataset = Numbers(length)
    return DataLoader(dataset, batch_sampler=ElasticBatchSampler(dataset, 4, shuffle="full"), num_workers=1)


def test_what_a_worker_is_told_is_as_short_for_a_hundred_million_samples():
    sizes = []
    for length in (100, 10**8):
        iterator = iter(open_loader(length))
        sizes.append(len(ForkingPickler.dumps(iterator._crew._job)))
        del iterator
    assert sizes[1] - sizes[0] < 64
    assert sizes[1] < 8192


def test_the_first_batch_of_a_hundred_million_samples_takes_no_memory_per_sample(monkeypatch):
    # It asks for a large block, which counts here although it is never written to.
    monkeypatch.setattr(dataflow.loaders.iterators, "keep_freed_memory", lambda: None)
    tracemalloc.start()
    try:
        loader = open_loader(10**8)
        batch = next(iter(loader))
        state = loader.state_dict()
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert batch.shape == (4, 1)
    assert state["sampler"]["position"] == 4
    assert peak_bytes < 16 * MIB  # a bit for each sample would be 12 MiB, a number 763


class Held(Numbers):
    """Numbers that look at an array which the trainer holds."""

    def __init__(self, length, held_bytes):
        super().__init__(length)
        self.held = np.ones(held_bytes, np.uint8)

    def __getitem__(self, index):
        part = len(self.held) // self.length
        return torch.tensor([int(self.held[index * part : (index + 1) * part].sum())])


def test_what_the_trainer_holds_is_not_copied_by_workers_that_read_it():
    found = []
    for held_bytes in (MIB, 128 * MIB):
        loader = DataLoader(Held(64, held_bytes), batch_size=4, num_workers=1, persistent_workers=True)
        iterator = iter(loader)
        assert sum(int(batch.sum()) for batch in iterator) == held_bytes
        found.append(private_bytes(iterator._workers[0]))
        del iterator, loader
        gc.collect()
    assert found[1] - found[0] < 32 * MIB


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("startup") / "set"
    schema = pa.schema([("number", pa.int64()), ("values", pa.list_(pa.float32(), 64))])
    values = np.zeros((20_000, 64), np.float32)
    columns = [pa.array(range(20_000)), pa.FixedSizeListArray.from_arrays(values.reshape(-1), 64)]
    with ShardWriter(folder, schema, block_size_bytes=1 << 16) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
    return str(folder)


def test_workers_hold_no_more_after_ten_epochs_than_after_two(url):
    dataset = open_dataset(url)
    sampler = ElasticBatchSampler(dataset, 100)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=1, persistent_workers=True)
    held = []
    for _ in range(10):
        iterator = iter(loader)
        assert sum(len(batch["number"]) for batch in iterator) == 20_000
        held.append(private_bytes(iterator._workers[0]))
    # An epoch has 5 MiB of samples, so one byte in five that stayed would show.
    assert held[-1] - held[1] < 8 * MIB
