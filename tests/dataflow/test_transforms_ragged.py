from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from connectors.errors import BadInputError
from dataflow import DataLoader, ShardWriter, open_dataset
from dataflow.transforms import Cast, Draws, Padded, Ragged, TransformedDataset

LENGTHS = st.lists(st.integers(0, 9), max_size=6)


def allocate(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.full(shape, 99, dtype)


def draws(count: int) -> Draws:
    return Draws(0, 0, np.arange(100, 100 + count))


def documents(lengths: list[int], dtype: str = "uint16") -> list[np.ndarray]:
    """Documents whose tokens tell them apart."""
    return [10 * number + np.arange(length, dtype=dtype) for number, length in enumerate(lengths)]


def native(path: Path, lengths: list[int]) -> Path:
    with ShardWriter(path, pa.schema({"tokens": pa.list_(pa.uint16())}), block_size_bytes=64) as writer:
        for document in documents(lengths):
            writer.write({"tokens": document})
    return path


@given(lengths=LENGTHS)
def test_ragged_values_are_cut_apart_again_by_their_offsets(lengths: list[int]) -> None:
    given_documents = documents(lengths)
    column = Ragged("x").transform_columns({"x": given_documents}, draws(len(lengths)), allocate)["x"]
    assert column.offsets.tolist() == [sum(lengths[:count]) for count in range(len(lengths) + 1)]
    assert len(column) == len(lengths)
    assert [one.tolist() for one in column] == [one.tolist() for one in given_documents]
    assert [one.tolist() for one in column[1:]] == [one.tolist() for one in given_documents[1:]]


@given(lengths=LENGTHS, length=st.sampled_from([None, 9, 12]), filling=st.integers(0, 60_000))
def test_padded_rows_hold_their_values_and_filling_alone(lengths: list[int], length: int | None, filling: int) -> None:
    transform = Padded("x", filling=filling, length=length)
    columns = transform.transform_columns({"x": documents(lengths)}, draws(len(lengths)), allocate)
    width = max(lengths, default=0) if length is None else length
    assert columns["x"].shape == (len(lengths), width)
    assert columns["x_length"].tolist() == lengths
    for row, document in zip(columns["x"].tolist(), documents(lengths), strict=True):
        assert row == document.tolist() + [filling] * (width - len(document))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_of_native_documents_come_as_values_and_offsets(tmp_path: Path, num_workers: int) -> None:
    lengths = [3, 0, 2000, 1, 2]
    dataset = TransformedDataset(
        open_dataset(native(tmp_path / "d", lengths)), [Cast("tokens", "int64"), Ragged("tokens")]
    )
    batches = list(DataLoader(dataset, batch_size=3, num_workers=num_workers))
    found = [
        batch["tokens"]["values"][first:last].tolist()
        for batch in batches
        for first, last in zip(batch["tokens"]["offsets"], batch["tokens"]["offsets"][1:], strict=False)
    ]
    assert found == [document.tolist() for document in documents(lengths)]
    assert {batch["tokens"]["values"].dtype for batch in batches} == {torch.int64}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_of_native_documents_come_padded(tmp_path: Path, num_workers: int) -> None:
    lengths = [3, 0, 2000, 1, 2]
    dataset = TransformedDataset(open_dataset(native(tmp_path / "d", lengths)), Padded("tokens", filling=7))
    batches = list(DataLoader(dataset, batch_size=3, num_workers=num_workers))
    assert [tuple(batch["tokens"].shape) for batch in batches] == [(3, 2000), (2, 2)]
    assert [batch["tokens_length"].tolist() for batch in batches] == [[3, 0, 2000], [1, 2]]
    assert batches[1]["tokens"].tolist() == [[30, 7], [40, 41]]


def test_samples_read_alone_keep_their_own_length(tmp_path: Path) -> None:
    dataset = TransformedDataset(open_dataset(native(tmp_path / "d", [3, 1])), Ragged("tokens"))
    assert [dataset[number]["tokens"].tolist() for number in (0, 1)] == [[0, 1, 2], [10]]
    assert [sample["tokens"].tolist() for sample in dataset.__getitems__([1, 0])] == [[10], [0, 1, 2]]


@pytest.mark.parametrize("transform", [Ragged("x"), Padded("x")])
@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"y": [1]}, "no field 'x', only y"),
        ({"x": [np.zeros(2), np.zeros((2, 2))]}, "sample 101: field 'x' has 2 dimensions"),
        ({"x": ["text"]}, "must hold numbers, got str"),
        ({"x": [None]}, "must hold numbers, got NoneType"),
    ],
)
def test_what_is_no_row_of_numbers_is_refused(transform, columns: dict, words: str) -> None:
    with pytest.raises(BadInputError, match=words):
        transform.transform_columns(columns, draws(len(next(iter(columns.values())))), allocate)


def test_values_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BadInputError, match="sample 101: field 'x' has 4 values, more than the length of 3"):
        Padded("x", length=3).transform_columns({"x": documents([3, 4])}, draws(2), allocate)
    with pytest.raises(BadInputError, match="from -1 to -1, does not fit uint16"):
        Padded("x", filling=-1).transform_columns({"x": documents([3, 4])}, draws(2), allocate)
    with pytest.raises(BadInputError, match="length must be at least 1, got 0"):
        Padded("x", length=0)
