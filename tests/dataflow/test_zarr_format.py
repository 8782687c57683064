"""Zarr 3, against zarr-python: what it writes is read here, and only the chunks that are needed."""

import json
import shutil
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, TransposeCodec, ZstdCodec
from zarr.metadata.migrate_v3 import migrate_v2_to_v3

from cache.access import open_reader
from connectors.errors import BadInputError, ChangedError, CorruptError, DataError, NotFoundError
from dataflow.dataset import Dataset, open_dataset
from dataflow.formats import open_source
from dataflow.formats.zarr import ZarrFormat
from dataflow.loaders.announcer import block_table
from dataflow.testing import CountingReader

ROWS = 23


def numbers(*shape: int, dtype: str = "f4") -> np.ndarray:
    return (np.arange(np.prod(shape)) % 251).reshape(shape).astype(dtype)


def put(path: Path, data: np.ndarray, **options: Any) -> zarr.Array:
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {"shape": data.shape, "dtype": data.dtype, "chunks": (4, *data.shape[1:])} | options
    array = zarr.create_array(path, **settings)
    array[...] = data
    return array


def group(path: Path, **fields: np.ndarray) -> Path:
    zarr.create_group(path)
    for name, data in fields.items():
        put(path / name, data)
    return path


def counted(path: Path, **options: Any) -> tuple[Dataset, CountingReader]:
    reader = CountingReader(open_reader(path))
    dataset = Dataset(open_source(f"file://{path}", reader), reader, **{"buffer_bytes": 1 << 20} | options)
    reader.requests.clear()
    return dataset, reader


def fetched(reader: CountingReader) -> set[str]:
    """The objects that were read since, below the dataset."""
    return {ref.uri.partition("set/")[2] for refs in reader.requests for ref in refs}


CODECS = {
    "none": None,
    "zstd": ZstdCodec(level=5),
    "gzip": GzipCodec(),
    "blosc": BloscCodec(cname="lz4", shuffle="bitshuffle"),
    "crc32c": Crc32cCodec(),
    "two": [ZstdCodec(checksum=True), Crc32cCodec()],
}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("sharded", [False, True])
def test_what_zarr_writes_comes_back(tmp_path: Path, codec: str, sharded: bool) -> None:
    data = numbers(ROWS, 6, 5)
    put(tmp_path / "set", data, chunks=(2, 3, 5), shards=(6, 6, 5) if sharded else None, compressors=CODECS[codec])
    dataset = open_dataset(tmp_path / "set")
    assert dataset.source.format == "zarr"
    assert dataset.schema.names == ["data"]
    np.testing.assert_array_equal(dataset.get_batch(range(ROWS))["data"], data)
    np.testing.assert_array_equal(dataset.get_batch([22, 3, 3, -1])["data"], data[[22, 3, 3, -1]])
    assert dataset.get_batch([1])["data"].flags.owndata


