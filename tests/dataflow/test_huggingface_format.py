"""Datasets of the HuggingFace library, written by it (tests/dataflow/data) or as it does."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from connectors.errors import BadInputError, CorruptError, DataError
from dataflow.convert import convert
from dataflow.dataset import open_dataset
from dataflow.formats import class_names, field_kind
from dataflow.formats.arrow import ShardWriter
from dataflow.testing.media import encode_audio, sound

pytestmark = pytest.mark.usefixtures("kept_scans")

THEIRS = Path(__file__).parent / "data" / "huggingface"
COUNT = 25


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(THEIRS, tmp_path / "set"))


def expected(number: int) -> dict:
    return {
        "id": number,
        "text": None if number % 7 == 3 else f"é{number}",
        "label": number % 3,
        "photo": None if number % 4 == 0 else np.full((4, 5, 3), number, np.uint8),
        "many": list(range(number % 4)),
    }


@pytest.mark.parametrize("cached", [False, True])
def test_what_the_library_saved_is_read(copy: Path, cached: bool) -> None:
    if cached:
        (copy / "state.json").unlink()
        (copy / "cache-123.arrow").write_bytes(b"a result of map")
    dataset = open_dataset(copy)
    assert dataset.source.format == "huggingface"
    assert (len(dataset), len(dataset.index.shards)) == (COUNT, 2)
    assert field_kind(dataset.schema.field("photo")) == "image"
    assert class_names(dataset.schema.field("label")) == ["ant", "bee", "cat"]
    for number in (24, 0, 3, 12, 13):
        for name, value in expected(number).items():
            np.testing.assert_array_equal(dataset[number][name], value)


def test_the_index_knows_every_batch_without_reading_its_body(tmp_path: Path) -> None:
    schema = pa.schema({"n": pa.int64(), "s": pa.string()})
    batches = [pa.record_batch({"n": range(k), "s": ["x" * 1000] * k}, schema) for k in (3, 0, 100, 1)]
    (tmp_path / "set").mkdir()
    for name, options in {
        "a.arrow": pa.ipc.IpcWriteOptions(),
        "b.arrow": pa.ipc.IpcWriteOptions(compression="zstd"),
    }.items():
        with pa.ipc.new_stream(tmp_path / "set" / name, schema, options=options) as writer:
            for batch in batches:
                writer.write_batch(batch)
    (tmp_path / "set" / "dataset_info.json").write_text("{}")
    dataset = open_dataset(tmp_path / "set")
    assert np.diff(dataset.index.blocks.first_sample).tolist() == [3, 100, 1] * 2
    assert dataset.get_batch(range(208))["n"].tolist() == [*range(3), *range(100), 0] * 2


@pytest.mark.parametrize("to", ["arrow", "parquet"])
def test_it_converts_with_everything_it_has(copy: Path, tmp_path: Path, to: str) -> None:
    convert(copy, tmp_path / "out", to=to)
    for number, row in zip(range(COUNT), open_dataset(tmp_path / "out"), strict=True):
        for name, value in expected(number).items():
            np.testing.assert_array_equal(row[name], value)


def test_a_dict_of_datasets_says_to_choose(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "dict").mkdir()
    shutil.move(copy, tmp_path / "dict" / "train")
    (tmp_path / "dict" / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    with pytest.raises(BadInputError, match=r"\['train'\]; open one"):
        open_dataset(tmp_path / "dict")
    assert len(open_dataset(tmp_path / "dict" / "train")) == COUNT


def test_a_dataset_of_no_samples_is_told(copy: Path) -> None:
    state = json.loads((copy / "state.json").read_text())
    (copy / "state.json").write_text(json.dumps(state | {"_data_files": []}))  # as the library saves one
    with pytest.raises(BadInputError, match="has no samples"):
        open_dataset(copy)


def test_an_index_of_its_own_is_refused(copy: Path) -> None:
    state = json.loads((copy / "state.json").read_text())
    (copy / "state.json").write_text(json.dumps(state | {"_indices_data_files": [{"filename": "indices.arrow"}]}))
    with pytest.raises(BadInputError, match="flatten_indices"):
        open_dataset(copy)


@pytest.mark.parametrize("kind", ["Audio", "Image", "Video"])
def test_media_are_fields_of_their_kind_that_may_be_missing(tmp_path: Path, kind: str) -> None:
    (tmp_path / "set").mkdir()
    files = [encode_audio(sound(0)), None]
    values = [None if file is None else {"bytes": file, "path": None} for file in files]
    media = pa.array(values, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    features = {"info": {"features": {"x": {"_type": kind}}}}
    schema = pa.schema([pa.field("x", media.type)], metadata={"huggingface": json.dumps(features)})
    with pa.ipc.new_stream(tmp_path / "set" / "a.arrow", schema) as writer:
        writer.write_batch(pa.record_batch([media], schema=schema))
    (tmp_path / "set" / "dataset_info.json").write_text("{}")
    dataset = open_dataset(tmp_path / "set", encoded=["x"])
    assert field_kind(dataset.schema.field("x")) == kind.lower()
    assert dataset.get_batch([0, 1])["x"] == files


def test_images_that_lie_elsewhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    photo = pa.array(
        [{"bytes": None, "path": "/elsewhere/1.png"}], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    features = {"info": {"features": {"photo": {"_type": "Image"}}}}
    schema = pa.schema([pa.field("photo", photo.type)], metadata={"huggingface": json.dumps(features)})
    with pa.ipc.new_stream(tmp_path / "set" / "a.arrow", schema) as writer:
        writer.write_batch(pa.record_batch([photo], schema=schema))
    (tmp_path / "set" / "dataset_info.json").write_text("{}")
    with pytest.raises(BadInputError, match="lie in files elsewhere"):
        open_dataset(tmp_path / "set")[0]


def test_dictionaries_are_refused(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    batch = pa.record_batch({"s": pa.array(["a", "b"]).dictionary_encode()})
    with pa.ipc.new_stream(tmp_path / "set" / "a.arrow", batch.schema) as writer:
        writer.write_batch(batch)
    (tmp_path / "set" / "dataset_info.json").write_text("{}")
    with pytest.raises(BadInputError, match="dictionary-encoded"):
        open_dataset(tmp_path / "set")


def test_views_are_plain(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    batch = pa.record_batch(
        {"s": pa.array(["é" * 20, None], pa.string_view()), "b": pa.array([[b"x"], []], pa.list_(pa.binary_view()))}
    )
    with pa.ipc.new_stream(tmp_path / "set" / "a.arrow", batch.schema) as writer:
        writer.write_batch(batch)
    (tmp_path / "set" / "dataset_info.json").write_text("{}")
    dataset = open_dataset(tmp_path / "set")
    assert dataset.schema.types == [pa.string(), pa.list_(pa.binary())]
    assert dataset.get_batch([0, 1]) == {"s": ["é" * 20, None], "b": [[b"x"], []]}


def test_a_cache_of_several_splits_is_refused(copy: Path) -> None:
    (copy / "state.json").unlink()
    (copy / "data-00000-of-00002.arrow").rename(copy / "set-train.arrow")
    (copy / "data-00001-of-00002.arrow").rename(copy / "set-test-00000-of-00001.arrow")
    info = json.loads((copy / "dataset_info.json").read_text())
    (copy / "dataset_info.json").write_text(json.dumps(info | {"splits": {"train": {}, "extra": {}, "test": {}}}))
    with pytest.raises(BadInputError, match=r"a cache of the splits \['train', 'test'\]; call save_to_disk"):
        open_dataset(copy)
    (copy / "set-test-00000-of-00001.arrow").unlink()
    assert 0 < len(open_dataset(copy)) < COUNT


def test_arrow_files_without_the_library_s_marks_are_no_dataset(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "set", pa.schema({"n": pa.int64()})) as writer:
        writer.write({"n": 1})
    (tmp_path / "set" / "dataset.json").unlink()
    with pytest.raises(BadInputError, match="no dataset"):
        open_dataset(tmp_path / "set")


# Corruption

NAME = "data-00001-of-00002.arrow"


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / NAME).unlink()
    with pytest.raises(CorruptError, match=f"{NAME} is missing"):
        open_dataset(copy)


@pytest.mark.parametrize("keep", [3, 500, 801, 900, 1500, 2500])
def test_a_cut_off_file_is_named_with_the_offset(copy: Path, keep: int) -> None:
    data = (copy / NAME).read_bytes()
    (copy / NAME).write_bytes(data[:keep])
    with pytest.raises(CorruptError, match=rf"{NAME}.*offset \d+|offset \d+ of .*{NAME}"):
        open_dataset(copy)


@pytest.mark.parametrize("name", [b"outer", b"inner"])
def test_a_name_of_a_field_that_is_no_text_is_damage(tmp_path: Path, name: bytes) -> None:
    (tmp_path / "set").mkdir()
    batch = pa.RecordBatch.from_pylist([{"outer": {"inner": 1}}])
    with pa.ipc.new_stream(tmp_path / "set" / "a.arrow", batch.schema) as writer:
        writer.write_batch(batch)
    data = (tmp_path / "set" / "a.arrow").read_bytes()
    (tmp_path / "set" / "a.arrow").write_bytes(data.replace(name, name[:-1] + b"\xff"))
    (tmp_path / "set" / "dataset_info.json").write_text("{}")
    with pytest.raises(CorruptError, match=r"a\.arrow has no readable schema"):
        open_dataset(tmp_path / "set")


def test_any_flipped_byte_is_an_error_or_changes_values_only(copy: Path) -> None:
    """The format has no checksums: what structure there is must hold, and nothing else may be raised."""
    data = (copy / NAME).read_bytes()
    for position in range(0, len(data), 41):
        damaged = bytearray(data)
        damaged[position] ^= 0xFF
        (copy / NAME).write_bytes(damaged)
        try:
            dataset = open_dataset(copy, columns=["id", "label"])
            assert len(dataset.get_batch(range(len(dataset)))["id"]) == len(dataset)
        except DataError:
            continue


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"_data_files": [3]}', b"\xff"])
def test_a_state_that_is_none_is_an_error(copy: Path, content: bytes) -> None:
    (copy / "state.json").write_bytes(content)
    with pytest.raises(DataError):
        open_dataset(copy)


def test_a_file_that_changes_under_the_reader_is_an_error(copy: Path) -> None:
    dataset = open_dataset(copy)
    (copy / NAME).write_bytes((copy / NAME).read_bytes() + b"\0" * 8)
    with pytest.raises(DataError, match=NAME):
        dataset[COUNT - 1]
