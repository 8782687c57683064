"""The map-style dataset over native shards."""

import io
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, features

from cache.access import open_reader
from connectors.errors import BadInputError, CorruptError, NotFoundError
from dataflow.convert import convert
from dataflow.dataset import Dataset, open_dataset
from dataflow.dataset.dataset import in_block_order
from dataflow.formats import image_field, open_source, tensor_field
from dataflow.formats.arrow import ShardWriter
from dataflow.observe.stages import Recorder
from dataflow.testing import CountingReader

SCHEMA = pa.schema(
    [
        tensor_field("wide", np.uint16, (1024,)),
        tensor_field("matrix", np.float32, (2, 3)),
        pa.field("number", pa.int64()),
        pa.field("flag", pa.bool_()),
        pa.field("text", pa.string()),
        pa.field("data", pa.large_binary()),
        pa.field("list", pa.list_(pa.int32())),
        pa.field("pair", pa.struct([("a", pa.int8())])),
        pa.field("when", pa.timestamp("us", "UTC")),
        image_field("image"),
    ]
)
COUNT = 200


def sample(number: int) -> dict:
    return {
        "wide": np.full(1024, number, np.uint16),
        "matrix": np.full((2, 3), number, np.float32),
        "number": number,
        "flag": number % 3 == 0,
        "text": f"é{number}" if number % 4 else None,
        "data": b"\0" * (number % 7) if number % 5 else None,
        "list": list(range(number % 6)) if number % 9 else None,
        "pair": {"a": number % 100},
        "when": number * 1_000_000,
        "image": np.full((4, 5), number, np.uint8),
    }