@pytest.mark.parametrize("dtype", ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8"])
@pytest.mark.parametrize("shape", [(ROWS,), (ROWS, 3)])
def test_every_type_of_number_comes_back(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    data = numbers(*shape, dtype=dtype)
    put(tmp_path / "set", data)
    column = open_dataset(tmp_path / "set").get_batch(range(ROWS))["data"]
    assert column.dtype == data.dtype
    np.testing.assert_array_equal(column, data)


@pytest.mark.parametrize("sharded", [False, True])
def test_text_and_bytes_come_back(tmp_path: Path, sharded: bool) -> None:
    texts = np.array(["é" * (number % 4) for number in range(ROWS)], dtype=object)
    parts = np.array([b"\0x" * (number % 4) for number in range(ROWS)], dtype=object)
    options: dict[str, Any] = {"chunks": (4,), "shards": (8,) if sharded else None}
    zarr.create_group(tmp_path / "set")
    put(tmp_path / "set" / "text", texts, dtype=str, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr says that the type has no specification yet
        put(tmp_path / "set" / "part", parts, dtype="variable_length_bytes", **options)
    dataset = open_dataset(tmp_path / "set")
    tracemalloc.start()
    columns = dataset.get_batch([*range(ROWS), 2])
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert columns["text"] == [*texts, texts[2]]
    assert columns["part"] == [*parts, parts[2]]
    assert peak_bytes < 100 << 20


@pytest.mark.parametrize(
    "options",
    [
        {"filters": [TransposeCodec(order=(2, 0, 1))]},
        {"filters": [TransposeCodec(order=(1, 2, 0)), TransposeCodec(order=(2, 1, 0))]},
        {"serializer": BytesCodec(endian="big")},
        {"chunk_key_encoding": {"name": "v2", "separator": "."}},
        {"chunk_key_encoding": {"name": "default", "separator": "."}},
        {"chunks": (5, 4, 4)},
        {"chunks": (100, 100, 100)},
        {"chunks": (2, 2, 2), "shards": (4, 6, 6)},
    ],
)
def test_other_layouts_come_back(tmp_path: Path, options: dict[str, Any]) -> None:
    data = numbers(ROWS, 6, 5, dtype="i2")
    put(tmp_path / "set", data, **options)
    np.testing.assert_array_equal(open_dataset(tmp_path / "set").get_batch(range(ROWS))["data"], data)


def test_zarr_2_is_refused_with_the_way_to_zarr_3_which_holds(tmp_path: Path) -> None:
    data = numbers(ROWS, 6)
    put(tmp_path / "set", data, zarr_format=2)
    with pytest.raises(BadInputError, match="`zarr migrate v3`"):
        open_dataset(tmp_path / "set")
    migrate_v2_to_v3(input_store=zarr.storage.LocalStore(tmp_path / "set"))
    np.testing.assert_array_equal(open_dataset(tmp_path / "set").get_batch(range(ROWS))["data"], data)


@pytest.mark.parametrize("fill", [0.0, 7.5, float("nan"), float("-inf")])
@pytest.mark.parametrize("sharded", [False, True])
def test_absent_chunks_hold_the_fill_value(tmp_path: Path, fill: float, sharded: bool) -> None:
    options = {"shape": (ROWS, 3), "chunks": (2, 3), "shards": (8, 3) if sharded else None, "fill_value": fill}
    array = zarr.create_array(tmp_path / "set", dtype="f8", **options)
    np.testing.assert_array_equal(open_dataset(tmp_path / "set").get_batch(range(ROWS))["data"], array[...])
    array[12:15] = 3
    dataset = open_dataset(tmp_path / "set")
    np.testing.assert_array_equal(dataset.get_batch(range(ROWS))["data"], array[...])
    assert len(dataset.index.ranges) == 2


def test_absent_texts_are_the_fill_value(tmp_path: Path) -> None:
    array = zarr.create_array(tmp_path / "set", shape=(9,), chunks=(3,), dtype=str, fill_value="?")
    array[3:5] = np.array(["a", ""], dtype=object)
    assert open_dataset(tmp_path / "set").get_batch(range(9))["data"] == [*"???", "a", "", *"????"]


def test_a_group_has_a_field_per_array_of_any_depth(tmp_path: Path) -> None:
    path = group(tmp_path / "set", b=numbers(ROWS, 2), a=numbers(ROWS, dtype="i8"))
    zarr.create_group(path / "deep")
    put(path / "deep" / "c", numbers(ROWS, 3))
    dataset = open_dataset(path)
    assert dataset.schema.names == ["a", "b", "deep/c"]
    assert dataset[5]["a"] == 5
    np.testing.assert_array_equal(dataset[5]["deep/c"], [15, 16, 17])


def test_arrays_of_other_lengths_are_left_out_by_choice(tmp_path: Path) -> None:
    path = group(tmp_path / "set", x=numbers(ROWS, 2), y=numbers(ROWS), lat=numbers(2))
    with pytest.raises(BadInputError, match=r"different lengths .*lat: 2, x: 23, y: 23.*zarr:arrays=lat"):
        open_dataset(path)
    assert open_dataset(path, format="zarr:arrays=y+x").schema.names == ["y", "x"]
    with pytest.raises(BadInputError, match="has no array 'z'; there are "):
        open_dataset(path, format="zarr:arrays=z")


@given(data=st.data(), rows=st.integers(0, 12), window=st.integers(1, 5), stride=st.integers(1, 6))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_windows_of_any_grid_are_those_of_numpy(
    tmp_path: Path, data: st.DataObject, rows: int, window: int, stride: int
) -> None:
    inner = [data.draw(st.integers(1, 4)) for _ in range(2)]
    shards = [step * data.draw(st.integers(1, 3)) for step in inner] if data.draw(st.booleans()) else None
    values = numbers(rows, 5)
    shutil.rmtree(tmp_path / "set", ignore_errors=True)
    put(tmp_path / "set", values, chunks=tuple(inner), shards=shards and tuple(shards))
    expected = [values[start : start + window] for start in range(0, rows - window + 1, stride)]
    dataset = open_dataset(tmp_path / "set", format=f"zarr:window={window},stride={stride}")
    assert len(dataset) == len(expected)
    order = data.draw(st.permutations(range(len(expected))))
    if order:
        np.testing.assert_array_equal(dataset.get_batch(order)["data"], np.stack([expected[at] for at in order]))
    slices = open_dataset(tmp_path / "set")
    np.testing.assert_array_equal(slices.get_batch(range(rows))["data"].reshape(rows, 5), values)


def test_windows_without_a_stride_follow_each_other(tmp_path: Path) -> None:
    path = group(tmp_path / "set", x=numbers(ROWS, 2), y=numbers(ROWS))
    put(path / "text", np.array([str(number) for number in range(ROWS)], dtype=object), dtype=str)
    dataset = open_dataset(path, format="zarr:window=5")
    assert len(dataset) == 4
    assert dataset[3]["x"].shape == (5, 2)
    assert dataset[3]["y"].tolist() == [15, 16, 17, 18, 19]
    assert dataset[3]["text"] == ["15", "16", "17", "18", "19"]
    assert dataset.fingerprint != open_dataset(path).fingerprint


def test_overlapping_windows_do_not_blow_a_block_up(tmp_path: Path) -> None:
    put(tmp_path / "set", numbers(4000, 64), chunks=(4000, 64))
    index = open_dataset(tmp_path / "set", format="zarr:window=1000,stride=1").index
    assert np.diff(index.blocks.first_sample).max() * 1000 * 64 * 4 <= 1 << 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zarr:window=0", "window of a zarr array must be >= 1"),
        ("zarr:stride=2", "stride needs a window"),
        ("zarr:window=2,stride=0", "must be >= 1, got 0"),
        ("zarr:window=many", "are numbers"),
        ("zarr:size=2", "no option 'size'"),
        ("parquet:window=2", "parquet has no options"),
        ("zarrr", "no format is called 'zarrr'"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, text: str, message: str) -> None:
    put(tmp_path / "set", numbers(ROWS))
    with pytest.raises(BadInputError, match=message):
        open_dataset(tmp_path / "set", format=text)


def test_options_are_what_the_format_says(tmp_path: Path) -> None:
    written = ZarrFormat().with_options({"window": "4", "arrays": "a+b"})
    assert written == ZarrFormat(arrays=("a", "b"), window=4)


def test_only_the_chunks_of_the_wanted_samples_are_read(tmp_path: Path) -> None:
    data = numbers(64, 300, 300)
    put(tmp_path / "set", data, chunks=(2, 300, 300), shards=(8, 300, 300), compressors=None)
    dataset, reader = counted(tmp_path / "set")
    assert dataset.index.num_blocks == 32  # a row has 360 KB, a block two of them
    np.testing.assert_array_equal(dataset.get_batch([3, 50])["data"], data[[3, 50]])
    assert len(reader.requests) == 1
    assert [ref.length for ref in reader.requests[0]] == [2 * 360_000] * 2
    assert fetched(reader) == {"c/0/0/0", "c/6/0/0"}


def test_fields_that_are_not_asked_for_are_not_fetched(tmp_path: Path) -> None:
    path = group(tmp_path / "set", image=numbers(64, 100, 100), label=numbers(64, dtype="i8"))
    dataset, reader = counted(path, columns=["label"])
    assert dataset.get_batch([9, 3])["label"].tolist() == [9, 3]
    assert {uri.partition("/")[0] for uri in fetched(reader)} == {"label"}
    whole, _ = counted(path)
    assert dataset.fingerprint == whole.fingerprint
    assert np.array_equal(dataset.index.blocks.first_sample, whole.index.blocks.first_sample)


def test_a_plan_announces_the_chunks_that_will_be_read(tmp_path: Path) -> None:
    path = group(tmp_path / "set", image=numbers(64, 100, 100), label=numbers(64, dtype="i8"))
    dataset, reader = counted(path)
    table = block_table(dataset.index)
    rows = dataset.index.pieces.rows_of(np.array([1]))  # type: ignore[union-attr]
    first = int(dataset.index.blocks.first_sample[1])
    dataset.get_batch([first])
    assert [table.ref(int(row)) for row in rows] == reader.requests[0]


def edit(path: Path, **changes: Any) -> None:
    content = json.loads((path / "zarr.json").read_text())
    (path / "zarr.json").write_text(json.dumps(content | changes))


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"zarr_format": 2}, BadInputError, "zarr_format 2"),
        ({"node_type": "table"}, CorruptError, "neither array nor group"),
        ({"data_type": "complex64"}, BadInputError, "data type 'complex64'"),
        ({"shape": "wide"}, CorruptError, "not the metadata of a zarr array"),
        ({"shape": [23]}, CorruptError, "do not fit"),
        ({"shape": [23, 0]}, BadInputError, "samples of the array 'data'"),
        ({"chunk_grid": {"name": "rectilinear", "configuration": {}}}, BadInputError, "rectilinear"),
        ({"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0, 3]}}}, CorruptError, "no size"),
        ({"chunk_key_encoding": {"name": "fancy"}}, BadInputError, "fancy"),
        ({"storage_transformers": [{}]}, BadInputError, "storage transformers"),
        ({"codecs": []}, BadInputError, "no codec"),
        ({"codecs": [{"name": "bytes"}, {"name": "lzma"}]}, BadInputError, "codec 'lzma'"),
        ({"codecs": [{"name": "transpose", "configuration": {"order": [1, 1]}}]}, BadInputError, "transposes"),
        ({"fill_value": "many"}, CorruptError, "many"),
    ],
)
def test_metadata_that_cannot_be_used_says_why(
    tmp_path: Path, changes: dict[str, Any], kind: type[DataError], message: str
) -> None:
    put(tmp_path / "set", numbers(ROWS, 3))
    edit(tmp_path / "set", **changes)
    with pytest.raises(kind, match=message):
        open_dataset(tmp_path / "set")


@pytest.mark.parametrize("content", [b"{", b'{"node_type": "\xff"}'])
def test_metadata_that_is_no_json_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = group(tmp_path / "set", x=numbers(ROWS))
    for name in ("x/zarr.json", "zarr.json"):
        (path / name).write_bytes(content)
        with pytest.raises(CorruptError, match=name):
            open_dataset(path)
    (path / "x" / "zarr.json").write_text("")
    (path / "zarr.json").write_text('{"zarr_format":3,"node_type":"group"}')
    with pytest.raises(CorruptError, match=r"x/zarr\.json is empty"):
        open_dataset(path)


def test_an_empty_group_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="without arrays"):
        open_dataset(group(tmp_path / "set"))


