import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.errors import BadInputError
from dataflow import DataLoader
from dataflow.dataset import Dataset, open_dataset
from dataflow.formats.arrow import ShardWriter
from dataflow.loaders.joined import JoinedDataset
from dataflow.loaders.schedule_sampler import ScheduleSampler
from dataflow.order import FixedBatches, Mixture, Schedule, Shuffle


class Named:
    def __init__(self, name: str, length: int) -> None:
        self.fingerprint = name
        self.length = length
        self.requests = 0

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, numbers: list[int]) -> list[tuple[str, int]]:
        self.requests += 1
        return [(self.fingerprint, range(self.length)[number]) for number in numbers]


@given(lengths=st.lists(st.integers(0, 20), min_size=1, max_size=5), data=st.data())
def test_numbers_count_through_all_datasets(lengths: list[int], data: st.DataObject) -> None:
    joined = JoinedDataset([Named(str(place), length) for place, length in enumerate(lengths)])
    expected = [(str(place), number) for place, length in enumerate(lengths) for number in range(length)]
    assert len(joined) == len(expected)
    numbers = data.draw(st.lists(st.integers(0, len(expected) - 1), max_size=20)) if expected else []
    assert joined.__getitems__(numbers) == [expected[number] for number in numbers]
    assert all(dataset.requests <= 1 for dataset in joined.datasets)


def test_a_dataset_without_batched_access_is_asked_sample_by_sample() -> None:
    joined = JoinedDataset([range(10, 14), Named("b", 3)])
    assert joined.__getitems__([6, 0, 3]) == [("b", 2), 10, 13]
    assert joined[4] == ("b", 0)


def test_a_mixture_reads_what_its_numbers_say() -> None:
    joined = JoinedDataset([Named("a", 30), Named("b", 60)])
    sources = tuple(Shuffle(length, None, "full", 0, 1) for length in joined.lengths)
    schedule = Schedule(Mixture(sources, joined.lengths, (1.0, 3.0), 80, 8, 0), FixedBatches(8, "short"))
    batches = list(ScheduleSampler(schedule, fingerprint=joined.fingerprint, rank=0, world_size=1))
    assert len(batches) == 10
    for batch in batches:
        assert sorted(name for name, _ in joined.__getitems__(batch)) == ["a"] * 2 + ["b"] * 6


def native(folder: Path, schema: pa.Schema, first: int) -> Dataset:
    with ShardWriter(folder, schema) as writer:
        for number in range(first, first + 20):
            values = {"number": number, "pair": [number, -number], "text": str(number)}
            writer.write({name: values[name] for name in schema.names})
    return open_dataset(folder, cache=None)


def test_native_datasets_of_one_schema_gather_columns_as_their_samples_say(tmp_path: Path) -> None:
    schema = pa.schema([("number", pa.int64()), ("pair", pa.list_(pa.int32(), 2)), ("text", pa.string())])
    joined = JoinedDataset([native(tmp_path / "a", schema, 0), native(tmp_path / "b", schema, 100)])
    joined = pickle.loads(pickle.dumps(joined))
    numbers = [25, 3, 39, 3, 0, 20]
    allocated: list[str] = []

    def allocate(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        allocated.append(name)
        return np.empty(shape, dtype)

    columns = joined.get_batch(numbers, allocate)
    assert allocated == ["number", "pair"]
    assert columns["number"].tolist() == [105, 3, 119, 3, 0, 100]
    assert columns["pair"].tolist() == [sample["pair"].tolist() for sample in joined.__getitems__(numbers)]
    assert columns["text"] == [sample["text"] for sample in joined.__getitems__(numbers)]
    assert not len(joined.get_batch([])["number"])
    (batch,) = DataLoader(joined, batch_sampler=[numbers])
    assert batch["number"].tolist() == columns["number"].tolist()


class Columns(Named):
    schema = None

    def __init__(self, values: np.ndarray) -> None:
        super().__init__("columns", len(values))
        self.values = values

    def get_batch(self, numbers: list[int]) -> dict[str, np.ndarray]:
        return {"values": self.values[numbers]}


@pytest.mark.parametrize("others", [np.full((2, 3), 7, np.int32), np.full((2, 2), 7.5, np.float32)])
def test_columns_that_differ_in_shape_or_type_are_gathered_as_a_list_of_what_each_had(others: np.ndarray) -> None:
    joined = JoinedDataset([Columns(np.zeros((2, 2), np.int32)), Columns(others)])
    values = joined.get_batch([3, 0, 2])["values"]
    assert [(value.dtype, value.tolist()) for value in values] == [
        (others.dtype, others[1].tolist()),
        (np.dtype(np.int32), [0, 0]),
        (others.dtype, others[0].tolist()),
    ]
    assert isinstance(values, list)


def test_datasets_of_different_schemas_are_joined_sample_by_sample(tmp_path: Path) -> None:
    first = native(tmp_path / "a", pa.schema([("number", pa.int64())]), 0)
    second = native(tmp_path / "b", pa.schema([("number", pa.int32())]), 0)
    for others in ([second], [range(3)]):
        assert not hasattr(JoinedDataset([first, *others]), "get_batch")


def test_numbers_outside_and_empty_joins_are_refused() -> None:
    for number in (-1, 7):
        with pytest.raises(IndexError, match=f"sample {number} is out of range"):
            JoinedDataset([range(4), range(3)])[number]
    with pytest.raises(BadInputError, match="at least one"):
        JoinedDataset([])


def test_fingerprint_depends_on_every_part_and_their_order() -> None:
    prints = {
        JoinedDataset(parts).fingerprint
        for parts in ([Named("a", 1), Named("b", 2)], [Named("b", 2), Named("a", 1)], [range(1), range(2)], [range(3)])
    }
    assert len(prints) == 4
