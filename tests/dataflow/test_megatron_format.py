"""Megatron token files, written as megatron.core.datasets.indexed_dataset does."""

import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from connectors.errors import BadInputError, CorruptError
from dataflow.convert import convert
from dataflow.dataset import open_dataset
from dataflow.formats import megatron, tensor_field
from dataflow.formats.arrow import ShardWriter
from dataflow.formats.scan import cut_blocks

TYPES = {np.uint8: 1, np.int8: 2, np.int16: 3, np.int32: 4, np.int64: 5, np.float64: 6, np.float32: 7, np.uint16: 8}


def write(path: Path, sequences: list[list[int]], dtype: type = np.uint16) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = [np.array(sequence, dtype) for sequence in sequences]
    path.with_suffix(".bin").write_bytes(b"".join(array.tobytes() for array in arrays))
    lengths = np.array([len(array) for array in arrays], np.int32)
    pointers = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64) * np.dtype(dtype).itemsize]).astype(
        np.int64
    )
    documents = np.arange(len(arrays) + 1, dtype=np.int64)
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, TYPES[dtype], len(arrays), len(documents))
    path.with_suffix(".idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + documents.tobytes())
    return path


@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_of_token_comes_back(tmp_path: Path, dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron, "BLOCK_BYTES", 64)
    sequences = [[(number + position) % 100 for position in range(number % 17)] for number in range(50)]
    write(tmp_path / "a", sequences[:20], dtype)
    write(tmp_path / "b", sequences[20:], dtype)
    dataset = open_dataset(tmp_path)
    assert dataset.source.format == "megatron"
    assert dataset.index.num_blocks > 4
    tokens = dataset.get_batch(range(50))["tokens"]
    assert [array.tolist() for array in tokens] == sequences
    assert {array.dtype for array in tokens} == {np.dtype(dtype)}
    assert dataset[33]["tokens"].tolist() == sequences[33]


def test_tokens_convert_to_native_shards(tmp_path: Path) -> None:
    sequences = [list(range(number)) for number in range(1, 60)]
    write(tmp_path / "in" / "a", sequences)
    convert(tmp_path / "in", tmp_path / "out", shard_size_bytes=500, block_size_bytes=100)
    assert [sample["tokens"].tolist() for sample in open_dataset(tmp_path / "out")] == sequences


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 30), max_size=40), st.integers(1, 50))
def test_blocks_of_records_cover_them_in_order(lengths: list[int], size_bytes: int) -> None:
    ends = np.cumsum(np.array(lengths, np.int64))
    blocks = list(cut_blocks(ends, size_bytes))
    total = sum(lengths)
    assert sum(count for _, _, count in blocks) == (len(lengths) if total else 0)
    position = first = 0
    for offset, length, count in blocks:
        assert offset == position
        assert length == sum(lengths[first : first + count])
        assert length >= 1
        position, first = offset + length, first + count
    assert position == total
    assert all(length >= size_bytes for _, length, _ in blocks[:-1])


def change(path: Path, offset: int, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(value)] = value
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("offset", "value", "error", "message"),
    [
        (0, b"X", CorruptError, "is not a Megatron index"),
        (9, b"\x02", BadInputError, "has version 2"),
        (17, b"\x63", BadInputError, "type 99"),
        (18, b"\xff\xff", CorruptError, "too few for its 65535 sequences"),
        (34, b"\x09", BadInputError, "do not follow each other"),
        (18, b"\x00", CorruptError, "counts 0"),
    ],
)
def test_a_damaged_index_is_named(tmp_path: Path, offset: int, value: bytes, error: type, message: str) -> None:
    write(tmp_path / "a", [[1, 2], [3, 4]])
    change(tmp_path / "a.idx", offset, value)
    with pytest.raises(error, match=rf"a\.idx.*{message}"):
        open_dataset(tmp_path)


def test_tokens_that_do_not_fit_their_index_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2], [3, 4]])
    (tmp_path / "a.bin").write_bytes(b"1234567")
    with pytest.raises(CorruptError, match=r"a\.bin has 7 bytes, its index .*a\.idx counts 8"):
        open_dataset(tmp_path)


def test_missing_tokens_are_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, [[1, 2, 3]])
    (tmp_path / "b.bin").unlink()
    with pytest.raises(CorruptError, match=r"b\.bin is missing"):
        open_dataset(tmp_path)


def test_files_of_different_types_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1]], np.uint16)
    write(tmp_path / "b", [[1]], np.int32)
    with pytest.raises(BadInputError, match="different types"):
        open_dataset(tmp_path)


# Writing


@pytest.mark.parametrize("dtype", TYPES)
def test_written_files_are_those_that_megatron_writes(tmp_path: Path, dtype: type) -> None:
    sequences = [[(number + position) % 100 for position in range(number % 17)] for number in range(50)]
    write(tmp_path / "in" / "a", sequences[:20], dtype)
    write(tmp_path / "in" / "b", sequences[20:], dtype)
    convert(tmp_path / "in", tmp_path / "out", to="megatron")
    write(tmp_path / "expected", sequences, dtype)
    for suffix in (".bin", ".idx"):
        written = (tmp_path / "out" / f"shard-00000{suffix}").read_bytes()
        assert written == (tmp_path / "expected").with_suffix(suffix).read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["shard-00000.bin", "shard-00000.idx"]


def test_sequences_of_one_length_come_from_tensors(tmp_path: Path) -> None:
    schema = pa.schema([tensor_field("tokens", np.uint16, (8,)), pa.field("other", pa.string())])
    with ShardWriter(tmp_path / "in", schema) as writer:
        for number in range(30):
            writer.write({"tokens": np.arange(number, number + 8, dtype=np.uint16), "other": "x"})
    with pytest.raises(BadInputError, match="choose it with fields"):
        convert(tmp_path / "in", tmp_path / "out", to="megatron")
    convert(tmp_path / "in", tmp_path / "out", to="megatron", fields=["tokens"], shard_size_bytes=150)
    assert len(list((tmp_path / "out").glob("*.idx"))) > 1
    assert [row["tokens"].tolist() for row in open_dataset(tmp_path / "out")] == [
        list(range(number, number + 8)) for number in range(30)
    ]
