"""What conversion writes, read by each format's own library and by ours."""

import gc
import io
import itertools
import json
import shutil
import tarfile
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tfrecord
import webdataset
from PIL import Image

from connectors.bridge import run_sync
from connectors.errors import BadInputError, DataError
from dataflow.convert import Progress, convert
from dataflow.dataset import open_dataset
from dataflow.formats import audio_field, field_kind, image_field, tensor_field, video_field
from dataflow.formats.arrow import ShardWriter
from dataflow.formats.targets.webdataset import _header
from dataflow.formats.writable import WRITABLE
from dataflow.testing.media import encode_audio, encode_video, frames, sound

pytestmark = pytest.mark.usefixtures("kept_scans")

COUNT = 50
SIZES = {"shard_size_bytes": 4000, "block_size_bytes": 1000}
SCHEMA = pa.schema(
    [
        image_field("photo"),
        tensor_field("matrix", np.float32, (2, 3)),
        pa.field("label", pa.int64(), nullable=False),
        pa.field("small", pa.uint8(), nullable=False),
        pa.field("share", pa.float32(), nullable=False),
        pa.field("flag", pa.bool_(), nullable=False),
        pa.field("name", pa.string()),
        pa.field("data", pa.binary()),
        pa.field("many", pa.list_(pa.int64())),
    ]
)


# The webdataset library leaves closing its archives to the garbage collector.
UNCLOSED = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


