"""Native shards: what is written, what any Arrow reader sees, and what damage looks like."""

import json
import shutil
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from crc32c import crc32c

from cache.access import open_reader
from connectors.errors import BadInputError, ChangedError, CorruptError, DataError, NotFoundError
from dataflow.dataset import open_dataset
from dataflow.formats import class_names, image_field, label_field, tensor_field
from dataflow.formats.arrow import ShardWriter
from dataflow.formats.arrow.reading import ArrowFormat
from dataflow.formats.destination import Destination
from dataflow.formats.place import Place

SCHEMA = pa.schema([tensor_field("x", np.float32, (64,)), pa.field("text", pa.string()), pa.field("n", pa.int64())])
COUNT = 300


def write(path: Path, count: int = COUNT, **settings: object) -> Path:
    settings = {"block_size_bytes": 4096, "shard_size_bytes": 20_000} | settings
    with ShardWriter(path, SCHEMA, **settings) as writer:
        for number in range(count):
            writer.write({"x": np.full(64, number, np.float32), "text": str(number), "n": number})
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "set")


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_any_arrow_reader_opens_a_shard_and_sees_the_blocks(tmp_path: Path, compression: str) -> None:
    path = write(tmp_path / "set", compression=compression)
    index = open_dataset(path).index
    numbers, num_blocks = [], 0
    for shard in sorted(path.glob("shard-*.arrow")):
        with pa.ipc.open_file(shard) as file:
            assert file.schema.equals(SCHEMA)
            for position in range(file.num_record_batches):
                batch = file.get_batch(position)
                first, last = index.blocks.first_sample[num_blocks : num_blocks + 2]
                assert batch.num_rows == last - first
                numbers += batch.column("n").to_pylist()
                num_blocks += 1
    assert numbers == list(range(COUNT))
    assert num_blocks == index.num_blocks


def test_the_bytes_of_a_block_decode_alone_and_without_a_copy(path: Path) -> None:
    reader = open_reader(path.as_uri())
    source = ArrowFormat().open(Place(path.as_uri(), reader))
    assert source is not None
    for block in range(source.index.num_blocks):
        ref = source.index.block_ref(block)
        content = Path(ref.uri.removeprefix("file://")).read_bytes()[ref.offset : ref.offset + ref.length]
        assert crc32c(content) == ref.crc32c
        view = reader.read_blocks([ref])[0].view
        batch = pa.ipc.read_record_batch(pa.py_buffer(view), SCHEMA)
        assert batch.equals(source.decode(block, view))
        assert np.shares_memory(batch.column("n").to_numpy(), np.frombuffer(view, np.uint8))


def test_blocks_and_shards_keep_to_their_sizes(path: Path) -> None:
    index = open_dataset(path).index
    assert len(index.shards) > 3
    assert index.blocks.length.max() < 4096 + 1024
    assert index.shards.size_bytes.max() < 20_000 + 8192
    assert index.shards.size_bytes.tolist() == [shard.stat().st_size for shard in sorted(path.glob("shard-*"))]


def test_the_fingerprint_is_of_content_and_schema_and_not_of_place_or_lineage(tmp_path: Path) -> None:
    one = open_dataset(write(tmp_path / "one")).fingerprint
    assert open_dataset(write(tmp_path / "two", lineage={"from": "elsewhere"})).fingerprint == one
    assert open_dataset(write(tmp_path / "three", COUNT - 1)).fingerprint != one
    assert open_dataset(write(tmp_path / "four", block_size_bytes=8192)).fingerprint != one


def test_rows_and_record_batches_are_cut_alike(tmp_path: Path) -> None:
    one = open_dataset(write(tmp_path / "one"))
    with ShardWriter(tmp_path / "two", SCHEMA, block_size_bytes=4096, shard_size_bytes=20_000) as writer:
        x = pa.FixedShapeTensorArray.from_numpy_ndarray(np.repeat(np.arange(COUNT, dtype=np.float32)[:, None], 64, 1))
        columns = [x, pa.array([str(number) for number in range(COUNT)]), pa.array(range(COUNT), pa.int64())]
        batch = pa.record_batch(columns, schema=SCHEMA)
        for start in range(0, COUNT, 70):
            writer.write_batch(batch.slice(start, 70))
    two = open_dataset(tmp_path / "two")
    assert two.index.blocks.first_sample.tolist() == one.index.blocks.first_sample.tolist()
    assert two.get_batch(range(COUNT))["text"] == one.get_batch(range(COUNT))["text"]


