"""Blocks that lie over each other, and bytes that belong to none."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflow.dataset.layout import layout_problems
from dataflow.index import Blocks, Index, Shards


def make_index(spans: list[tuple[int, int, int]], names: list[str]) -> Index:
    """Return an index of blocks of one sample: shard, offset, length."""
    columns = np.array(spans, np.int64).reshape(-1, 3).T
    shards = Shards(pa.array(names, pa.string()), np.full(len(names), 1000), pa.array(["v"] * len(names), pa.string()))
    blocks = Blocks(columns[0].astype(np.int32), columns[1], columns[2], np.arange(len(spans) + 1))
    return Index("file:///set", "f", shards, blocks)


@given(st.lists(st.lists(st.integers(1, 9), max_size=5), max_size=4), st.randoms())
def test_blocks_beside_each_other_are_fine_in_any_order(lengths: list[list[int]], random: object) -> None:
    spans = [
        (shard, sum(part[:place]), length) for shard, part in enumerate(lengths) for place, length in enumerate(part)
    ]
    random.shuffle(spans)  # type: ignore[attr-defined]
    index = make_index(spans, [f"s{shard}" for shard in range(len(lengths))])
    assert list(layout_problems(index, seamless=True)) == []


@pytest.mark.parametrize("seamless", [True, False])
def test_an_overlap_is_told_with_its_place(seamless: bool) -> None:
    index = make_index([(0, 0, 10), (0, 8, 10), (1, 8, 10)], ["a", "b"])
    assert list(layout_problems(index, seamless=seamless)) == [
        "blocks 0 and 1 of file:///set/a overlap at offset 8: samples would come twice"
    ]


def test_a_hole_is_told_where_the_format_leaves_none() -> None:
    index = make_index([(0, 5, 10), (0, 18, 10), (1, 0, 10)], ["a", "b"])
    assert list(layout_problems(index, seamless=True)) == [
        "3 bytes of file:///set/a at offset 15 belong to no block: samples may be missing"
    ]
    assert list(layout_problems(index, seamless=False)) == []


def test_a_shard_that_is_listed_twice_is_told() -> None:
    index = make_index([(0, 0, 10), (1, 0, 10)], ["a", "a"])
    assert list(layout_problems(index, seamless=True)) == [
        "the index of file:///set lists the shard a twice: its samples would come twice"
    ]
