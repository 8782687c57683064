"""`tf.train.Example`, against protobuf's own implementation."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tfrecord import example_pb2

from connectors.errors import BadInputError
from dataflow.formats.example import FeatureKinds, decode_example, encode_example, is_example

FEATURES = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=5),
    st.one_of(
        st.tuples(st.just("bytes"), st.lists(st.binary(max_size=200), max_size=4)),
        st.tuples(st.just("float"), st.lists(st.floats(width=32, allow_nan=False), max_size=4)),
        st.tuples(st.just("int64"), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4)),
    ),
    max_size=5,
)


def serialise(features: dict) -> bytes:
    example = example_pb2.Example()
    for name, (kind, values) in features.items():
        getattr(example.features.feature[name], f"{kind}_list").value.extend(values)
    return example.SerializeToString()


def plain(features: dict) -> dict:
    return {
        name: (kind, [bytes(v) if kind == "bytes" else v for v in values]) for name, (kind, values) in features.items()
    }


@given(FEATURES)
def test_what_protobuf_writes_is_read(features: dict) -> None:
    read = plain(decode_example(memoryview(serialise(features))))
    assert {name: values for name, (_, values) in read.items()} == {
        name: values for name, (_, values) in features.items()
    }
    assert all(read[name][0] == kind for name, (kind, values) in features.items() if values)


@given(FEATURES)
def test_protobuf_reads_what_is_written(features: dict) -> None:
    example = example_pb2.Example.FromString(encode_example(features))
    assert set(example.features.feature) == set(features)
    for name, (kind, values) in features.items():
        assert list(getattr(example.features.feature[name], f"{kind}_list").value) == values


@given(st.binary(max_size=60))
def test_any_bytes_are_an_example_or_a_value_error(record: bytes) -> None:
    try:
        decode_example(memoryview(record))
    except ValueError:
        assert not is_example(memoryview(record))


def kinds(*examples: dict) -> pa.Schema:
    seen = FeatureKinds()
    for example in examples:
        seen.add(example, "file")
    return seen.schema()


@pytest.mark.parametrize(
    ("examples", "expected"),
    [
        ([("int64", [1]), ("int64", [2])], pa.int64()),
        ([("float", [1.0, 2.0]), ("float", [3.0, 4.0])], pa.list_(pa.field("item", pa.float32(), nullable=False), 2)),
        ([("float", [1.0]), ("float", [3.0, 4.0])], pa.list_(pa.float32())),
        ([("float", [1.0]), ("float", [])], pa.list_(pa.float32())),
        ([("bytes", [b"a"]), ("bytes", [])], pa.binary()),
        ([("bytes", [b"a"]), ("bytes", [b"b", b"c"])], pa.list_(pa.binary())),
    ],
)
def test_the_number_of_values_decides_the_type(examples: list, expected: pa.DataType) -> None:
    assert kinds(*({"x": example} for example in examples)).field("x").type == expected


def test_a_feature_of_two_kinds_is_refused() -> None:
    with pytest.raises(BadInputError, match="feature 'x' is float in a record of file and int64 in those before"):
        kinds({"x": ("int64", [1])}, {"x": ("float", [1.0])})


def test_numbers_are_exact() -> None:
    record = encode_example({"x": ("float", [float(np.float32(0.1))]), "y": ("int64", [-1])})
    assert decode_example(memoryview(record)) == {"x": ("float", [float(np.float32(0.1))]), "y": ("int64", [-1])}