def sample(number: int) -> dict:
    return {
        "photo": np.full((4, 5, 3), number, np.uint8),
        "matrix": np.full((2, 3), number / 2, np.float32),
        "label": -number,
        "small": number,
        "share": number / 4,
        "flag": number % 2 == 0,
        "name": "" if number % 5 == 0 else f"é{number}",
        "data": bytes([number]) * (number % 7),
        "many": list(range(number % 4)),
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "set"
    with ShardWriter(path, SCHEMA) as writer:
        for number in range(COUNT):
            writer.write(sample(number))
    return path


def tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def files(path: Path, suffix: str) -> list[str]:
    found = sorted(str(file) for file in path.iterdir())
    assert all(name.endswith(suffix) for name in found)
    assert len(found) > 1
    return found


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_parquet_keeps_everything(source: Path, tmp_path: Path, compression: str) -> None:
    convert(source, tmp_path / "out", to="parquet", compression=compression, **SIZES)
    table = pq.read_table(tmp_path / "out")
    assert table.num_rows == COUNT
    assert files(tmp_path / "out", ".parquet")
    ours = open_dataset(tmp_path / "out")
    assert ours.schema.equals(SCHEMA)
    assert field_kind(ours.schema.field("photo")) == "image"
    assert ours.index.num_blocks > len(ours.index.shards)
    for actual, expected in zip(ours, open_dataset(source), strict=True):
        for name in SCHEMA.names:
            np.testing.assert_array_equal(actual[name], expected[name])


@pytest.mark.parametrize(("compression", "suffix"), [("none", ""), ("zstd", ".zst"), ("lz4", ".lz4")])
def test_json_lines_are_json(source: Path, tmp_path: Path, compression: str, suffix: str) -> None:
    fields = [name for name in SCHEMA.names if name not in ("photo", "data")]
    convert(source, tmp_path / "out", to="jsonl", compression=compression, fields=fields, **SIZES)
    rows = []
    for name in files(tmp_path / "out", f".jsonl{suffix}"):
        with pa.input_stream(name, compression="detect" if suffix else None) as file:
            rows += [json.loads(line) for line in file.read().splitlines()]
    expected = [{name: value for name, value in sample(number).items() if name in fields} for number in range(COUNT)]
    assert rows == [row | {"matrix": row["matrix"].tolist()} for row in expected]
    assert open_dataset(tmp_path / "out")[7]["name"] == "é7"


def test_tfrecord_is_read_by_its_library(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", to="tfrecord", **SIZES)
    records = [
        record for name in files(tmp_path / "out", ".tfrecord") for record in tfrecord.tfrecord_loader(name, None)
    ]
    assert len(records) == COUNT
    for number, record in enumerate(records):
        assert record["label"].tolist() == [-number]
        assert record["matrix"].tolist() == [number / 2] * 6
        assert bytes(record["name"]).decode() == sample(number)["name"]
        with Image.open(io.BytesIO(bytes(record["photo"]))) as image:
            np.testing.assert_array_equal(np.array(image), sample(number)["photo"])
    ours = open_dataset(tmp_path / "out")
    assert ours.get_batch(range(COUNT))["data"] == [sample(number)["data"] for number in range(COUNT)]
    assert [values.tolist() for values in ours.get_batch(range(COUNT))["many"]] == [
        sample(number)["many"] for number in range(COUNT)
    ]


@UNCLOSED
def test_webdataset_is_read_by_its_library(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", to="webdataset", **SIZES)
    names = files(tmp_path / "out", ".tar")
    read = list(webdataset.WebDataset(names, shardshuffle=False, empty_check=False).decode("rgb8"))
    assert len(read) == COUNT
    for number, actual in enumerate(read):
        expected = sample(number)
        assert actual["__key__"] == f"{number:09d}"
        np.testing.assert_array_equal(actual["photo.png"], expected["photo"])
        np.testing.assert_array_equal(actual["matrix.npy"], expected["matrix"])
        assert actual["label.cls"] == expected["label"]
        assert actual["small.cls"] == number
        assert actual["share.npy"] == expected["share"]
        assert actual["flag.cls"] == expected["flag"]
        assert actual["name.txt"] == expected["name"]
        assert actual["data"] == expected["data"]
        assert actual["many.json"] == expected["many"]
    gc.collect()
    assert open_dataset(tmp_path / "out")[7]["label.cls"] == -7


@UNCLOSED
def test_archives_say_by_their_suffixes_what_media_are(tmp_path: Path) -> None:
    fields = [audio_field("sound"), video_field("clip"), audio_field("voice.flac"), image_field("photo")]
    files = [encode_audio(sound(0), "wav"), encode_video(frames(3)), encode_audio(sound(1)), b"\xff\xd8\xff not really"]
    names = ["sound.wav", "clip.mp4", "voice.flac", "photo.jpg"]
    with ShardWriter(tmp_path / "in", pa.schema([field.with_nullable(True) for field in fields])) as writer:
        writer.write(dict(zip([field.name for field in fields], files, strict=True)))
        writer.write({"sound": b"noise", "clip": None, "voice.flac": None, "photo": files[0]})
    convert(tmp_path / "in", tmp_path / "out", to="webdataset")
    one, two = webdataset.WebDataset(str(tmp_path / "out" / "shard-00000.tar"), shardshuffle=False)
    assert {name: one[name] for name in names} == dict(zip(names, files, strict=True))
    assert {name for name in two if not name.startswith("__")} == {"sound.bin", "photo.bin"}
    gc.collect()
    ours = open_dataset(tmp_path / "out", encoded=names)
    assert [field_kind(ours.schema.field(name)) for name in names] == ["audio", "video", "audio", "image"]
    assert {name: ours[0][name] for name in names} == dict(zip(names, files, strict=True))


@UNCLOSED
def test_names_that_webdataset_knows_are_kept(tmp_path: Path) -> None:
    schema = pa.schema(
        [
            pa.field("__key__", pa.string()),
            pa.field("cls", pa.int64()),
            pa.field("txt", pa.string()),
            image_field("png"),
        ]
    )
    with ShardWriter(tmp_path / "in", schema) as writer:
        writer.write({"__key__": "a/b", "cls": 3, "txt": None, "png": np.zeros((2, 2, 3), np.uint8)})
    convert(tmp_path / "in", tmp_path / "out", to="webdataset")
    (actual,) = webdataset.WebDataset(str(tmp_path / "out" / "shard-00000.tar"), shardshuffle=False)
    assert {name for name in actual if not name.startswith("__")} == {"cls", "png"}
    assert (actual["__key__"], actual["cls"]) == ("a/b", b"3")
    gc.collect()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"x": [1, None], "t": ["a", None]}, "all fields of sample 1 are null"),
        ({"__key__": ["a", "b"], "x": [1, None]}, "all fields of sample 1 are null"),
        ({"__key__": ["a", "img.2024"], "x": [1, 2]}, "sample 1 has the __key__ 'img.2024'"),
        ({"__key__": ["a", "b\0c"], "x": [1, 2]}, "sample 1 has the __key__"),
        ({"__key__": ["a", "a"], "x": [1, None], "t": [None, "b"]}, "samples 0 and 1 have the same __key__, 'a'"),
        ({"__key__": ["000000001", None], "x": [1, 2]}, "samples 0 and 1 have the same __key__"),
        ({"x": [1, 2], "x.cls": [3, 4]}, "two fields of sample 0 would be the same file"),
    ],
)
def test_a_sample_that_an_archive_would_lose_or_merge_is_refused(
    tmp_path: Path, columns: dict[str, list], message: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    with pytest.raises(BadInputError, match=message):
        convert(tmp_path / "in.parquet", tmp_path / "out", to="webdataset")


def test_json_of_a_column_of_json_is_not_quoted_once_more(tmp_path: Path) -> None:
    texts = ['{"a": [1, "é"]}', "null"]
    column = pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts))
    pq.write_table(pa.table({"meta": column}), tmp_path / "in.parquet")
    convert(tmp_path / "in.parquet", tmp_path / "out", to="webdataset", verify=True)
    assert [sample["meta.json"] for sample in open_dataset(tmp_path / "out")] == texts


