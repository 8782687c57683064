"""The block table: locating samples, and the index as bytes."""

import pickle
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.errors import CorruptError
from dataflow.index import Blocks, Index, Pieces, Shards, decode_index, encode_index, finder, table
from dataflow.index.finder import BlockFinder


def make_index(num_samples: list[int], *, crc: bool = True, num_shards: int = 2) -> Index:
    count = len(num_samples)
    length = np.arange(1, count + 1, dtype=np.int64) * 10
    shards = Shards(
        pa.array([f"shard-{number}" for number in range(num_shards)]),
        np.full(num_shards, length.sum(), np.int64),
        pa.array([f"v{number}" for number in range(num_shards)]),
    )
    blocks = Blocks(
        shard=np.arange(count, dtype=np.int32) % num_shards,
        offset=np.cumsum(length) - length,
        length=length,
        first_sample=np.concatenate([[0], np.cumsum(num_samples)]).astype(np.int64),
        crc32c=np.arange(count, dtype=np.uint32) if crc else None,
    )
    return Index("file:///data/set", "f" * 32, shards, blocks)


def round_trip(index: Index) -> Index:
    data = encode_index(index.shards, index.blocks)
    return decode_index(data, url=index.url, fingerprint=index.fingerprint, uri="file:///data/set/index.arrow")


@given(st.lists(st.integers(0, 5), max_size=30), st.data())
def test_every_sample_is_found_where_it_was_counted(num_samples: list[int], data: st.DataObject) -> None:
    index = make_index(num_samples)
    expected = [(block, row) for block, count in enumerate(num_samples) for row in range(count)]
    samples = np.array(data.draw(st.permutations(range(len(expected)))), np.int64)
    block, row = index.locate(samples)
    assert list(zip(block.tolist(), row.tolist(), strict=True)) == [expected[sample] for sample in samples]


@given(
    st.lists(st.one_of(st.integers(0, 5), st.just(0), st.just(10_000)), max_size=60),
    st.integers(0, 2**32 - 1),
)
def test_blocks_of_any_size_are_found_as_by_a_search(sizes: list[int], seed: int) -> None:
    first_sample = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    near = np.concatenate([first_sample, first_sample - 1, first_sample + 1])
    samples = np.concatenate([near, np.random.default_rng(seed).integers(0, first_sample[-1] + 1, 50)])
    samples = samples[(samples >= 0) & (samples < first_sample[-1])]
    assert np.array_equal(BlockFinder(first_sample).find(samples), np.searchsorted(first_sample, samples, "right") - 1)


def test_thousands_of_tiny_blocks_before_a_huge_one_are_not_walked() -> None:
    first_sample = np.concatenate([np.arange(5001), [10**9]])
    samples = np.array([4999, 0, 10**9 - 1, 5000, 17])
    assert BlockFinder(first_sample).find(samples).tolist() == [4999, 0, 5000, 5000, 17]


@pytest.mark.parametrize("sample", [-1, 6])
def test_a_sample_outside_names_itself_and_the_length(sample: int) -> None:
    with pytest.raises(IndexError, match=rf"sample {sample} is out of range for a dataset of 6 samples"):
        make_index([2, 4]).locate(np.array([0, sample]))


@pytest.mark.parametrize("crc", [True, False])
def test_an_index_survives_its_bytes(crc: bool) -> None:
    index = make_index([3, 0, 5], crc=crc)
    read = round_trip(index)
    assert read.num_samples == 8
    assert read.num_blocks == 3
    assert [read.block_ref(block) for block in range(3)] == [index.block_ref(block) for block in range(3)]
    assert read.shards.size_bytes.tolist() == index.shards.size_bytes.tolist()


def test_a_block_is_named_by_uri_version_range_and_checksum() -> None:
    ref = make_index([3, 5]).block_ref(1)
    assert (ref.uri, ref.version, ref.offset, ref.length, ref.crc32c) == ("file:///data/set/shard-1", "v1", 10, 20, 1)


def test_vectors_are_views_of_the_bytes_they_came_from() -> None:
    index = make_index([1] * 1000)
    data = np.frombuffer(encode_index(index.shards, index.blocks), np.uint8)
    blocks = decode_index(data, url="", fingerprint="", uri="").blocks
    for vector in (blocks.shard, blocks.offset, blocks.length, blocks.first_sample, blocks.crc32c):
        assert np.shares_memory(vector, data)


def test_equal_tables_give_equal_bytes() -> None:
    one, two = (make_index([3, 5]) for _ in range(2))
    assert encode_index(one.shards, one.blocks) == encode_index(two.shards, two.blocks)