def test_columns_and_rows_give_the_same_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "rows")
    numbers = np.arange(COUNT)
    with ShardWriter(tmp_path / "columns", SCHEMA, block_size_bytes=4096, shard_size_bytes=20_000) as writer:
        for start, stop in [(0, 7), (7, 7), (7, COUNT)]:
            part = numbers[start:stop]
            x = np.repeat(part.astype(np.float32), 64).reshape(-1, 64)
            writer.write_columns({"n": part, "text": [str(number) for number in part.tolist()], "x": x})
    assert {file.name: file.read_bytes() for file in path.iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "columns").iterdir()
    }


def test_columns_of_another_type_are_cast_as_values_are(tmp_path: Path) -> None:
    columns = {"n": np.arange(3, dtype=np.int16), "x": np.zeros((3, 64)), "text": ["", "a", None]}
    with ShardWriter(tmp_path / "set", SCHEMA) as writer:
        writer.write_columns(columns)
    assert [sample["n"] for sample in open_dataset(tmp_path / "set")] == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": np.zeros(2, np.int64)}, "equally long"),
        ({"m": [1, 2, 3]}, "must be exactly the fields"),
        ({"n": np.array(["1", "2", "3"])}, "field 'n' cannot hold"),
        ({"x": np.zeros((3, 2, 32), np.float32)}, "expected float32 of shape"),
    ],
    ids=["short", "unknown", "text", "shape"],
)
def test_wrong_columns_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    columns = {"n": np.arange(3), "x": np.zeros((3, 64), np.float32), "text": ["a", "b", "c"]} | change
    with pytest.raises(BadInputError, match=message), ShardWriter(tmp_path / "set", SCHEMA) as writer:
        writer.write_columns(columns)


def test_a_put_that_fails_is_told_and_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Destination, name: str, chunks: object) -> None:
        if name == "shard-00001.arrow":
            raise DataError("no space")
        original(self, name, chunks)

    original = Destination.put
    monkeypatch.setattr(Destination, "put", fail)
    with pytest.raises(DataError, match="no space"):
        write(tmp_path / "set")
    assert not list((tmp_path / "set").glob("*"))


def test_a_sample_larger_than_a_block_is_a_block(tmp_path: Path) -> None:
    values = [b"a", b"b" * 10_000, b"", b"c"]
    with ShardWriter(tmp_path / "set", pa.schema([("data", pa.binary())]), block_size_bytes=100) as writer:
        for value in values:
            writer.write({"data": value})
    dataset = open_dataset(tmp_path / "set")
    assert dataset.index.blocks.first_sample.tolist() == [0, 1, 2, 4]
    assert dataset.get_batch(range(4))["data"] == values


def test_a_dataset_without_samples_is_one(tmp_path: Path) -> None:
    dataset = open_dataset(write(tmp_path / "set", 0))
    assert len(dataset) == 0
    assert dataset.get_batch([])["x"].shape == (0, 64)
    with pytest.raises(IndexError, match="0 samples"):
        dataset[0]


def test_labels_carry_their_class_names(tmp_path: Path) -> None:
    schema = pa.schema([image_field("image"), label_field("label", ["cat", "dog"])])
    with ShardWriter(tmp_path / "set", schema) as writer:
        writer.write({"image": np.zeros((2, 2, 3), np.uint8), "label": 1})
    read = open_dataset(tmp_path / "set")
    assert class_names(read.schema.field("label")) == ["cat", "dog"]
    assert read[0]["image"].shape == (2, 2, 3)