@pytest.mark.parametrize("to", ["arrow", "mds", "parquet", "tfrecord", "webdataset", "zarr"])
def test_bytes_of_one_length_come_back_from_every_format_that_has_bytes(tmp_path: Path, to: str) -> None:
    values = [bytes([number]) * 16 for number in range(4)]
    pq.write_table(pa.table({"hash": pa.array(values, pa.binary(16))}), tmp_path / "in.parquet")
    assert convert(tmp_path / "in.parquet", tmp_path / "out", to=to, verify=True).not_compared == ()
    assert open_dataset(tmp_path / "out").get_batch(range(4))["hash"] == values


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_mds_is_laid_out_as_streaming_does(source: Path, tmp_path: Path, compression: str) -> None:
    fields = [name for name in SCHEMA.names if name != "many"]
    convert(source, tmp_path / "out", to="mds", compression=compression, fields=fields, **SIZES)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    theirs = json.loads((Path(__file__).parent / "data" / "mds-zstd" / "index.json").read_text())
    assert index.keys() == theirs.keys()
    assert all(shard.keys() == theirs["shards"][0].keys() for shard in index["shards"])
    ours = open_dataset(tmp_path / "out")
    assert ours.source.format == "mds"
    assert len(ours.index.shards) > 1
    for number, actual in enumerate(ours):
        expected = {name: value for name, value in sample(number).items() if name != "many"}
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(actual[name], value)


@pytest.mark.parametrize(
    ("to", "compression", "names"),
    [
        ("parquet", "lz4", ["label", "name"]),
        ("webdataset", "none", ["__key__"]),
        ("jsonl", "zstd", []),
        ("jsonl", "lz4", []),
        ("zarr", "none", ["label"]),
    ],
)
def test_no_samples_at_all_are_a_data_set_of_none(
    source: Path, tmp_path: Path, to: str, compression: str, names: list[str]
) -> None:
    fields = ["label"] if to == "zarr" else ["label", "name"]
    options = {"to": to, "compression": compression, "fields": fields, "filter": "label > 0", "verify": True}
    assert convert(source, tmp_path / "out", **options).num_samples == 0
    empty = open_dataset(tmp_path / "out")
    assert (len(empty), empty.schema.names) == (0, names)
    # Written over by what has samples, it is gone.
    convert(source, tmp_path / "out", **options | {"filter": None, "overwrite": True})
    assert len(open_dataset(tmp_path / "out")) == COUNT


@pytest.mark.parametrize("to", ["jsonl", "tfrecord"])
def test_a_file_without_a_byte_is_not_written(source: Path, tmp_path: Path, to: str) -> None:
    convert(source, tmp_path / "out", to=to, compression="none", fields=["label"], filter="label > 0")
    assert not list((tmp_path / "out").iterdir())


@UNCLOSED
def test_other_libraries_read_what_has_no_samples(source: Path, tmp_path: Path) -> None:
    for to in ("parquet", "webdataset"):
        convert(source, tmp_path / to, to=to, fields=["label", "name"], filter="label > 0")
    table = pq.read_table(tmp_path / "parquet" / "shard-00000.parquet")
    assert (table.num_rows, table.schema.names) == (0, ["label", "name"])
    archive = str(tmp_path / "webdataset" / "shard-00000.tar")
    with tarfile.open(archive) as file:
        assert file.getnames() == []
    assert list(webdataset.WebDataset([archive], shardshuffle=False, empty_check=False)) == []


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_mds_without_samples_still_says_its_fields(source: Path, tmp_path: Path, compression: str) -> None:
    convert(source, tmp_path / "out", to="mds", compression=compression, filter="label > 0", fields=["label", "name"])
    empty = open_dataset(tmp_path / "out")
    assert len(empty) == 0
    assert empty.schema.names == ["label", "name"]
    assert convert(tmp_path / "out", tmp_path / "native").num_samples == 0
    assert open_dataset(tmp_path / "native").schema.names == ["label", "name"]