@pytest.mark.parametrize("codec", ["none", "zstd", "gzip", "blosc", "crc32c"])
@pytest.mark.parametrize("keep", [0, 1, 30, -1])
def test_a_truncated_chunk_is_named(tmp_path: Path, codec: str, keep: int) -> None:
    path = group(tmp_path / "set", x=numbers(ROWS))
    put(path / "y", np.random.default_rng(0).random((ROWS, 9)), compressors=CODECS[codec])
    file = path / "y" / "c" / "2" / "0"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CorruptError, match=r"chunk \(2, 0\) of array 'y'"):
        open_dataset(path).get_batch(range(ROWS))


@pytest.mark.parametrize("codec", ["zstd", "gzip", "crc32c"])
def test_a_flipped_byte_is_named(tmp_path: Path, codec: str) -> None:
    compressor = [CODECS[codec], Crc32cCodec()] if codec == "zstd" else CODECS[codec]
    put(tmp_path / "set", np.random.default_rng(0).random((ROWS, 9)), compressors=compressor)
    file = tmp_path / "set" / "c" / "1" / "0"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)
    dataset = open_dataset(tmp_path / "set")
    with pytest.raises(CorruptError, match=r"chunk \(1, 0\) of array 'data'"):
        dataset.get_batch([5])


def damage(data: bytearray, place: int) -> bytearray:
    data[place] ^= 255
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: damage(data, -1), r"table of shard \(1, 0\) of array 'data'.*checksum"),
        (lambda data: damage(data, -30), r"table of shard \(1, 0\) of array 'data'.*checksum"),
        (lambda data: data[-20:], r"shard \(1, 0\) of array 'data'.*truncated"),
        (lambda data: data[100:], r"shard \(1, 0\) of array 'data'.*outside"),
        (lambda data: bytearray(), r"shard \(1, 0\) of array 'data'.*truncated"),
    ],
)
def test_a_damaged_shard_is_named(tmp_path: Path, change: Any, message: str) -> None:
    put(tmp_path / "set", numbers(ROWS, 9), chunks=(2, 9), shards=(8, 9), compressors=None)
    file = tmp_path / "set" / "c" / "1" / "0"
    file.write_bytes(change(bytearray(file.read_bytes())))
    with pytest.raises(CorruptError, match=message):
        open_dataset(tmp_path / "set")


def test_a_chunk_that_changes_or_goes_under_the_reader_is_an_error(tmp_path: Path) -> None:
    array = put(tmp_path / "set", numbers(ROWS, 9))
    dataset = open_dataset(tmp_path / "set", buffer_bytes=0)
    file = tmp_path / "set" / "c" / "0" / "0"
    array[0] = 77
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(ChangedError, match="set/c/0/0"):
        dataset.get_batch([1])
    file.unlink()
    with pytest.raises(NotFoundError, match="set/c/0/0"):
        dataset.get_batch([1])


def test_shards_in_shards_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "set", numbers(ROWS, 9), chunks=(2, 9), shards=(8, 9))
    content = json.loads((tmp_path / "set" / "zarr.json").read_text())
    inner = json.loads(json.dumps(content["codecs"]))
    content["codecs"][0]["configuration"]["codecs"] = inner
    (tmp_path / "set" / "zarr.json").write_text(json.dumps(content))
    with pytest.raises(BadInputError, match="shards into shards"):
        open_dataset(tmp_path / "set")