def assert_same(actual: dict, number: int) -> None:
    expected = sample(number)
    assert actual.keys() == expected.keys()
    for name in ("wide", "matrix", "image"):
        assert actual[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(actual[name], expected[name])
    for name in ("number", "flag", "text", "data", "pair"):
        assert actual[name] == expected[name]
    assert actual["when"] == np.datetime64(expected["when"], "us")
    if expected["list"] is None:
        assert actual["list"] is None
    else:
        assert actual["list"].dtype == np.int32
        assert actual["list"].tolist() == expected["list"]


@pytest.fixture(scope="module", params=["none", "lz4", "zstd"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("dataset") / "set"
    settings = {"block_size_bytes": 15_000, "shard_size_bytes": 15_000, "compression": request.param}
    with ShardWriter(path, SCHEMA, **settings) as writer:
        for number in range(COUNT):
            writer.write(sample(number))
    return str(path)


@pytest.fixture
def dataset(url: str) -> Dataset:
    return open_dataset(url)


def counted(url: str, **options: int) -> tuple[Dataset, CountingReader]:
    reader = CountingReader(open_reader(url))
    return Dataset(open_source(f"file://{url}", reader), reader, **{"buffer_bytes": 1 << 20} | options), reader


def test_every_sample_comes_back(dataset: Dataset) -> None:
    assert len(dataset) == COUNT
    assert dataset.index.num_blocks > 5
    assert len(dataset.index.shards) > 1
    for number, actual in enumerate(dataset):
        assert_same(actual, number)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(numbers=st.lists(st.integers(-COUNT, COUNT - 1), max_size=80))
def test_a_batch_has_the_samples_in_the_order_asked(dataset: Dataset, numbers: list[int]) -> None:
    batch = dataset.__getitems__(numbers)
    assert len(batch) == len(numbers)
    for actual, number in zip(batch, numbers, strict=True):
        assert_same(actual, number % COUNT)


@pytest.mark.parametrize("numbers", [range(COUNT), list(range(COUNT))[::-1], [7] * 30, range(0, COUNT, 3)])
def test_whole_and_repeated_batches(dataset: Dataset, numbers: list[int]) -> None:
    for actual, number in zip(dataset.__getitems__(numbers), numbers, strict=True):
        assert_same(actual, number)


@pytest.mark.parametrize("distance", [0, 1, 63, 65_535, 65_536, 1 << 40])
@pytest.mark.parametrize("length", [512, 513, 4096])
def test_samples_are_grouped_by_block_whatever_the_blocks_numbers(length: int, distance: int) -> None:
    drawn = np.random.default_rng(length).integers(0, distance, length, endpoint=True)
    block = np.append(drawn[2:], [0, distance]) + 70_000
    places = in_block_order(block).tolist()
    assert places == sorted(range(length), key=lambda place: (block[place], place))


def test_arrays_are_writable_and_owned(dataset: Dataset) -> None:
    for numbers in ([0, 1, 2], [2, 150, 1], [5]):
        before = dataset.get_batch(numbers)
        for name, column in before.items():
            if isinstance(column, np.ndarray):
                assert column.flags.owndata, name
                column[...] = np.zeros((), column.dtype)
            elif name == "list":
                for value in column:
                    if value is not None:
                        value[...] = -1
        for actual, number in zip(dataset.__getitems__(numbers), numbers, strict=True):
            assert_same(actual, number)


def test_a_batch_is_written_where_the_caller_says(dataset: Dataset) -> None:
    slots: dict[str, np.ndarray] = {}

    def allocate(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        assert name not in slots
        slots[name] = np.full(shape, 1, dtype)
        return slots[name]

    columns = dataset.get_batch([3, 199, 4], allocate)
    assert slots.keys() == {"wide", "matrix", "number", "flag", "when", "image"}
    for name, slot in slots.items():
        assert columns[name] is slot
    assert slots["number"].tolist() == [3, 199, 4]


@pytest.mark.parametrize("numbers", [[0, 1, 2], [150, 3, 150, -1, 77], [5], []])
def test_numbers_are_cast_where_the_array_given_is_wider(dataset: Dataset, numbers: list[int]) -> None:
    wider = {"wide": np.int64, "matrix": np.float64, "number": np.float64, "flag": np.uint8}
    given = dataset.get_batch(numbers, lambda name, shape, dtype: np.empty(shape, wider.get(name, dtype)))
    plain = dataset.get_batch(numbers)
    for name, dtype in wider.items():
        assert given[name].dtype == dtype
        np.testing.assert_array_equal(given[name], plain[name])


def test_a_batch_is_one_request_and_a_block_is_decoded_once(url: str) -> None:
    dataset, reader = counted(url)
    dataset.get_batch([199, 0, 100, 1, 198])
    assert len(reader.requests) == 1
    assert (
        len(reader.requests[0])
        == len(set(reader.requests[0]))
        == len({*dataset.index.locate(np.array([0, 100, 199]))[0]})
    )
    dataset.get_batch([0, 100, 199])
    assert len(reader.requests) == 1


def test_reading_in_order_fetches_each_block_once(url: str) -> None:
    dataset, reader = counted(url)
    for number in range(COUNT):
        assert dataset[number]["number"] == number
    assert len(reader.requests) == dataset.index.num_blocks


def test_blocks_beyond_the_limit_are_let_go(url: str) -> None:
    dataset, reader = counted(url, buffer_bytes=0)
    dataset.get_batch([0])
    dataset.get_batch([0])
    assert len(reader.requests) == 2


def test_the_newest_block_stays_however_large_it_is(url: str) -> None:
    dataset, reader = counted(url, buffer_bytes=1)
    for number, requests in [(0, 1), (1, 1), (COUNT - 1, 2), (COUNT - 2, 2), (0, 3)]:
        dataset.get_batch([number])
        assert len(reader.requests) == requests


def test_the_recorder_learns_where_blocks_came_from(url: str) -> None:
    dataset = open_dataset(url)
    with Recorder() as recorder:
        dataset.get_batch([0, 199])
    assert recorder.counts["blocks.in_place"] == 2
    assert recorder.counts["bytes.in_place"] == sum(dataset.index.blocks.length[[0, -1]])
    assert recorder.seconds.keys() == {"fetch", "fetch.in_place", "decode"}


def test_columns_choose_fields_and_their_order(url: str) -> None:
    dataset = open_dataset(url, columns=["text", "number"])
    assert dataset.schema.names == ["text", "number"]
    assert list(dataset[1].items()) == [("text", "é1"), ("number", 1)]
    assert dataset.fingerprint == open_dataset(url).fingerprint


@pytest.mark.parametrize("columns", [["number", "nothing"], ["number", "number"], "number"])
def test_wrong_columns_are_refused(url: str, columns: list[str]) -> None:
    with pytest.raises(BadInputError, match="columns"):
        open_dataset(url, columns=columns)


@pytest.mark.parametrize("number", [COUNT, -COUNT - 1, 2**64 - 1])
def test_a_number_out_of_range_is_an_index_error(dataset: Dataset, number: int) -> None:
    whole = np.array([0, number], np.uint64 if number > 0 else np.int64)
    for read in (lambda: dataset[number], lambda: dataset.__getitems__(whole)):
        with pytest.raises(IndexError, match=rf"sample {number} is out of range for a dataset of {COUNT} samples"):
            read()


@pytest.mark.parametrize("numbers", [[0.0], [True], ["a"], [[1]]])
def test_what_is_no_list_of_numbers_is_a_type_error(dataset: Dataset, numbers: list) -> None:
    with pytest.raises(TypeError, match="sample numbers must be a sequence of integers"):
        dataset.get_batch(numbers)


def test_one_number_must_be_an_integer(dataset: Dataset) -> None:
    assert dataset[np.int32(3)]["number"] == 3
    with pytest.raises(TypeError, match="integer"):
        dataset["3"]


def test_an_empty_batch_has_every_column(dataset: Dataset) -> None:
    batch = dataset.__getitems__([])
    assert len(batch) == 0
    assert batch.columns["wide"].shape == (0, 1024)
    assert batch.columns["text"] == []


def test_a_pickled_dataset_reads_the_same(dataset: Dataset) -> None:
    dataset[0]
    copy = pickle.loads(pickle.dumps(dataset))
    assert_same(copy[150], 150)
    assert copy.fingerprint == dataset.fingerprint


def test_a_forked_child_reads_on_while_a_thread_of_its_parent_was_reading(url: str) -> None:
    dataset = open_dataset(url)
    guard = dataset._buffer._guard()
    guard.acquire()  # as a reading thread would hold it at the moment of the fork
    try:
        child = os.fork()
        if child == 0:
            os._exit(0 if dataset[5]["number"] == 5 else 1)
    finally:
        guard.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_spawned_child_reads_the_same(url: str) -> None:
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer)[42]['number'])"
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(open_dataset(url)), capture_output=True, check=True
    )
    assert done.stdout == b"42\n"


def test_threads_share_a_dataset(url: str) -> None:
    dataset = open_dataset(url, buffer_bytes=100_000)
    wrong: list[int] = []

    def read(seed: int) -> None:
        batches = np.random.default_rng(seed).integers(0, COUNT, (20, 16))
        wrong.extend(seed for numbers in batches if (dataset.get_batch(numbers)["number"] != numbers).any())

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_null_in_a_fixed_width_field_names_field_and_sample(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "set", pa.schema([("number", pa.int64()), ("text", pa.string())])) as writer:
        for number in range(10):
            writer.write({"number": None if number == 7 else number, "text": None})
    dataset = open_dataset(tmp_path / "set")
    assert dataset.get_batch([8, 3])["number"].tolist() == [8, 3]
    for numbers in ([7], [9, 7, 1], list(range(10)), list(range(9, -1, -1))):
        with pytest.raises(BadInputError, match="field 'number' of sample 7 is null"):
            dataset.get_batch(numbers)
    assert open_dataset(tmp_path / "set", columns=["text"])[7] == {"text": None}


@given(numbers=st.permutations(range(40)))
@settings(max_examples=10)
def test_a_null_is_named_wherever_it_lies_in_blocks_and_batch(
    numbers: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("nulls") / "set"
    with ShardWriter(folder, pa.schema([("number", pa.int64())]), block_size_bytes=64) as writer:
        for number in range(40):
            writer.write({"number": None if number == 27 else number})
    dataset = open_dataset(folder)
    assert dataset.index.num_blocks > 3
    with pytest.raises(BadInputError, match="field 'number' of sample 27 is null"):
        dataset.get_batch(numbers)


def test_a_null_inside_a_list_names_the_field(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "set", pa.schema([("tokens", pa.list_(pa.int64()))])) as writer:
        writer.write({"tokens": [1, None]})
    with pytest.raises(BadInputError, match="field 'tokens' has nulls inside its lists"):
        open_dataset(tmp_path / "set")[0]


def test_a_damaged_image_is_named_whether_its_header_can_be_read_or_not(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8)).save(file, "png")
    files = [file.getvalue()] * 3 + [file.getvalue()[:800], b"no image"]
    with ShardWriter(tmp_path / "set", pa.schema([image_field("image")])) as writer:
        for content in files:
            writer.write({"image": content})
    dataset = open_dataset(tmp_path / "set")
    for damaged in (3, 4):
        with pytest.raises(CorruptError, match=f"field 'image' of sample {damaged} is not a readable image"):
            dataset.get_batch([2, damaged, 0])


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_a_damaged_avif_file_is_damaged(tmp_path: Path) -> None:
    """Pillow raises RuntimeError for it."""
    file = io.BytesIO()
    Image.new("RGB", (24, 24)).save(file, "avif")
    with ShardWriter(tmp_path / "set", pa.schema([image_field("image")])) as writer:
        writer.write({"image": file.getvalue().replace(b"av01", b"av02")})
    with pytest.raises(CorruptError, match="field 'image' of sample 0 is not a readable image"):
        open_dataset(tmp_path / "set")[0]


@pytest.mark.parametrize("numbers", [[2], [0, 2, 1], [2, 0, 2, 1, 0, 1, 0, 1, 0, 1, 0]])
def test_text_that_is_no_utf8_names_field_and_sample(tmp_path: Path, numbers: list[int]) -> None:
    offsets, data = np.array([0, 2, 4, 6], np.int32), b"abcd\xff\xfe"
    column = pa.Array.from_buffers(pa.string(), 3, [None, pa.py_buffer(offsets), pa.py_buffer(data)])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    dataset = open_dataset(tmp_path)
    assert dataset.get_batch([1, 0, 1]) == {"text": ["cd", "ab", "cd"]}
    with pytest.raises(CorruptError, match="field 'text' of sample 2 is no UTF-8"):
        dataset.get_batch(numbers)


def test_nothing_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        open_dataset(tmp_path / "nowhere")


def test_an_empty_or_foreign_folder_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nothing at"):
        open_dataset(tmp_path)
    (tmp_path / "notes.xyz").write_text("hello")
    with pytest.raises(BadInputError, match=r"no dataset at .*, where notes\.xyz lies; `dataflow formats`"):
        open_dataset(tmp_path)
    with pytest.raises(BadInputError, match="no format is called 'nothing'"):
        open_dataset(tmp_path, format="nothing")
    (tmp_path / "tokens.npy").write_bytes(b"")
    with pytest.raises(BadInputError, match=r"where notes\.xyz lies beside 1 more; .*write_columns"):
        open_dataset(tmp_path)


def test_datasets_below_a_folder_are_named_to_who_opens_the_folder(tmp_path: Path) -> None:
    convert(({"n": n} for n in range(100)), tmp_path / "set", split={"train": 0.9, "val": 0.1})
    with pytest.raises(BadInputError, match=r"no dataset at .*/set,.*; native datasets lie below it, .*: train, val$"):
        open_dataset(tmp_path / "set")