@pytest.mark.parametrize("to", [name for name in WRITABLE if name != "megatron"])
def test_tensors_of_booleans_come_back_from_every_format(tmp_path: Path, to: str) -> None:
    masks = np.arange(24).reshape(4, 3, 2) % 5 < 2
    with ShardWriter(tmp_path / "in", pa.schema([tensor_field("mask", bool, (3, 2))])) as writer:
        writer.write_columns({"mask": masks})
    convert(tmp_path / "in", tmp_path / "out", to=to)
    for expected, written in zip(masks, open_dataset(tmp_path / "out"), strict=True):
        (found,) = (value for name, value in written.items() if name in {"mask", "mask.npy"})
        found = np.load(io.BytesIO(found)) if isinstance(found, bytes) else found
        np.testing.assert_array_equal(np.reshape(found, (3, 2)), expected)


@pytest.mark.parametrize("to", WRITABLE)
def test_every_format_is_resumable_and_the_same_from_any_number_of_workers(
    source: Path, tmp_path: Path, to: str
) -> None:
    fields = ["many"] if to == "megatron" else ["label", "name", "share"]
    settings = SIZES | {"to": to, "fields": fields, "shard_size_bytes": 2500}
    if to == "zarr":
        # Chunks are whole blocks, and the source is one block, so smaller shards need smaller chunks.
        settings |= {"block_size_bytes": 500, "shard_size_bytes": 1000}

    def content(name: str) -> dict[str, bytes]:
        return tree(tmp_path / name)

    def stop(state: Progress) -> None:
        if state.shards == 2:
            raise KeyError("broken off")

    convert(source, tmp_path / "one", workers=0, **settings)
    convert(source, tmp_path / "two", workers=2, **settings)
    with pytest.raises(KeyError, match="broken off"):
        convert(source, tmp_path / "three", progress=stop, **settings)
    with pytest.raises(BadInputError, match="--resume"):
        open_dataset(tmp_path / "three")
    assert convert(source, tmp_path / "three", resume=True, **settings).num_resumed == 2
    assert content("one") == content("two") == content("three")
    convert(source, tmp_path / "one", overwrite=True, **settings)
    assert content("one") == content("two")


@pytest.mark.parametrize("to", WRITABLE)
def test_a_finished_data_set_is_not_resumed(source: Path, tmp_path: Path, to: str) -> None:
    settings = {"to": to, "fields": ["many"] if to == "megatron" else ["label"]}
    convert(source, tmp_path / "out", **SIZES, **settings)
    before = tree(tmp_path / "out")
    with pytest.raises(BadInputError, match="finished dataset already"):
        convert(source, tmp_path / "out", resume=True, sample_fraction=0.5, **settings)
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("to", ["arrow", "mds", "megatron", "webdataset", "zarr"])
def test_broken_off_at_any_write_or_removal_nothing_less_than_all_is_a_data_set(
    source: Path, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"to": to, "fields": ["many"] if to == "megatron" else ["label"], "block_size_bytes": 100}
    old, new, path = tmp_path / "old", tmp_path / "new", tmp_path / "out"
    size_bytes = 100 if to == "zarr" else 1200
    convert(source, old, **settings, shard_size_bytes=size_bytes)
    settings |= {"shard_size_bytes": 2 * size_bytes}
    convert(source, new, **settings)

    def broken_off(last_step: int) -> bool:
        steps = itertools.count()

        def step(work: Coroutine[object, object, object]) -> object:
            if next(steps) == last_step:
                work.close()
                raise KeyError("broken off")
            return run_sync(work)

        with monkeypatch.context() as patch, suppress(KeyError):
            patch.setattr("dataflow.formats.destination.run_sync", step)
            convert(source, path, overwrite=True, **settings)
            return False
        return True

    for last_step in itertools.count():
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(old, path)
        if not broken_off(last_step):
            break
        with suppress(DataError):
            assert len(open_dataset(path)) == COUNT
        with suppress(DataError):
            convert(source, path, resume=True, **settings)
            assert tree(path) == tree(new)
    assert len(tree(old)) > len(tree(new))
    assert last_step > len(tree(old))
    assert tree(path) == tree(new)


