"""Parquet, against pyarrow."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pq_encryption
import pytest
from PIL import Image

from cache.access import open_reader
from connectors.errors import BadInputError, ChangedError, CorruptError, DataError
from dataflow.convert import convert
from dataflow.dataset import Dataset, open_dataset
from dataflow.formats import class_names, field_kind, open_source, parquet
from dataflow.testing import CountingReader

COUNT = 100


def table(first: int = 0) -> pa.Table:
    numbers = range(first, first + COUNT)
    return pa.table(
        {
            "number": pa.array(numbers, pa.int32()),
            "text": [f"é{number}" if number % 3 else None for number in numbers],
            "coded": pa.array([f"c{number % 4}" for number in numbers]).dictionary_encode(),
            "list": pa.array([[number] * (number % 4) for number in numbers], pa.list_(pa.float32())),
            "pair": [{"a": number, "b": str(number)} for number in numbers],
            "data": pa.array([b"x" * (number % 50) for number in numbers], pa.binary()),
        }
    )


def put(path: Path, first: int = 0, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(first), path, **({"row_group_size": 13} | options))
    return path


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_what_pyarrow_writes_comes_back(tmp_path: Path, compression: str, version: str) -> None:
    for part in range(2):
        put(tmp_path / f"{part}.parquet", part * COUNT, compression=compression, data_page_version=version)
    dataset = open_dataset(tmp_path)
    assert dataset.source.format == "parquet"
    assert dataset.index.num_blocks == 16
    assert dataset.schema.field("coded").type == pa.string()
    expected = table(0).to_pylist() + table(COUNT).to_pylist()
    for number in (0, 12, 13, 99, 100, 199):
        actual = dataset[number]
        actual["list"] = actual["list"].tolist()
        assert actual == expected[number]
    assert dataset.get_batch(range(2 * COUNT))["number"].tolist() == list(range(2 * COUNT))
    assert dataset.get_batch([150, 3, 77])["text"] == [None, None, "é77"]


@pytest.mark.parametrize("to", ["arrow", "jsonl", "parquet"])
def test_views_as_polars_writes_them_are_plain(tmp_path: Path, to: str) -> None:
    texts = ["short", None, "long enough to lie elsewhere"]
    columns = {
        "text": pa.array(texts, pa.string_view()),
        "many": pa.array([["a"], [], None], pa.list_(pa.string_view())),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    dataset = open_dataset(tmp_path / "a.parquet")
    assert dataset.schema.types == [pa.string(), pa.list_(pa.string())]
    assert dataset.get_batch([2, 1, 0])["text"] == texts[::-1]
    convert(tmp_path / "a.parquet", tmp_path / "out", to=to, verify=True)
    assert open_dataset(tmp_path / "out").get_batch(range(3))["text"] == texts


def test_more_text_than_one_array_holds_has_64_bit_offsets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_ARRAY_BYTES", 500)
    parts = [pa.table({"s": ["x" * size] * 2, "b": [b"y"] * 2, "n": range(2)}) for size in (5, 300)]
    for number, part in enumerate(parts):
        pq.write_table(part, tmp_path / f"{number}.parquet", use_dictionary=False)
    dataset = open_dataset(tmp_path)
    assert dataset.schema.types == [pa.large_string(), pa.binary(), pa.int64()]
    assert [sample["s"] for sample in dataset] == ["x" * 5] * 2 + ["x" * 300] * 2


def test_a_footer_larger_than_the_first_guess_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "TAIL_BYTES", 20)
    monkeypatch.setattr(parquet, "TAILS_AT_ONCE", 2)
    for part in range(3):
        put(tmp_path / f"{part}.parquet", part * COUNT)
    assert open_dataset(tmp_path)[250]["number"] == 250


def test_an_empty_row_group_and_an_empty_file_hold_nothing(tmp_path: Path) -> None:
    with pq.ParquetWriter(tmp_path / "a.parquet", table().schema) as writer:
        writer.write_table(table().slice(0, 0))
        writer.write_table(table())
    pq.write_table(table().slice(0, 0), tmp_path / "b.parquet")
    dataset = open_dataset(tmp_path)
    assert dataset.get_batch(range(COUNT))["number"].tolist() == list(range(COUNT))


def test_a_file_with_two_columns_of_one_name_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"]), tmp_path / "x.parquet")
    with pytest.raises(BadInputError, match=r"x\.parquet cannot be a dataset: .*distinct names, got \['a', 'a'\]"):
        open_dataset(tmp_path)


def test_files_of_different_schemas_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "a.parquet")
    pq.write_table(table().drop_columns(["text"]), tmp_path / "b.parquet")
    with pytest.raises(BadInputError, match=r"b\.parquet has another schema"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("size", [3, 10, 1000, -1])
def test_a_truncated_file_is_named(tmp_path: Path, size: int) -> None:
    path = put(tmp_path / "a.parquet")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CorruptError, match=r"a\.parquet does not end as a Parquet file"):
        open_dataset(tmp_path)


def test_a_damaged_footer_is_named(tmp_path: Path) -> None:
    path = put(tmp_path / "a.parquet")
    content = bytearray(path.read_bytes())
    content[-8:-4] = (len(content) * 2).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(CorruptError, match=r"a\.parquet"):
        open_dataset(tmp_path)
    content[-8:-4] = (50).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(CorruptError, match=r"a\.parquet is damaged"):
        open_dataset(tmp_path)


def test_a_row_group_that_lost_rows_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": range(77)}), tmp_path / "a.parquet")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    last = content.rindex(b"\x16\x9a\x01")  # the number of rows, as thrift writes 77
    content[last + 1] ^= 2
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(CorruptError, match=r"a\.parquet is damaged: it counts 77 rows, its groups 76"):
        open_dataset(tmp_path)


def test_a_name_in_a_footer_that_is_no_text_is_damage(tmp_path: Path) -> None:
    path = put(tmp_path / "0.parquet", store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"number", b"n\xffmber"))
    with pytest.raises(CorruptError, match=r"the footer of .*0\.parquet is damaged: .*utf-8"):
        open_dataset(tmp_path)


class _Keys(pq_encryption.KmsClient):
    """Wraps keys in nothing."""

    def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> str:
        return base64.b64encode(key_bytes).decode()


@pytest.mark.parametrize("plaintext_footer", [True, False])
def test_an_encrypted_file_is_refused_in_words(tmp_path: Path, plaintext_footer: bool) -> None:
    factory = pq_encryption.CryptoFactory(lambda _: _Keys())
    properties = factory.file_encryption_properties(
        pq_encryption.KmsConnectionConfig(),
        pq_encryption.EncryptionConfiguration(
            footer_key="f", column_keys={"c": ["number"]}, plaintext_footer=plaintext_footer
        ),
    )
    put(tmp_path / "0.parquet", encryption_properties=properties)
    with pytest.raises(BadInputError, match=r"0\.parquet is encrypted, and there are no keys here"):
        open_dataset(tmp_path, columns=["text"])


def test_a_damaged_page_is_named(tmp_path: Path) -> None:
    path = put(tmp_path / "a.parquet", compression="zstd", write_page_checksum=True)
    dataset = open_dataset(tmp_path)
    ref = dataset.index.block_ref(3)
    content = bytearray(path.read_bytes())
    content[ref.offset : ref.offset + 40] = b"\xff" * 40
    path.write_bytes(content)
    with pytest.raises(ChangedError, match=r"a\.parquet"):
        dataset[3 * 13]
    with pytest.raises(DataError, match=rf"offset {ref.offset} of .*a\.parquet\) is not a readable row group"):
        open_dataset(tmp_path)[3 * 13]


def test_a_flipped_byte_is_noticed_where_pages_have_checksums(tmp_path: Path) -> None:
    path = put(tmp_path / "a.parquet", compression="none", write_page_checksum=True)
    ref = open_dataset(tmp_path).index.block_ref(3)
    content = bytearray(path.read_bytes())
    content[ref.offset + ref.length - 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptError, match=rf"offset {ref.offset} of .*a\.parquet\) is not a readable row group"):
        open_dataset(tmp_path)[3 * 13]


def test_parquet_converts_to_native_shards(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.parquet")
    convert(tmp_path / "in", tmp_path / "out", shard_size_bytes=3000, block_size_bytes=600)
    source, written = open_dataset(tmp_path / "in"), open_dataset(tmp_path / "out")
    assert len(written.index.shards) > 1
    for expected, actual in zip(source, written, strict=True):
        np.testing.assert_array_equal(actual.pop("list"), expected.pop("list"))
        assert actual == expected


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """Two files whose field `media` has nearly all bytes, between two small ones."""
    rng = np.random.default_rng(0)
    for part in range(2):
        content = pa.table(
            {
                "number": pa.array(range(part * 40, part * 40 + 40)),
                "media": [rng.bytes(5000) for _ in range(40)],
                "pair": [{"a": number, "b": str(number)} for number in range(40)],
                "pair.of": [number / 2 for number in range(40)],
            }
        )
        pq.write_table(content, tmp_path / f"{part}.parquet", row_group_size=10, write_page_checksum=True)
    return tmp_path


@pytest.mark.parametrize("columns", [["number"], ["pair"], ["pair.of"], ["pair.of", "number"], ["media"]])
def test_only_the_columns_of_the_fields_are_fetched(wide: Path, columns: list[str]) -> None:
    reader = CountingReader(open_reader(wide))
    source = open_source(f"file://{wide}", reader)
    whole = Dataset(source, reader, buffer_bytes=0)
    narrow = Dataset(source, reader, columns=columns, buffer_bytes=0)
    assert narrow.fingerprint == whole.fingerprint
    reader.requests.clear()
    numbers = [79, 3, 4, 41]
    found = narrow.get_batch(numbers)
    assert len(reader.requests) == 1
    fetched = sum(ref.length for ref in reader.requests[0])
    if columns == ["media"]:
        assert 3 * 50_000 <= fetched < 3 * 52_000
    else:
        assert fetched < 3 * 2000
    expected = whole.get_batch(numbers)
    assert list(found) == columns
    for name in columns:
        assert list(found[name]) == list(expected[name])


def test_neighbouring_columns_are_one_piece(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(wide, columns=["pair", "pair.of"])
    assert len(dataset.index.ranges) == dataset.index.num_blocks
    assert len(open_dataset(wide, columns=["number", "pair"]).index.ranges) == 2 * dataset.index.num_blocks
    monkeypatch.setattr(parquet, "GAP_BYTES", 1 << 20)
    assert len(open_dataset(wide, columns=["number", "pair"]).index.ranges) == dataset.index.num_blocks


def test_conversion_of_some_fields_leaves_the_others_alone(
    wide: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[CountingReader] = []

    def counting(*args: object, **options: object) -> CountingReader:
        readers.append(CountingReader(open_reader(*args, **options)))  # type: ignore[arg-type]
        return readers[-1]

    monkeypatch.setattr("dataflow.dataset.opening.open_reader", counting)
    out = tmp_path_factory.mktemp("out") / "set"
    convert(wide, out, fields=["number"], workers=0)
    assert sum(ref.length for refs in readers[0].requests[1:] for ref in refs) < 8 * 1000
    assert open_dataset(out).get_batch(range(80))["number"].tolist() == list(range(80))


def test_a_damaged_column_is_an_error_where_it_is_read(wide: Path) -> None:
    dataset = open_dataset(wide, columns=["media"])
    ref = dataset.index.range_ref(0)
    file = wide / "0.parquet"
    data = bytearray(file.read_bytes())
    data[ref.offset + ref.length // 2] ^= 255
    file.write_bytes(data)
    with pytest.raises(CorruptError, match=r"0\.parquet"):
        open_dataset(wide, columns=["media"]).get_batch([0])
    assert open_dataset(wide, columns=["number"]).get_batch([0])["number"].tolist() == [0]


FEATURES = {
    "image": {"_type": "Image"},
    "clip": {"_type": "Audio", "sampling_rate": 8000},
    "label": {"_type": "ClassLabel", "names": ["cat", "dog"]},
    "number": {"_type": "Value", "dtype": "int32"},
}


def put_features(path: Path, *, names: list[str] | None = None, outside: bool = False) -> list[bytes]:
    """Write a file as the Hub of HuggingFace has them; the third image is missing."""
    images = [png(size) for size in range(1, 11)]
    content = [
        None if place == 2 else {"bytes": None if outside else one, "path": "a.png"} for place, one in enumerate(images)
    ]
    features = FEATURES | {"label": {"_type": "ClassLabel", "names": names or ["cat", "dog"]}}
    media = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {
        "image": pa.array(content, media),
        "clip": pa.array([{"bytes": b"RIFF", "path": None}] * 10, media),
        "label": pa.array([0, 1] * 5, pa.int64()),
        "number": pa.array(range(10), pa.int32()),
    }
    said = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(said), path, row_group_size=4)
    return images


def png(size: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (size, 3), (size, 2, 3)).save(stream, "PNG")
    return stream.getvalue()


def test_features_of_the_huggingface_library_are_fields(tmp_path: Path) -> None:
    images = put_features(tmp_path / "in" / "train-00000-of-00001.parquet")
    dataset = open_dataset(tmp_path / "in")
    assert [field_kind(entry) for entry in dataset.schema] == ["image", "audio", None, None]
    assert class_names(dataset.schema.field("label")) == ["cat", "dog"]
    assert dataset[4]["image"].shape == (3, 5, 3)
    assert dataset[2]["image"] is None
    assert dataset[0]["clip"] == b"RIFF"
    narrow = open_dataset(tmp_path / "in", columns=["image"], encoded=["image"])
    assert [narrow[place]["image"] for place in range(10)] == [*images[:2], None, *images[3:]]
    convert(tmp_path / "in", tmp_path / "out", to="parquet", verify=True)
    assert open_dataset(tmp_path / "out")[9]["image"].shape == (3, 10, 3)


def test_media_outside_of_the_file_are_refused(tmp_path: Path) -> None:
    put_features(tmp_path / "a.parquet", outside=True)
    with pytest.raises(BadInputError, match=r"'image' of .*a\.parquet has media that lie in files elsewhere"):
        open_dataset(tmp_path)[0]


def test_files_that_number_their_classes_otherwise_are_refused(tmp_path: Path) -> None:
    put_features(tmp_path / "a.parquet")
    put_features(tmp_path / "b.parquet", names=["dog", "cat"])
    with pytest.raises(BadInputError, match=r"b\.parquet has another schema"):
        open_dataset(tmp_path)
