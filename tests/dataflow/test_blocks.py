"""Cutting record batches into blocks."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from dataflow.formats.arrow.blocks import BlockCutter, sample_sizes
from dataflow.formats.arrow.shard import ShardBuilder


def cut(pieces: list[pa.RecordBatch], limit: int) -> list[list[bytes]]:
    cutter = BlockCutter(limit)
    blocks = [block for piece in pieces for block in cutter.push(piece)] + list(cutter.flush())
    return [block.column(0).to_pylist() for block in blocks]


@given(st.lists(st.binary(max_size=20), max_size=40), st.integers(1, 60), st.lists(st.integers(0, 40), max_size=5))
def test_cuts_depend_on_the_samples_and_not_on_how_they_come(
    values: list[bytes], limit: int, bounds: list[int]
) -> None:
    whole = pa.record_batch([pa.array(values, pa.binary())], names=["x"])
    bounds = sorted({0, len(values), *(bound for bound in bounds if bound <= len(values))})
    pieces = [whole.slice(start, stop - start) for start, stop in pairwise(bounds)]
    blocks = cut(pieces, limit)
    assert blocks == cut([whole], limit)
    assert [value for block in blocks for value in block] == values
    for position, block in enumerate(blocks):
        size = sum(len(value) + 4 for value in block)
        assert block
        assert size <= limit or len(block) == 1
        if position + 1 < len(blocks):
            assert size + len(blocks[position + 1][0]) + 4 > limit


def test_sizes_of_fixed_and_varying_fields_add_up() -> None:
    tensor = pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((3, 2, 5), np.float32))
    columns = {
        "tensor": tensor,
        "text": pa.array(["", "ab", None]),
        "list": pa.array([[1], [], [1, 2]], pa.list_(pa.int16())),
        "pair": pa.array([{"a": 1, "b": "xyz"}] * 3, pa.struct([("a", pa.int8()), ("b", pa.string())])),
        "flag": pa.array([True] * 3),
    }
    batch = pa.record_batch(list(columns.values()), names=list(columns))
    common = 40 + 4 + 4 + (1 + 4 + 3) + 1
    assert sample_sizes(batch).tolist() == [common + 2, common + 2, common + 4]
    assert sample_sizes(batch.slice(1, 1)).tolist() == [common + 2]


COLUMNS = {
    "number": pa.array([1, 2, 3, 4, 5, 6], pa.int16()),
    "hole": pa.array([1.5, None, 3.5, 4.5, None, 6.5]),
    "flag": pa.array([True, False, True, True, None, False]),
    "text": pa.array(["", "ab", "c", "", "defgh", "i"]),
    "bytes": pa.array([b"x" * 70, b"y", None, b"z" * 3, b"", b"w"], pa.large_binary()),
    "list": pa.array([[1], [], [1, 2], None, [3, 4, 5], [6]], pa.list_(pa.int16())),
    "words": pa.array([["a"], ["bc", "d"], [], ["e"], ["f"], ["ghi"]]),
    "tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(36, dtype=np.float32).reshape(6, 2, 3)),
    "pair": pa.array([{"a": number, "b": "x" * number} for number in range(6)]),
    "nothing": pa.nulls(6),
}


@given(st.sets(st.integers(1, 5)), st.integers(1, 400))
def test_blocks_have_the_same_bytes_however_their_samples_come(bounds: set[int], limit: int) -> None:
    whole = pa.record_batch(list(COLUMNS.values()), names=list(COLUMNS))

    def build(pieces: list[pa.RecordBatch]) -> bytes:
        cutter, builder = BlockCutter(limit), ShardBuilder(whole.schema, compression="none")
        for piece in pieces:
            for block in cutter.push(piece):
                builder.append(block)
        for block in cutter.flush():
            builder.append(block)
        return b"".join(builder.finish()[1])

    rows = sorted({0, 6, *bounds})
    alone = [whole.take(pa.array(range(start, stop))) for start, stop in pairwise(rows)]
    assert build([whole]) == build([whole.slice(start, stop - start) for start, stop in pairwise(rows)]) == build(alone)
