"""Boxes of arrays, and how little is read for them."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.access import open_reader
from cache.keys import BlockRef
from cache.reader import BlockData
from connectors.errors import BadInputError, ChangedError, CorruptError
from dataflow import DataLoader
from dataflow.convert import convert
from dataflow.dataset import Dataset, open_dataset
from dataflow.formats import open_source, tensor_field
from dataflow.formats.arrow import ShardWriter
from dataflow.formats.arrow.cropping import _runs, _strides
from dataflow.testing import CountingReader
from dataflow.transforms import ArrayCrop, Cast, CroppedDataset, TransformedDataset
from dataflow.transforms.epoch import reading_epoch

COUNT = 6
SHAPE = (64, 80, 96)
SCHEMA = pa.schema(
    [
        pa.field("label", pa.int64(), nullable=False),
        tensor_field("volume", np.uint8, SHAPE),
        tensor_field("mask", np.uint8, SHAPE),
        tensor_field("flat", np.int16, (3,)),
    ]
)


def sample(number: int) -> dict[str, Any]:
    volume = np.random.default_rng(number).integers(0, 256, SHAPE, np.uint8)
    return {"label": number, "volume": volume, "mask": 255 - volume, "flat": np.full(3, number, np.int16)}


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("native") / "set"
    with ShardWriter(path, SCHEMA, block_size_bytes=1 << 21, shard_size_bytes=3 << 20) as writer:
        for number in range(COUNT):
            writer.write(sample(number))
    return path


@pytest.fixture(scope="module")
def arrays(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zarr") / "set"
    convert(native, path, to="zarr", block_size_bytes=8 * 10 * 12, shard_size_bytes=1 << 21, workers=0)
    assert zarr.open_group(path, mode="r")["volume"].chunks == (1, 8, 10, 12)
    return path


@pytest.fixture(params=["native", "arrays"])
def path(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def counted(path: Path, **options: Any) -> tuple[Dataset, CountingReader]:
    reader = CountingReader(open_reader(path))
    dataset = Dataset(open_source(f"file://{path}", reader), reader, **{"buffer_bytes": 0} | options)
    reader.requests.clear()
    return dataset, reader


def read_bytes(reader: CountingReader) -> int:
    return sum(ref.length for refs in reader.requests for ref in refs)


def test_boxes_are_those_of_the_whole(path: Path) -> None:
    crop = ArrayCrop("volume", (16, 20, 30), start=(8, 5, 50))
    dataset = CroppedDataset(open_dataset(path), [crop])
    assert len(dataset) == COUNT
    assert dataset.schema.names == SCHEMA.names
    assert dataset.schema.field("volume").type.shape == [16, 20, 30]
    numbers = [4, -1, 0, 4]
    columns = dataset.get_batch(numbers)
    assert list(columns) == SCHEMA.names
    for place, number in enumerate(numbers):
        expected = sample(number % COUNT)
        np.testing.assert_array_equal(columns["volume"][place], expected["volume"][8:24, 5:25, 50:80])
        np.testing.assert_array_equal(columns["mask"][place], expected["mask"])
        assert columns["label"][place] == number % COUNT
    assert columns["volume"].flags.owndata
    np.testing.assert_array_equal(dataset[2]["volume"], sample(2)["volume"][8:24, 5:25, 50:80])


def test_of_zarr_only_the_chunks_that_a_box_touches_are_read(arrays: Path) -> None:
    whole, reader = counted(arrays, columns=["volume"])
    dataset = CroppedDataset(whole, [ArrayCrop("volume", (8, 10, 12), start=(8, 20, 24))])
    dataset.get_batch([3])
    assert [ref.length for ref in reader.requests[-1]] == [8 * 10 * 12 + 4]  # and a checksum
    reader.requests.clear()
    CroppedDataset(whole, [ArrayCrop("volume", (8, 10, 12), start=(9, 20, 24))]).get_batch([3, 5])
    assert sum(map(len, reader.requests)) == 2 * 2


def test_of_native_tensors_only_the_rows_of_a_box_are_read(native: Path) -> None:
    whole, reader = counted(native)
    row_bytes = 80 * 96
    dataset = CroppedDataset(whole.select(["volume"]), [ArrayCrop("volume", (16, 80, 96), start="center")])
    dataset.get_batch([1, 5])
    assert [ref.length for ref in reader.requests[-1]] == [16 * row_bytes] * 2
    assert dataset.index.ranges.length.sum() == 0  # nothing else is read
    # Fewer rows of a plane are not worth a request of their own.
    CroppedDataset(whole.select(["volume"]), [ArrayCrop("volume", (4, 8, 96), start="center")]).get_batch([1])
    assert [ref.length for ref in reader.requests[-1]] == [3 * row_bytes + 8 * 96]


class CopyingReader(CountingReader):
    """Every block in memory of its own, as a cache hands them out."""

    def read_blocks(self, refs: Sequence[BlockRef]) -> list[BlockData]:
        found = super().read_blocks(refs)
        return [BlockData(memoryview(bytes(data.view)), data.source) for data in found]


@pytest.mark.parametrize("kind", [CountingReader, CopyingReader])
@pytest.mark.parametrize(
    ("box", "requests"),
    [
        # Of planes of 300 KB: as many as fit into a request, all of them, and one for each.
        ((30, 300, 600), [27 * 300_000 + 180_000, 300_000 + 180_000]),
        ((3, 300, 600), [2 * 300_000 + 180_000]),
        ((3, 50, 600), [30_000] * 3),
    ],
)
def test_runs_of_a_box_share_requests_where_little_lies_between(
    tmp_path: Path, kind: type[CountingReader], box: tuple[int, int, int], requests: list[int]
) -> None:
    volumes = np.random.default_rng(0).integers(0, 256, (2, 40, 500, 600), np.uint8)
    with ShardWriter(tmp_path / "set", pa.schema([tensor_field("volume", np.uint8, (40, 500, 600))])) as writer:
        for volume in volumes:
            writer.write({"volume": volume})
    reader = kind(open_reader(tmp_path / "set"))
    whole = Dataset(open_source(f"file://{tmp_path / 'set'}", reader), reader, buffer_bytes=0)
    boxes = CroppedDataset(whole, [ArrayCrop("volume", box, start=(7, 150, 0))]).get_batch([1, 0])["volume"]
    assert [ref.length for ref in reader.requests[-1]] == requests * 2
    expected = volumes[::-1, 7 : 7 + box[0], 150 : 150 + box[1]]
    np.testing.assert_array_equal(boxes, expected)


def test_all_boxes_of_a_batch_are_one_request(path: Path) -> None:
    whole, reader = counted(path, columns=["volume", "mask"])
    crops = [ArrayCrop("volume", (8, 20, 20)), ArrayCrop("mask", (4, 20, 20))]
    CroppedDataset(whole, crops).get_batch(range(COUNT))
    assert len([refs for refs in reader.requests if refs]) == 1
    assert read_bytes(reader) < COUNT * 2 * 64 * 80 * 96 / 3


def test_random_boxes_belong_to_seed_epoch_and_sample(path: Path) -> None:
    crop = ArrayCrop("volume", (8, 20, 20))
    dataset = CroppedDataset(open_dataset(path, columns=["volume"]), [crop], seed=3)
    whole = [dataset[number]["volume"] for number in range(COUNT)]
    np.testing.assert_array_equal(dataset.get_batch([5, 1])["volume"], [whole[5], whole[1]])
    again = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(again[2]["volume"], whole[2])
    with reading_epoch(1):
        assert not np.array_equal(dataset[2]["volume"], whole[2])
    other = CroppedDataset(open_dataset(path, columns=["volume"]), [crop], seed=4)
    assert not np.array_equal(other[2]["volume"], whole[2])


def test_a_volume_and_its_mask_get_the_same_box(path: Path) -> None:
    crops = [ArrayCrop("volume", (8, 20, 20)), ArrayCrop("mask", (8, 20, 20))]
    columns = CroppedDataset(open_dataset(path), crops).get_batch(range(COUNT))
    np.testing.assert_array_equal(columns["volume"], 255 - columns["mask"])


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_what_cannot_be_read_by_boxes_is_read_whole_and_cut(native: Path, tmp_path: Path, compression: str) -> None:
    convert(native, tmp_path / "set", compression=compression, fields=["volume", "flat"], workers=0)
    crops = [ArrayCrop("volume", (60, 80, 96), start=(2, 0, 0)), ArrayCrop("flat", (2,), start=(1,))]
    dataset = CroppedDataset(open_dataset(tmp_path / "set"), crops)
    columns = dataset.get_batch([4, 2])
    for place, number in enumerate([4, 2]):
        np.testing.assert_array_equal(columns["volume"][place], sample(number)["volume"][2:62])
        assert columns["flat"][place].tolist() == [number, number]


def test_formats_of_records_are_read_whole_and_cut(native: Path, tmp_path: Path) -> None:
    convert(native, tmp_path / "set", to="mds", fields=["volume", "label"], workers=0)
    dataset = CroppedDataset(open_dataset(tmp_path / "set"), [ArrayCrop("volume", (4, 4, 4), start=(1, 2, 3))])
    np.testing.assert_array_equal(dataset[5]["volume"], sample(5)["volume"][1:5, 2:6, 3:7])
    assert dataset[5]["label"] == 5


def test_windows_of_zarr_are_cropped_along_their_own_axis_too(tmp_path: Path) -> None:
    data = np.arange(40 * 6 * 5, dtype="i4").reshape(40, 6, 5)
    array = zarr.create_array(tmp_path / "set", shape=data.shape, chunks=(3, 2, 2), shards=(9, 6, 6), dtype="i4")
    array[...] = data
    array[30:33] = 0  # chunks of nothing but the fill value, which zarr leaves out
    whole = open_dataset(tmp_path / "set", format="zarr:window=8,stride=4")
    dataset = CroppedDataset(whole, [ArrayCrop("data", (3, 2, 4), start=(4, 3, 1))])
    columns = dataset.get_batch(range(len(dataset)))["data"]
    expected = [array[4 * at + 4 : 4 * at + 7, 3:5, 1:5] for at in range(len(dataset))]
    np.testing.assert_array_equal(columns, expected)


def test_a_loader_writes_boxes_into_its_batches(path: Path) -> None:
    cropped = CroppedDataset(open_dataset(path, columns=["volume", "label"]), [ArrayCrop("volume", (4, 20, 20))])
    dataset = TransformedDataset(cropped, Cast("volume", "float32"))
    loader = DataLoader(dataset, batch_size=2)
    first = [batch["volume"].numpy() for batch in loader]
    second = [batch["volume"].numpy() for batch in loader]
    assert first[0].shape == (2, 4, 20, 20)
    assert first[0].dtype == np.float32
    np.testing.assert_array_equal(np.concatenate(first), cropped.get_batch(range(COUNT))["volume"])
    assert not np.array_equal(np.concatenate(first), np.concatenate(second))  # the next epoch


def test_a_shard_that_changed_is_an_error(native: Path, tmp_path: Path) -> None:
    convert(native, tmp_path / "set", fields=["volume"], workers=0)
    crop = [ArrayCrop("volume", (4, 80, 96))]
    dataset = CroppedDataset(open_dataset(tmp_path / "set"), crop)
    dataset[0]
    file = tmp_path / "set" / "shard-00000.arrow"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + b"x")
    with pytest.raises(ChangedError, match="shard-00000"):
        dataset[0]
    dataset = CroppedDataset(open_dataset(tmp_path / "set"), crop)
    file.write_bytes(data[:-1])
    with pytest.raises(ChangedError, match="the index says"):
        dataset[0]


def test_a_damaged_chunk_in_a_box_is_named(arrays: Path, tmp_path: Path) -> None:
    convert(arrays, tmp_path / "set", to="zarr", fields=["volume"], block_size_bytes=960, workers=0)
    file = tmp_path / "set" / "volume" / "c" / "0" / "0" / "0" / "0"
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    dataset = open_dataset(tmp_path / "set")
    with pytest.raises(CorruptError, match=r"chunk \(0, 0, 0, 0\) of array 'volume'"):
        CroppedDataset(dataset, [ArrayCrop("volume", (1, 1, 1), start=(0, 0, 0))])[0]
    assert CroppedDataset(dataset, [ArrayCrop("volume", (1, 1, 1), start=(9, 0, 0))])[0]["volume"].shape == (1, 1, 1)


@pytest.mark.parametrize(
    ("crop", "message"),
    [
        (lambda: ArrayCrop("volume", ()), "a size along every axis"),
        (lambda: ArrayCrop("volume", (0, 1, 1)), "a size along every axis"),
        (lambda: ArrayCrop("volume", (1, 1, 1), start="first"), "start must be"),  # type: ignore[arg-type]
        (lambda: ArrayCrop("volume", (1, 1, 1), start=(0, 0)), "start must be 3 places"),
        (lambda: ArrayCrop("volume", (1, 1, 97)), "does not lie inside"),
        (lambda: ArrayCrop("volume", (1, 1, 1), start=(0, 0, 96)), "does not lie inside"),
        (lambda: ArrayCrop("volume", (1, 1)), "does not lie inside"),
        (lambda: ArrayCrop("label", (1,)), "boxes are cut from tensors"),
        (lambda: ArrayCrop("depth", (1,)), "no field 'depth'"),
    ],
)
def test_crops_that_do_not_fit_are_refused(native: Path, crop: Any, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        CroppedDataset(open_dataset(native), [crop()])


def test_numbers_and_fields_are_checked(native: Path) -> None:
    crop = ArrayCrop("volume", (1, 1, 1))
    with pytest.raises(BadInputError, match="different fields"):
        CroppedDataset(open_dataset(native), [crop, crop])
    with pytest.raises(BadInputError, match="different fields"):
        CroppedDataset(open_dataset(native), [])
    dataset = CroppedDataset(open_dataset(native), [crop])
    with pytest.raises(IndexError, match="sample 6 is out of range"):
        dataset.get_batch([6])
    assert dataset.get_batch([])["volume"].shape == (0, 1, 1, 1)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_runs_cover_a_box(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=3))
    box = [data.draw(st.integers(1, size)) for size in shape]
    item_bytes = data.draw(st.sampled_from([1, 8, 4096]))
    depth, run_bytes = _runs(shape, box, item_bytes)
    strides = _strides(shape, item_bytes)
    last = sum((size - 1) * stride for size, stride in zip(box[depth:], strides[depth:], strict=True))
    assert run_bytes == last + item_bytes
    assert run_bytes * int(np.prod(box[:depth])) <= item_bytes * int(np.prod(shape))