def test_an_index_survives_pickling() -> None:
    index = make_index([3, 5])
    assert pickle.loads(pickle.dumps(index)).block_ref(1) == index.block_ref(1)


@pytest.mark.parametrize("data", [b"", b"ARROW1", b"x" * 100])
def test_bytes_that_are_no_index_are_refused(data: bytes) -> None:
    with pytest.raises(CorruptError, match=r"file:///i is not an index"):
        decode_index(data, url="", fingerprint="", uri="file:///i")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("shard", np.array([0, 2], np.int32), "names a shard that it does not list"),
        ("offset", np.array([0, 1000]), r"block 1 at \[1000, \+20\) of file:///data/set/shard-1"),
        ("length", np.array([0, 20]), "block 0"),
        ("first_sample", np.array([0, 5, 3]), "counts samples backwards"),
        ("first_sample", np.array([1, 5, 6]), "counts samples backwards"),
        ("first_sample", np.array([0, 5]), "counts samples backwards"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(field: str, value: np.ndarray, message: str) -> None:
    index = make_index([3, 5])
    columns = {name: getattr(index.blocks, name) for name in Blocks.__slots__} | {field: value}
    with pytest.raises(CorruptError, match=message):
        round_trip(Index(index.url, index.fingerprint, index.shards, Blocks(**columns)))


def in_pieces(counts: list[int], *, length: int = 1) -> Index:
    index = make_index([1] * len(counts))
    number = sum(counts)
    pieces = Pieces(
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        np.zeros(number, np.int32),
        np.arange(number, dtype=np.int64),
        np.full(number, length, np.int64),
    )
    return Index(index.url, index.fingerprint, index.shards, index.blocks, pieces)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.data())
def test_a_block_is_read_by_its_pieces_in_order(counts: list[int], data: st.DataObject) -> None:
    index = in_pieces(counts)
    assert len(index.ranges) == sum(counts)
    wanted = data.draw(st.lists(st.integers(0, len(counts) - 1), max_size=30))
    offsets = [[ref.offset for ref in index.block_refs(block)] for block in wanted]
    assert [len(part) for part in offsets] == [counts[block] for block in wanted]
    assert index.pieces is not None
    assert index.pieces.rows_of(np.array(wanted, np.int64)).tolist() == [row for part in offsets for row in part]
    assert all(ref.crc32c is None for block in wanted for ref in index.block_refs(block))


def test_a_piece_outside_its_shard_is_refused() -> None:
    in_pieces([2, 1, 1]).check()
    with pytest.raises(CorruptError, match=r"puts piece 0 at \[0, \+1000\) of .*shard-0"):
        in_pieces([2, 1, 1], length=1000).check()


def test_a_block_without_pieces_is_read_from_its_own_range() -> None:
    index = make_index([1, 2])
    assert index.block_refs(1) == [index.block_ref(1)] == [index.range_ref(1)]


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=60), at_once=st.integers(1, 7))
def test_the_finder_does_not_depend_on_how_many_blocks_it_looks_at_at_once(sizes: list[int], at_once: int) -> None:
    first_sample = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finder, "_BLOCKS_AT_ONCE", at_once)
        found = finder.BlockFinder(first_sample)
    samples = np.arange(first_sample[-1])
    assert found.find(samples).tolist() == (np.searchsorted(first_sample, samples, side="right") - 1).tolist()


@pytest.mark.parametrize("wrong", [0, 5, 9])
def test_a_check_that_looks_at_a_few_rows_at_once_finds_every_error(
    wrong: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "_ROWS_AT_ONCE", 3)
    shards = Shards(pa.array(["a"]), np.array([100]), pa.array(["1"]))

    def check(**changes: npt.NDArray[Any]) -> None:
        vectors = {
            "shard": np.zeros(10, np.int32),
            "offset": np.arange(10) * 10,
            "length": np.full(10, 10),
            "first_sample": np.arange(11),
        }
        Index("file:///set", "", shards, Blocks(**vectors | changes)).check()

    check()
    with pytest.raises(CorruptError, match=f"puts block {wrong} at"):
        check(length=np.where(np.arange(10) == wrong, 1000, 10))
    with pytest.raises(CorruptError, match="names a shard"):
        check(shard=np.where(np.arange(10) == wrong, 1, 0).astype(np.int32))
    with pytest.raises(CorruptError, match="counts samples backwards"):
        check(first_sample=np.where(np.arange(11) == wrong + 1, -1, np.arange(11)))
