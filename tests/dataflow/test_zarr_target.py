"""What `convert --to zarr` writes, read by zarr-python and by ours."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from click.testing import CliRunner

from cache.config import CacheConfig, TierConfig
from connectors.errors import BadInputError, CorruptError
from dataflow.cli.main import main
from dataflow.convert import Progress, convert
from dataflow.dataset import open_dataset
from dataflow.formats import field_kind, image_field, tensor_field
from dataflow.formats.arrow import ShardWriter
from dataflow.formats.pieces import fetch_blocks

COUNT = 50
SCHEMA = pa.schema(
    [
        tensor_field("volume", np.float32, (7, 20, 9)),
        tensor_field("mask", np.bool_, (3, 2)),
        pa.field("label", pa.int64(), nullable=False),
        pa.field("half", pa.float16(), nullable=False),
        pa.field("flag", pa.bool_(), nullable=False),
        pa.field("name", pa.string()),
        pa.field("data", pa.large_binary()),
        pa.field("pair", pa.list_(pa.uint8(), 2)),
        pa.field("group", pa.dictionary(pa.int8(), pa.string())),
        image_field("photo"),
    ]
)
SIZES = {"block_size_bytes": 8000, "shard_size_bytes": 40_000}


def sample(number: int) -> dict[str, Any]:
    return {
        "volume": np.random.default_rng(number).random((7, 20, 9), np.float32),
        "mask": np.arange(6).reshape(3, 2) % 3 == number % 3,
        "label": -number,
        "half": np.float16(number / 4),
        "flag": number % 2 == 0,
        "name": "" if number % 5 == 0 else f"é{number}",
        "data": bytes([number]) * (number % 7),
        "pair": [number, 2 * number],
        "group": f"g{number % 3}",
        "photo": np.full((4, 5, 3), number, np.uint8),
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "set"
    with ShardWriter(path, SCHEMA, block_size_bytes=20_000) as writer:
        for number in range(COUNT):
            writer.write(sample(number))
    return path


def library(path: Path) -> zarr.Group:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr says that a type has no specification yet
        return zarr.open_group(path, mode="r")


def values(path: Path, name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library(path)[name][...]


def twice(row: dict[str, Any]) -> dict[str, Any]:
    return {"twice": 2 * row["label"]}


def tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_arrays_are_read_by_zarr_and_by_us(source: Path, tmp_path: Path, compression: str) -> None:
    result = convert(source, tmp_path / "out", to="zarr", compression=compression, **SIZES)
    assert (result.num_samples, result.num_shards > 1) == (COUNT, True)
    expected = open_dataset(source, encoded=["photo"]).get_batch(range(COUNT))
    ours = open_dataset(tmp_path / "out", encoded=["photo"])
    assert ours.schema.names == SCHEMA.names
    assert field_kind(ours.schema.field("photo")) == "image"
    columns = ours.get_batch(range(COUNT))
    assert ours.source.lineage["source"]["format"] == "arrow"
    for name in SCHEMA.names:
        theirs = values(tmp_path / "out", name)
        for other in (theirs, columns[name]):
            np.testing.assert_array_equal(np.asarray(list(other)), np.asarray(list(expected[name])), err_msg=name)
        if isinstance(columns[name], np.ndarray):
            assert theirs.dtype == columns[name].dtype == expected[name].dtype
    np.testing.assert_array_equal(open_dataset(tmp_path / "out")[7]["photo"], sample(7)["photo"])
    convert(tmp_path / "out", tmp_path / "back")
    back = open_dataset(tmp_path / "back", encoded=["photo"]).get_batch(range(COUNT))
    for name in SCHEMA.names:
        np.testing.assert_array_equal(np.asarray(list(back[name])), np.asarray(list(expected[name])))


def test_tensors_that_arrow_made_of_arrays_are_written(tmp_path: Path) -> None:
    values = np.arange(24).reshape(4, 2, 3)
    kind = pa.fixed_shape_tensor(pa.int64(), (2, 3), permutation=[0, 1])  # as they lie, and Arrow says so
    tensors = pa.ExtensionArray.from_storage(kind, pa.FixedSizeListArray.from_arrays(values.ravel(), 6))
    pq.write_table(pa.table({"x": tensors}), tmp_path / "in.parquet")
    convert(tmp_path / "in.parquet", tmp_path / "out", to="zarr", verify=True)
    np.testing.assert_array_equal(zarr.open(tmp_path / "out")["x"][:], values)


def test_chunks_have_about_the_size_of_a_block_and_shards_that_of_a_shard(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "large", to="zarr", block_size_bytes=30_000, shard_size_bytes=120_000)
    volume = library(tmp_path / "large")["volume"]
    assert (volume.chunks, volume.shards) == ((5, 7, 20, 9), (20, 7, 20, 9))
    assert library(tmp_path / "large")["label"].chunks == (5,)
    # Samples that are larger than a block are cut along their longest axes.
    convert(source, tmp_path / "small", to="zarr", block_size_bytes=1000, shard_size_bytes=60_000)
    volume = library(tmp_path / "small")["volume"]
    assert (volume.chunks, volume.shards) == ((1, 7, 5, 5), (11, 7, 20, 10))
    np.testing.assert_array_equal(volume[...], open_dataset(tmp_path / "small").get_batch(range(COUNT))["volume"])


def test_a_dataset_smaller_than_a_chunk_is_not_filled_up(tmp_path: Path) -> None:
    convert(({"x": number} for number in range(3)), tmp_path / "out", to="zarr")
    assert library(tmp_path / "out")["x"].chunks == (3,)
    assert (tmp_path / "out" / "x" / "c" / "0").stat().st_size == 3 * 8 + 4 + 16 + 4


def test_no_samples_are_arrays_of_length_0(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", to="zarr", filter="label > 0")
    assert library(tmp_path / "out")["volume"].shape == (0, 7, 20, 9)
    assert len(open_dataset(tmp_path / "out")) == 0


@pytest.mark.parametrize("shuffle", [None, "full", "block"])
def test_drawn_and_split_samples_fill_shards_exactly(source: Path, tmp_path: Path, shuffle: str | None) -> None:
    settings = SIZES | {"split": {"train": 0.8, "val": 0.2}, "sample_fraction": 0.9, "seed": 3, "shuffle": shuffle}
    convert(source, tmp_path / "zarr", to="zarr", **settings)
    convert(source, tmp_path / "arrow", **settings)
    seen = []
    for name, count in (("train", 36), ("val", 9)):
        labels = values(tmp_path / "zarr" / name, "label").tolist()
        assert labels == open_dataset(tmp_path / "arrow" / name).get_batch(range(count))["label"].tolist()
        assert labels == open_dataset(tmp_path / "zarr" / name).get_batch(range(count))["label"].tolist()
        seen += labels
    assert len(set(seen)) == 45


def test_filters_rules_and_maps_do_not_leave_holes(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", to="zarr", fields=["label"], filter="label < -10", map=twice)
    expected = [-2 * number for number in range(11, COUNT)]
    assert values(tmp_path / "out", "twice").tolist() == expected
    assert open_dataset(tmp_path / "out").get_batch(range(len(expected)))["twice"].tolist() == expected


def test_it_is_resumed_where_objects_are_gone_and_the_same(source: Path, tmp_path: Path) -> None:
    settings = SIZES | {"to": "zarr", "split": {"a": 0.5, "b": 0.5}}

    def stop(state: Progress) -> None:
        if state.shards == 3:
            raise KeyError("broken off")

    convert(source, tmp_path / "whole", **settings)
    with pytest.raises(KeyError):
        convert(source, tmp_path / "out", workers=0, progress=stop, **settings)
    assert not list((tmp_path / "out").rglob("zarr.json"))
    with pytest.raises(BadInputError, match="--resume"):
        open_dataset(tmp_path / "out" / "a")
    (tmp_path / "out" / "a" / "label" / "c" / "1").unlink()
    assert convert(source, tmp_path / "out", resume=True, **settings).num_resumed == 2
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    convert(source, tmp_path / "out", overwrite=True, **settings)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_what_is_no_part_of_a_group_is_never_overwritten(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", to="zarr", fields=["label"])
    (tmp_path / "out" / "label" / "notes.txt").write_text("mine")
    with pytest.raises(BadInputError, match=r"label/notes\.txt"):
        convert(source, tmp_path / "out", to="zarr", fields=["label"], overwrite=True)
    assert len(open_dataset(tmp_path / "out")) == COUNT


def test_leaving_bad_samples_out_while_writing_is_refused_and_done_as_the_refusal_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "in.csv").write_text("id\n1\n2,bad\n3\n")
    with pytest.raises(BadInputError, match="convert to arrow with on_error='skip', and that to zarr"):
        convert(tmp_path / "in.csv", tmp_path / "out", to="zarr", on_error="skip")
    assert not (tmp_path / "out").exists()
    assert convert(tmp_path / "in.csv", tmp_path / "clean", on_error="skip").num_errors == 1
    convert(tmp_path / "clean", tmp_path / "out", to="zarr", fields=["id"])
    assert [int(sample["id"]) for sample in open_dataset(tmp_path / "out")] == [1, 3]


@pytest.mark.parametrize("name", ["a/b", "..", "__hidden", "zarr.json"])
def test_a_name_that_no_array_can_have_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInputError, match="an array called"):
        convert([{name: 1}], tmp_path / "out", to="zarr")


def test_compression_is_chosen_by_measurement(tmp_path: Path) -> None:
    convert(({"x": np.zeros(1000)} for _ in range(20)), tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out", to="zarr", compression="auto")
    assert sum(map(len, tree(tmp_path / "out" / "x" / "c").values())) < 2000


def test_a_missing_object_of_ours_is_an_error_and_no_fill_value(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", to="zarr", fields=["label", "half"], block_size_bytes=100, shard_size_bytes=200)
    (tmp_path / "out" / "half" / "c" / "1").unlink()
    with pytest.raises(CorruptError, match=r"shard \(1,\) of array 'half' is missing: .*half/c/1"):
        open_dataset(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "half")
    with pytest.raises(CorruptError, match="has no array 'half'"):
        open_dataset(tmp_path / "out")


def test_a_flipped_byte_of_any_chunk_is_found(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", to="zarr", fields=["label", "name"], block_size_bytes=200)
    for name in ("label", "name"):
        file = tmp_path / "out" / name / "c" / "0"
        data = bytearray(file.read_bytes())
        data[5] ^= 1
        file.write_bytes(data)
        with pytest.raises(CorruptError, match=rf"chunk \(0,\) of array '{name}'.*checksum"):
            open_dataset(tmp_path / "out").get_batch([0])
        data[5] ^= 1
        file.write_bytes(data)


def test_zarr_sees_nothing_unknown_in_the_metadata(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", to="zarr", compression="zstd", fields=["volume", "label"])
    for name in ("volume", "label"):
        content = json.loads((tmp_path / "out" / name / "zarr.json").read_text())
        theirs = json.loads(json.dumps(library(tmp_path / "out")[name].metadata.to_dict()))
        assert theirs["codecs"] == content["codecs"]


def test_groups_are_written_to_and_read_from_memory(source: Path) -> None:
    url = "memory://zarr-target/set"
    convert(source, url, to="zarr", fields=["label", "volume"], workers=0, **SIZES)
    dataset = open_dataset(url)
    assert dataset.get_batch(range(COUNT))["label"].tolist() == [-number for number in range(COUNT)]
    np.testing.assert_array_equal(dataset[9]["volume"], sample(9)["volume"])


def test_chunks_are_kept_by_a_cache(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", to="zarr", fields=["label", "volume"], workers=0, **SIZES)
    dataset = open_dataset(tmp_path / "out", cache=CacheConfig((TierConfig("ram", 64 << 20),)), buffer_bytes=0)
    try:
        np.testing.assert_array_equal(dataset[9]["volume"], sample(9)["volume"])
        block = int(dataset.index.locate(np.array([9]))[0][0])
        pieces = fetch_blocks(dataset.reader, dataset.index, [block])[0]
        assert "origin" not in {piece.source for piece in pieces}
        assert [len(piece.view) for piece in pieces] == [ref.length for ref in dataset.index.block_refs(block)]
        np.testing.assert_array_equal(dataset[9]["volume"], sample(9)["volume"])
    finally:
        dataset.reader.close()


def test_the_command_writes_chosen_fields(source: Path, tmp_path: Path) -> None:
    arguments = ["convert", str(source), str(tmp_path / "out"), "--to", "zarr", "--fields", "label,name", "--quiet"]
    result = CliRunner().invoke(main, [*arguments, "--compression", "zstd"])
    assert result.exit_code == 0, result.output
    assert open_dataset(tmp_path / "out").schema.names == ["label", "name"]
    assert CliRunner().invoke(main, ["verify", str(tmp_path / "out")]).exit_code == 0