def test_dictionaries_are_stored_plain(tmp_path: Path) -> None:
    coded = pa.array(["a", "b", "a"]).dictionary_encode()
    batch = pa.record_batch([coded], names=["x"])
    with ShardWriter(tmp_path / "set", batch.schema) as writer:
        writer.write_batch(batch)
    dataset = open_dataset(tmp_path / "set")
    assert dataset.schema.field("x").type == pa.string()
    assert dataset.get_batch([2, 1])["x"] == ["a", "b"]


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (pa.int64(), 1.5, "1.5 has a fraction"),
        (pa.uint8(), np.float32(0.5), "has a fraction"),
        (pa.int64(), Decimal("1.5"), "has a fraction"),
        (pa.list_(pa.int8()), [1, 1.5], "1.5 has a fraction"),
        (pa.list_(pa.int8()), np.array([1, 1.5]), "has a fraction"),
        (pa.list_(pa.list_(pa.int8()), 1), [[1.5]], "1.5 has a fraction"),
        (pa.struct([("a", pa.int8())]), {"a": 1.5}, "1.5 has a fraction"),
        (pa.struct([("a", pa.int8())]), {"a": 1, "b": 2}, r"\['b'\] are unknown"),
        (pa.list_(pa.struct([("a", pa.string())])), [{"b": 2}], r"\['b'\] are unknown"),
        (pa.fixed_shape_tensor(pa.int8(), (2,)), np.array([1, 300]), "int64 is too large for int8"),
    ],
)
def test_nothing_of_a_value_is_cut_off(tmp_path: Path, kind: pa.DataType, value: object, message: str) -> None:
    with (
        pytest.raises(BadInputError, match=rf"field 'x' cannot hold a value as .*: .*{message}"),
        ShardWriter(tmp_path / "set", pa.schema([("x", kind)])) as writer,
    ):
        writer.write({"x": value})


def test_whole_numbers_of_other_types_are_stored(tmp_path: Path) -> None:
    schema = pa.schema([("x", pa.int16()), ("many", pa.list_(pa.int8())), ("pair", pa.struct([("a", pa.int8())]))])
    with ShardWriter(tmp_path / "set", schema) as writer:
        writer.write({"x": 2.0, "many": np.array([1.0, 2.0]), "pair": {}})
        writer.write({"x": np.uint8(3), "many": [np.int8(100), np.int8(100)], "pair": {"a": 5}})
    dataset = open_dataset(tmp_path / "set")
    assert dataset.get_batch([0, 1])["x"].tolist() == [2, 3]
    assert [many.tolist() for many in dataset.get_batch([0, 1])["many"]] == [[1, 2], [100, 100]]
    assert dataset.get_batch([0, 1])["pair"] == [{"a": None}, {"a": 5}]


def test_views_are_stored_plain_wherever_they_are(tmp_path: Path) -> None:
    text, plain = pa.string_view(), pa.string()
    values = {
        "text": (["a", None, "b" * 20], text, plain),
        "data": ([b"a", None, b"b" * 20], pa.binary_view(), pa.binary()),
        "many": ([[], ["c" * 20], None], pa.list_(text), pa.list_(plain)),
        "large": ([[], ["c" * 20], None], pa.large_list(text), pa.large_list(plain)),
        "pair": ([["a", "b"]] * 3, pa.list_(text, 2), pa.list_(plain, 2)),
        "map": ([[("k", "v")], [], None], pa.map_(text, text), pa.map_(plain, plain)),
        "struct": ([{"s": "a"}, None, {"s": "b" * 20}], pa.struct([("s", text)]), pa.struct([("s", plain)])),
    }
    batch = pa.record_batch({name: pa.array(given, kind) for name, (given, kind, _) in values.items()})
    with ShardWriter(tmp_path / "set", batch.schema) as writer:
        writer.write_batch(batch)
    dataset = open_dataset(tmp_path / "set")
    assert dataset.schema.types == [kind for _, _, kind in values.values()]
    for name, (given, _, _) in values.items():
        assert list(dataset.get_batch([2, 1, 0])[name]) == given[::-1]


