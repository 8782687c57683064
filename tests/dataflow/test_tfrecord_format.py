"""TFRecord files, against the tfrecord library."""

import gzip
from pathlib import Path

import pyarrow as pa
import pytest
import tfrecord

from connectors.errors import BadInputError, CorruptError
from dataflow.convert import convert
from dataflow.dataset import open_dataset
from dataflow.formats import place
from dataflow.formats import tfrecord as ours
from dataflow.formats.example import encode_example

COUNT = 60


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr(ours, "BLOCK_BYTES", 500)
    monkeypatch.setattr(place, "CHUNK_BYTES", 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def write(path: Path, numbers: range = range(COUNT)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = tfrecord.TFRecordWriter(str(path))
    for number in numbers:
        writer.write(
            {
                "data": (bytes([number]) * number, "byte"),
                "label": (-number, "int"),
                "pair": ([number / 2, number / 4], "float"),
                "many": (list(range(1 + number % 3)), "int"),
            }
        )
    writer.close()
    return path


def check(sample: dict, number: int) -> None:
    assert sample["data"] == bytes([number]) * number
    assert sample["label"] == -number
    assert sample["pair"].tolist() == [number / 2, number / 4]
    assert sample["many"].tolist() == list(range(1 + number % 3))


def test_what_the_library_writes_comes_back(tmp_path: Path) -> None:
    write(tmp_path / "a.tfrecord", range(COUNT // 2))
    write(tmp_path / "b.tfrecord", range(COUNT // 2, COUNT))
    dataset = open_dataset(tmp_path)
    assert dataset.source.format == "tfrecord"
    assert dataset.index.num_blocks > 8
    for number in range(COUNT):
        check(dataset[number], number)
    for sample, number in zip(dataset.__getitems__([59, 0, 31]), [59, 0, 31], strict=True):
        check(sample, number)
    assert dataset.get_batch([3, 4])["pair"].shape == (2, 2)


def test_a_compressed_file_is_one_block(tmp_path: Path) -> None:
    content = write(tmp_path / "plain").read_bytes()
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.tfrecord.gz").write_bytes(gzip.compress(content))
    dataset = open_dataset(tmp_path / "set")
    assert (len(dataset), dataset.index.num_blocks) == (COUNT, 1)
    check(dataset[42], 42)


def test_files_may_have_a_number_behind_their_suffix(tmp_path: Path) -> None:
    write(tmp_path / "set" / "train.tfrecord-00000-of-00002", range(COUNT // 2))
    content = write(tmp_path / "plain", range(COUNT // 2, COUNT)).read_bytes()
    (tmp_path / "set" / "train.tfrecord.gz-00001-of-00002").write_bytes(gzip.compress(content))
    dataset = open_dataset(tmp_path / "set")
    assert len(dataset) == COUNT
    check(dataset[COUNT - 1], COUNT - 1)


def raw(record: bytes) -> bytes:
    head = len(record).to_bytes(8, "little")
    parts = [head, ours.masked_crc(head).to_bytes(4, "little"), record, ours.masked_crc(record).to_bytes(4, "little")]
    return b"".join(parts)


def test_records_that_are_no_examples_come_as_bytes(tmp_path: Path) -> None:
    records = [b"first", b"", b"third" * 300]
    (tmp_path / "a.tfrecord").write_bytes(b"".join(map(raw, records)))
    dataset = open_dataset(tmp_path)
    assert dataset.schema.field("record").type == pa.binary()
    assert dataset.get_batch(range(3))["record"] == records


@pytest.mark.parametrize("counts", [(0, 1, 3), (1, 0, 2), (3, 0, 1)])
def test_a_feature_of_none_and_one_and_more_values_is_a_list(tmp_path: Path, counts: tuple[int, ...]) -> None:
    records = [{"x": ("bytes", [b"a", b"b", b"c"][:count]), "y": ("int64", [7])} for count in counts]
    (tmp_path / "a.tfrecord").write_bytes(b"".join(raw(encode_example(record)) for record in records))
    assert open_dataset(tmp_path).get_batch(range(3))["x"] == [record["x"][1] for record in records]


def test_sequence_examples_come_whole(tmp_path: Path) -> None:
    context, feature_lists = encode_example({"id": ("int64", [7])}), b"\x12\x05\x0a\x03\x0a\x01x"
    (tmp_path / "a.tfrecord").write_bytes(raw(context + feature_lists))
    assert open_dataset(tmp_path)[0]["record"] == context + feature_lists
    (tmp_path / "a.tfrecord").write_bytes(raw(context) + raw(context + feature_lists))
    with pytest.raises(CorruptError, match=r"a\.tfrecord is no tf\.train\.Example: it has a field 2"):
        open_dataset(tmp_path)


def test_a_feature_that_a_record_lacks_is_null(tmp_path: Path) -> None:
    writer = tfrecord.TFRecordWriter(str(tmp_path / "a.tfrecord"))
    writer.write({"x": (1, "int"), "y": (b"a", "byte")})
    writer.write({"x": (2, "int")})
    writer.close()
    dataset = open_dataset(tmp_path)
    assert dataset.get_batch([0, 1])["y"] == [b"a", None]
    assert dataset.get_batch([0, 1])["x"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("offset", "message"), [(2, "the length of the record at offset 0"), (30, "the record at offset 0 .* checksum")]
)
def test_a_flipped_byte_names_file_and_offset(tmp_path: Path, offset: int, message: str) -> None:
    path = write(tmp_path / "a.tfrecord")
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptError, match=message):
        open_dataset(tmp_path)


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_truncated_file_names_the_record(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path / "a.tfrecord")
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(CorruptError, match=r"a\.tfrecord is cut off inside the record at offset \d+"):
        open_dataset(tmp_path)


def test_a_record_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "MAX_RECORD_BYTES", 10)
    (tmp_path / "a.tfrecord").write_bytes(raw(b"x" * 11))
    with pytest.raises(BadInputError, match=r"the record at offset 0 of .* has 11 bytes"):
        open_dataset(tmp_path)


def test_records_convert_to_native_shards(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.tfrecord")
    convert(tmp_path / "in", tmp_path / "out", shard_size_bytes=2000, block_size_bytes=500)
    for number, sample in zip(range(COUNT), open_dataset(tmp_path / "out"), strict=True):
        check(sample, number)
