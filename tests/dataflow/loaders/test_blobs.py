import collections
import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflow import DataLoader, ShardWriter, open_dataset
from dataflow.loaders import collate
from dataflow.loaders.blobs import Blobs

parts = st.lists(st.one_of(st.none(), st.binary(max_size=20)), max_size=9)


def joined(values) -> Blobs:
    views = [None if value is None else memoryview(value) for value in values]
    return Blobs.join(views, np.empty(sum(len(value or b"") for value in values), np.uint8))


@given(parts, st.slices(9))
def test_what_is_joined_arrives_as_the_list_of_bytes_that_it_was_also_a_part_of_it(values, part):
    part = slice(part.start, part.stop)
    for whole, expected in ((joined(values), values), (joined(values)[part], values[part])):
        assert pickle.loads(pickle.dumps(whole, protocol=5)) == expected


def test_a_part_travels_without_the_bytes_of_the_others():
    part = joined([b"a" * 10_000, None, b"b" * 10_000, b"c" * 10_000])[1:3]
    assert 10_000 < len(pickle.dumps(part, protocol=5)) < 11_000


@pytest.fixture
def files(tmp_path):
    """A dataset, the bytes of its files, which grow from nothing to 40 KB, and a null."""
    rng = np.random.default_rng(0)
    values = [rng.bytes(500 * number) for number in range(80)]
    values[7] = None
    with ShardWriter(tmp_path / "set", pa.schema([("file", pa.binary()), ("note", pa.binary())])) as writer:
        for number, value in enumerate(values):
            writer.write({"file": value, "note": b"%d" % number})
    return open_dataset(tmp_path / "set"), values


@pytest.mark.parametrize("has_slots", [True, False])
def test_bytes_of_native_data_come_from_worker_processes_as_they_were_written(files, has_slots, monkeypatch):
    dataset, values = files
    if not has_slots:
        monkeypatch.setattr("dataflow.loaders.slots.SlotPool.allocate", lambda self, size_bytes: None)
    batches = list(DataLoader(dataset, batch_size=8, num_workers=2, multiprocessing_context="fork"))
    assert [value for batch in batches for value in batch["file"]] == values
    assert [value for batch in batches for value in batch["note"]] == [b"%d" % number for number in range(80)]
    assert {type(value) for batch in batches for value in batch["file"]} == {bytes, type(None)}


def test_only_large_bytes_are_joined_and_as_they_lie_in_their_blocks(files):
    dataset, values = files
    pool = collections.namedtuple("Pool", "allocate")(lambda size_bytes: np.empty(size_bytes, np.uint8))
    columns = dataset.get_batch(range(8, 16), collate._JoiningAllocator(pool))
    assert pickle.loads(pickle.dumps(columns["file"])) == values[8:16]
    assert (type(columns["file"]), type(columns["note"])) == (Blobs, list)
    assert type(dataset.get_batch(range(4), collate._JoiningAllocator(pool))["file"]) is list
    assert type(dataset.get_batch(range(8, 16), collate._Allocator(pool))["file"]) is list