def test_a_dictionary_inside_a_nested_type_is_refused(tmp_path: Path) -> None:
    schema = pa.schema([("x", pa.list_(pa.dictionary(pa.int32(), pa.string())))])
    with pytest.raises(BadInputError, match="field 'x' has a dictionary inside"):
        ShardWriter(tmp_path / "set", schema)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"n": 1}, "exactly the fields"),
        ({"x": np.zeros(64), "text": "", "n": 1, "more": 2}, "exactly the fields"),
        ({"x": np.zeros(63, np.float32), "text": "", "n": 1}, "field 'x' .* shape"),
        ({"x": None, "text": "", "n": 1}, "field 'x' is declared without nulls"),
        ({"x": np.zeros(64, np.float32), "text": 5, "n": 1}, "field 'text' cannot hold"),
        ({"x": np.zeros(64, np.float32), "text": "", "n": "many"}, "field 'n' cannot hold"),
    ],
)
def test_a_wrong_sample_is_refused_and_nothing_is_published(tmp_path: Path, row: dict, message: str) -> None:
    def write_it() -> None:
        with ShardWriter(tmp_path / "set", SCHEMA) as writer:
            writer.write(row)

    with pytest.raises(BadInputError, match=message):
        write_it()
    assert not list((tmp_path / "set").glob("*"))


def test_a_batch_of_another_schema_is_refused(tmp_path: Path) -> None:
    batch = pa.record_batch([pa.array([1], pa.int32())], names=["n"])
    with ShardWriter(tmp_path / "set", pa.schema([("n", pa.int64())])) as writer:
        with pytest.raises(BadInputError, match="field 'n' must be int64, got int32"):
            writer.write_batch(batch)
        with pytest.raises(BadInputError, match=r"must have the fields \['n'\], got \['m'\]"):
            writer.write_batch(batch.rename_columns(["m"]))


def test_nothing_is_visible_before_the_end_or_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "set"

    def write_and_fail() -> None:
        with ShardWriter(path, SCHEMA, block_size_bytes=4096, shard_size_bytes=20_000) as writer:
            for number in range(COUNT):
                writer.write({"x": np.zeros(64, np.float32), "text": "", "n": number})
            assert list(path.glob("shard-*"))
            assert not (path / "dataset.json").exists()
            with pytest.raises(BadInputError, match="no dataset at"):
                open_dataset(path)
            raise KeyError("broken off")

    with pytest.raises(KeyError, match="broken off"):
        write_and_fail()
    assert not list(path.glob("*"))


def test_a_writer_writes_inside_its_block_only(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="inside its `with` block"):
        ShardWriter(tmp_path / "set", SCHEMA).write({})


@pytest.mark.parametrize(
    "settings",
    [{"block_size_bytes": 0}, {"block_size_bytes": 10, "shard_size_bytes": 9}, {"compression": "gzip"}],
)
def test_senseless_settings_are_refused(tmp_path: Path, settings: dict) -> None:
    with pytest.raises(BadInputError, match="must be"):
        ShardWriter(tmp_path / "set", SCHEMA, **settings)


def test_a_place_that_holds_something_is_refused(path: Path) -> None:
    before = open_dataset(path).fingerprint
    with pytest.raises(BadInputError, match="is not empty"):
        write(path, 10)
    assert open_dataset(path).fingerprint == before


def test_overwriting_replaces_the_dataset_and_nothing_else(path: Path) -> None:
    write(path, 10, overwrite=True)
    assert len(open_dataset(path)) == 10
    assert len(list(path.glob("shard-*"))) == 1
    (path / "thesis.tex").write_text("years of work")
    with pytest.raises(BadInputError, match=r"no part of a dataset of this format \(thesis\.tex"):
        write(path, 10, overwrite=True)
    assert (path / "thesis.tex").exists()
    assert len(open_dataset(path)) == 10


def test_an_image_may_be_bytes_or_pixels_of_8_bits(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "set", pa.schema([image_field("image")])) as writer:
        writer.write({"image": np.arange(6, dtype=np.uint8).reshape(2, 3)})
    assert open_dataset(tmp_path / "set")[0]["image"].tolist() == [[0, 1, 2], [3, 4, 5]]
    with (
        pytest.raises(BadInputError, match="must be uint8, got float64"),
        ShardWriter(tmp_path / "two", pa.schema([image_field("image")])) as writer,
    ):
        writer.write({"image": np.zeros((2, 2))})


# Damage: every case must be an error that names the shard, and the offset where there is one.


def damaged(path: Path) -> tuple[Path, int, int]:
    """Return the second shard, and sample and offset of its last block."""
    index = open_dataset(path).index
    block = int(np.flatnonzero(index.blocks.shard == 1)[-1])
    ref = index.block_ref(block)
    return path / "shard-00001.arrow", int(index.blocks.first_sample[block]), ref.offset