@pytest.mark.parametrize("to", ["arrow", "mds", "zarr"])
def test_killed_after_the_manifest_it_can_still_be_finished(source: Path, tmp_path: Path, to: str) -> None:
    settings = SIZES | {"to": to, "fields": ["label"]}
    convert(source, tmp_path / "whole", **settings)
    seen: dict[str, bytes] = {}

    def remember(state: Progress) -> None:
        seen.update({file.name: file.read_bytes() for file in (tmp_path / "out").glob("*.part")})

    convert(source, tmp_path / "out", progress=remember, **settings)
    for name, data in seen.items():
        (tmp_path / "out" / name).write_bytes(data)
    convert(source, tmp_path / "out", resume=True, **settings)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize(
    ("to", "kind", "message"),
    [
        ("jsonl", pa.binary(), "jsonl cannot hold field 'x' of type binary"),
        ("jsonl", pa.timestamp("s"), "jsonl cannot hold field 'x'"),
        ("jsonl", pa.list_(pa.binary()), "jsonl cannot hold field 'x'"),
        ("tfrecord", pa.struct([("a", pa.int8())]), "tfrecord cannot hold field 'x'"),
        ("webdataset", pa.list_(pa.binary()), "webdataset cannot hold field 'x'.*JSON, which has no bytes"),
        ("webdataset", pa.struct([("a", pa.large_binary())]), "webdataset cannot hold field 'x'"),
        ("tfrecord", pa.timestamp("s"), "tfrecord cannot hold field 'x'"),
        ("parquet", pa.list_(pa.struct([])), "parquet cannot hold field 'x' .*no child field"),
        ("mds", pa.list_(pa.int8()), "mds cannot hold field 'x'"),
        ("megatron", pa.int8(), "megatron cannot hold field 'x'"),
        ("zarr", pa.list_(pa.int8()), "zarr cannot hold field 'x'"),
        ("zarr", pa.timestamp("s"), "zarr cannot hold field 'x'"),
        ("zarr", pa.struct([("a", pa.int8())]), "zarr cannot hold field 'x'"),
        ("megatron", pa.list_(pa.uint32()), "megatron cannot hold field 'x'"),
    ],
)
def test_a_field_that_a_format_cannot_hold_is_named_before_anything_is_written(
    tmp_path: Path, to: str, kind: pa.DataType, message: str
) -> None:
    with ShardWriter(tmp_path / "in", pa.schema([("x", kind)])):
        pass
    with pytest.raises(BadInputError, match=message):
        convert(tmp_path / "in", tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("to", "kind", "value", "message"),
    [
        ("jsonl", pa.float64(), float("nan"), "field 'x' of a sample from number 0 on has a number"),
        ("tfrecord", pa.float64(), 0.1, "32 bits, and field 'x'"),
        ("tfrecord", pa.uint64(), 1 << 63, "signed integers: field 'x'"),
        ("mds", pa.int64(), None, "mds has no nulls, and field 'x'"),
        ("zarr", pa.int64(), None, "zarr has no nulls, and field 'x'"),
        ("zarr", pa.string(), None, "zarr has no nulls, and field 'x'"),
        ("zarr", pa.list_(pa.int8(), 2), [1, None], "zarr has no nulls, and field 'x'"),
        ("webdataset", pa.timestamp("s"), np.datetime64(1 << 40, "s"), "field 'x' has a value that an archive cannot"),
        ("megatron", pa.list_(pa.int8()), None, "megatron has no nulls, and some sequences"),
        ("megatron", pa.list_(pa.int8()), [1, None], "megatron has no nulls, and some tokens"),
        ("megatron", pa.list_(pa.int8()), [], "have no tokens"),
    ],
)
def test_a_value_that_a_format_cannot_hold_is_an_error(
    tmp_path: Path, to: str, kind: pa.DataType, value: object, message: str
) -> None:
    with ShardWriter(tmp_path / "in", pa.schema([("x", kind)])) as writer:
        writer.write({"x": value})
    with pytest.raises(BadInputError, match=message):
        convert(tmp_path / "in", tmp_path / "out", to=to)


def test_a_name_that_archives_cannot_hold_is_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "in", pa.schema([("a/b", pa.int8())])):
        pass
    with pytest.raises(BadInputError, match="field 'a/b' cannot be a suffix"):
        convert(tmp_path / "in", tmp_path / "out", to="webdataset")


@pytest.mark.parametrize(
    ("to", "compression"),
    [("webdataset", "zstd"), ("tfrecord", "lz4"), ("mds", "lz4"), ("zarr", "lz4"), ("zip", "none")],
)
def test_settings_that_a_format_lacks_are_refused(source: Path, tmp_path: Path, to: str, compression: str) -> None:
    with pytest.raises(BadInputError):
        convert(source, tmp_path / "out", to=to, compression=compression)


@pytest.mark.parametrize(
    "name", ["a.txt", "0/1.png", "x" * 96 + ".txt", "x" * 97 + ".txt", "é.txt", "x" * 300 + ".txt"]
)
@pytest.mark.parametrize("size_bytes", [0, 1, 511, 1 << 20, (1 << 33) - 1, 1 << 33])
def test_headers_are_those_of_tarfile(name: str, size_bytes: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = size_bytes
    assert _header(name, size_bytes) == info.tobuf(tarfile.PAX_FORMAT)
