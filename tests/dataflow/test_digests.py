"""Digests of samples: equal for equal samples, wherever they stand."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflow.convert.digests import bucket_sizes, sample_digests, value_bytes
from dataflow.formats.fields import numpy_dtype

ROWS = [
    {"n": 1, "x": 0.5, "s": "a", "b": b"", "many": [1], "flag": True},
    {"n": None, "x": None, "s": None, "b": None, "many": None, "flag": None},
    {"n": 0, "x": 0.0, "s": "", "b": b"a", "many": [], "flag": False},
    {"n": 0, "x": float("nan"), "s": "\0", "b": b"\0", "many": [None], "flag": False},
]
SCHEMA = pa.schema(
    {
        "n": pa.int64(),
        "x": pa.float64(),
        "s": pa.string(),
        "b": pa.binary(),
        "many": pa.list_(pa.int64()),
        "flag": pa.bool_(),
    }
)


def digests(rows: list[dict]) -> list[tuple[int, int]]:
    found = sample_digests(pa.RecordBatch.from_pylist(rows, SCHEMA), np.arange(len(rows)))
    return list(zip(found["high"].tolist(), found["low"].tolist(), strict=True))


@given(st.lists(st.sampled_from(range(len(ROWS))), min_size=1, max_size=8))
def test_a_digest_does_not_depend_on_the_samples_beside(order: list[int]) -> None:
    alone = [digests([row])[0] for row in ROWS]
    assert len(set(alone)) == len(ROWS)
    assert digests([ROWS[place] for place in order]) == [alone[place] for place in order]


def test_values_do_not_run_into_each_other() -> None:
    schema = pa.schema({"a": pa.string(), "b": pa.string()})
    rows = [{"a": "ab", "b": "c"}, {"a": "a", "b": "bc"}, {"a": "abc", "b": ""}, {"a": "abc", "b": None}]
    found = sample_digests(pa.RecordBatch.from_pylist(rows, schema), np.arange(4))
    assert len(set(found["low"].tolist())) == 4


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint64(), pa.float16(), pa.float32(), pa.float64()], ids=str)
def test_numbers_have_their_own_bytes_beside_nulls_too(kind: pa.DataType) -> None:
    dtype = numpy_dtype(kind)
    one, two = np.array([1, 2], dtype), pa.array(np.array([1, 0, 2], dtype), kind)
    nulls = pa.array([True, False, True])
    with_null = pa.compute.if_else(nulls, two, pa.scalar(None, kind))
    assert value_bytes(with_null) == [one[0].tobytes(), None, one[1].tobytes()]
    assert value_bytes(pa.array(one, kind)) == [one[0].tobytes(), one[1].tobytes()]


def test_buckets_hold_every_digest() -> None:
    batch = pa.record_batch({"n": np.arange(5000)})
    found = np.sort(sample_digests(batch, np.arange(5000)))
    sizes = bucket_sizes(found)
    assert (len(sizes), sizes.sum()) == (256, 5000)
    assert sizes.min() > 0