def test_a_flipped_byte_names_shard_and_offset(path: Path) -> None:
    shard, sample, offset = damaged(path)
    content = bytearray(shard.read_bytes())
    content[offset + 1000] ^= 1
    shard.write_bytes(content)
    dataset = open_dataset(path)
    assert dataset[0]["n"] == 0
    with pytest.raises(ChangedError, match=rf"offset {offset} of .*shard-00001\.arrow"):
        dataset.get_batch([0, sample])


def test_without_verification_a_flipped_value_passes_and_a_broken_message_does_not(path: Path) -> None:
    shard, sample, offset = damaged(path)
    content = bytearray(shard.read_bytes())
    content[offset + 1000] ^= 1
    shard.write_bytes(content)
    assert open_dataset(path, verify=False)[sample]["n"] == sample
    content[offset : offset + 4] = b"\0\0\0\0"
    shard.write_bytes(content)
    with pytest.raises(CorruptError, match=rf"offset {offset} of .*shard-00001\.arrow"):
        open_dataset(path, verify=False)[sample]


@pytest.mark.parametrize("size", [0, 100, -1])
def test_a_truncated_or_empty_shard_is_named(path: Path, size: int) -> None:
    shard, sample, offset = damaged(path)
    shard.write_bytes(shard.read_bytes()[: size if size >= 0 else offset + 10])
    with pytest.raises(DataError, match=r"shard-00001\.arrow"):
        open_dataset(path)[sample]


def test_a_missing_shard_is_named(path: Path) -> None:
    shard, sample, _ = damaged(path)
    shard.unlink()
    with pytest.raises(NotFoundError, match=r"shard-00001\.arrow"):
        open_dataset(path)[sample]


def test_a_shard_that_changes_under_the_reader_is_named(path: Path) -> None:
    shard, sample, _ = damaged(path)
    dataset = open_dataset(path, buffer_bytes=0)
    dataset[sample]
    other = shard.with_suffix(".new")
    other.write_bytes(shard.read_bytes())
    other.replace(shard)
    with pytest.raises(ChangedError, match=r"shard-00001\.arrow"):
        dataset[sample]


def test_an_index_of_another_version_is_refused(path: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", 100)
    shutil.copy(other / "index.arrow", path / "index.arrow")
    with pytest.raises(CorruptError, match=r"index\.arrow .* is not the index that"):
        open_dataset(path)


def test_a_flipped_byte_in_the_index_is_noticed(path: Path) -> None:
    content = bytearray((path / "index.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "index.arrow").write_bytes(content)
    with pytest.raises(CorruptError, match=r"index\.arrow"):
        open_dataset(path)


def test_a_missing_index_is_named(path: Path) -> None:
    (path / "index.arrow").unlink()
    with pytest.raises(CorruptError, match=r"index\.arrow is missing"):
        open_dataset(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"{}", b'{"format": "other"}', b"\xff\xfe", b"null"])
def test_a_manifest_that_is_none_is_refused(path: Path, content: bytes) -> None:
    (path / "dataset.json").write_bytes(content)
    with pytest.raises(CorruptError, match=r"dataset\.json"):
        open_dataset(path)


def test_a_manifest_of_a_newer_release_says_so(path: Path) -> None:
    change_manifest(path, version=2)
    with pytest.raises(BadInputError, match=r"dataset\.json has version 2 and this release reads up to 1; upgrade"):
        open_dataset(path)


@pytest.mark.parametrize(
    "change",
    [{"fingerprint": "0" * 32}, {"num_samples": 5}, {"num_samples": "many"}, {"version": 0}, {"schema": "AAAA"}],
)
def test_a_manifest_that_contradicts_itself_is_refused(path: Path, change: dict) -> None:
    change_manifest(path, **change)
    with pytest.raises(CorruptError, match=r"dataset\.json"):
        open_dataset(path)


def test_without_a_manifest_there_is_no_dataset(path: Path) -> None:
    (path / "dataset.json").unlink()
    with pytest.raises(BadInputError, match="no dataset at"):
        open_dataset(path)


def change_manifest(path: Path, **change: object) -> None:
    manifest = path / "dataset.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
