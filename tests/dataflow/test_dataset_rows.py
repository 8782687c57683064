"""Rows gathered from wherever they lie."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.access import open_reader
from connectors.errors import CorruptError
from dataflow.dataset import Dataset, open_dataset
from dataflow.dataset.columns import WIDE_ROW_BYTES
from dataflow.dataset.rows import MAX_ROW_BYTES, _memory, address_of, rows_at
from dataflow.formats import open_source, tensor_field
from dataflow.formats.arrow import ShardWriter
from dataflow.formats.protocol import Source


@given(st.integers(1, 100), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 200)), max_size=20))
def test_rows_of_any_width_come_from_any_place_of_any_array(row_bytes: int, places: list[tuple[int, int]]) -> None:
    arrays = [np.random.default_rng(number).integers(0, 256, 300, np.uint8) for number in range(3)]
    addresses = np.array([address_of(arrays[array]) + first for array, first in places], np.int64)
    found = rows_at(addresses, row_bytes)
    assert [row.tobytes() for row in found] == [
        arrays[array][first : first + row_bytes].tobytes() for array, first in places
    ]


def test_the_widest_row_comes_whole() -> None:
    array = np.arange(2 * MAX_ROW_BYTES, dtype=np.int64)
    found = rows_at(np.array([address_of(array) + 8]), MAX_ROW_BYTES).view(np.int64)
    assert found.tolist() == list(range(1, 1 + MAX_ROW_BYTES // 8))


@pytest.mark.parametrize("row_bytes", [1, MAX_ROW_BYTES])
def test_rows_may_lie_at_the_highest_addresses_of_any_machine(row_bytes: int) -> None:
    last = _memory(row_bytes)[-1:]
    assert address_of(last) == (1 << 48) - 1, "on Arm, where a process gets the highest first"


@pytest.mark.parametrize("width", [1, 3, WIDE_ROW_BYTES // 8, WIDE_ROW_BYTES // 8 + 1])
def test_tensors_of_any_width_and_layout_come_in_the_order_asked(tmp_path: Path, width: int) -> None:
    tensors = np.arange(12 * 4 * width, dtype=np.int32).reshape(12, 2, 2, width)
    kind = pa.fixed_shape_tensor(pa.int32(), (width, 2, 2), permutation=[2, 1, 0])
    stored = pa.array(tensors.transpose(0, 3, 2, 1).reshape(12, -1).tolist(), pa.list_(pa.int32(), 4 * width))
    schema = pa.schema([tensor_field("plain", np.int32, (2, 2, width)), pa.field("turned", kind)])
    with ShardWriter(str(tmp_path / "d"), schema, block_size_bytes=1 << 16) as writer:
        plain = pa.array(tensors.reshape(12, -1).tolist(), pa.list_(pa.int32(), 4 * width))
        columns = [pa.ExtensionArray.from_storage(schema.field(0).type, plain)]
        columns.append(pa.ExtensionArray.from_storage(kind, stored))
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
    dataset = open_dataset(str(tmp_path / "d"))
    asked = [7, 0, 11, 7, 3]
    batch = dataset.get_batch(asked, lambda name, shape, dtype: np.empty(shape, np.int64))
    assert batch["plain"].tolist() == tensors[asked].tolist()
    assert batch["turned"].tolist() == tensors[asked].tolist()


class _Short:
    """A source whose blocks have one sample less than its index says."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def decode(self, block: int, data: memoryview) -> pa.RecordBatch:
        return self._source.decode(block, data)[:-1]


def test_a_block_with_fewer_samples_than_its_index_says_is_corrupt(tmp_path: Path) -> None:
    url = str(tmp_path / "d")
    with ShardWriter(url, pa.schema([pa.field("number", pa.int64())])) as writer:
        for number in range(5):
            writer.write({"number": number})
    reader = open_reader(url, None)
    dataset = Dataset(_Short(open_source(url, reader)), reader, buffer_bytes=1 << 20)
    with pytest.raises(CorruptError, match=r"has 4 samples, the index says 5"):
        dataset.get_batch([4])
