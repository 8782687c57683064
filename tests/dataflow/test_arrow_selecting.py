"""Native datasets of which only some fields are fetched."""

import pickle
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.access import open_reader
from cache.config import CacheConfig, TierConfig
from connectors.errors import ChangedError, CorruptError
from dataflow.convert import append, convert
from dataflow.dataset import Dataset, open_dataset
from dataflow.formats import image_field, open_source, tensor_field
from dataflow.formats.arrow import ShardWriter
from dataflow.formats.arrow.parts import decode_parts, part_checksums, part_ends
from dataflow.formats.arrow.rows import rows_to_batch
from dataflow.loaders.announcer import block_table
from dataflow.testing import CountingReader

COUNT = 120
SCHEMA = pa.schema(
    [
        pa.field("label", pa.int64(), nullable=False),
        image_field("image"),
        pa.field("text", pa.string()),
        tensor_field("vector", np.float32, (4,)),
        pa.field("nested", pa.list_(pa.struct([("a", pa.string()), ("b", pa.bool_())]))),
        pa.field("nothing", pa.null()),
    ]
)
KINDS = pa.schema(
    [
        pa.field("string", pa.string()),
        pa.field("null", pa.null()),
        pa.field("tensor", pa.fixed_shape_tensor(pa.float32(), (3, 2))),
        pa.field("bool", pa.bool_()),
        pa.field("lists", pa.large_list(pa.list_(pa.int8()))),
        pa.field("struct", pa.struct([("a", pa.int8()), ("b", pa.large_binary())])),
        pa.field("map", pa.map_(pa.string(), pa.int32())),
        pa.field("decimal", pa.decimal128(10, 2)),
        pa.field("fixed", pa.binary(5)),
        pa.field("when", pa.timestamp("us", "UTC")),
        pa.field("last", pa.null()),
    ]
)


def sample(number: int) -> dict:
    return {
        "label": number,
        "image": np.random.default_rng(number).integers(0, 256, (20, 20, 3), np.uint8),
        "text": f"é{number}" if number % 3 else None,
        "vector": np.full(4, number, np.float32),
        "nested": [{"a": str(number), "b": True}] * (number % 3),
        "nothing": None,
    }


@pytest.fixture(scope="module", params=["none", "lz4", "zstd"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("native") / "set"
    with ShardWriter(path, SCHEMA, block_size_bytes=30_000, shard_size_bytes=60_000, compression=request.param) as out:
        for number in range(COUNT):
            out.write(sample(number))
    return path


def counted(path: Path, *columns: str) -> tuple[Dataset, CountingReader]:
    reader = CountingReader(open_reader(path))
    source = open_source(f"file://{path}", reader)
    reader.requests.clear()
    return Dataset(source, reader, columns=columns or None, buffer_bytes=0), reader


def read_bytes(reader: CountingReader) -> int:
    return sum(ref.length for refs in reader.requests for ref in refs)


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
@given(seed=st.integers(0, 1 << 30), rows=st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_the_parts_of_a_block_are_its_fields(compression: str | None, seed: int, rows: int) -> None:
    rng = random.Random(seed)

    def maybe(value: object) -> object:
        return None if rng.random() < 0.2 else value

    samples = [
        {
            "string": maybe("é" * rng.randrange(5)),
            "null": None,
            "tensor": np.full((3, 2), number, np.float32),
            "bool": maybe(number % 2 == 0),
            "lists": maybe([[number] * rng.randrange(3)] * rng.randrange(3)),
            "struct": maybe({"a": number, "b": maybe(b"x" * rng.randrange(9))}),
            "map": maybe([("k", number)] * rng.randrange(2)),
            "decimal": None,
            "fixed": maybe(b"12345"),
            "when": maybe(number),
            "last": None,
        }
        for number in range(rows)
    ]
    batch = rows_to_batch(samples, KINDS)
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, KINDS, options=options) as writer:
        writer.write_batch(batch)
    block = memoryview(sink.getvalue())[KINDS.serialize().size : -8].cast("B")
    cut = rng.randrange(1, 60)
    pieces = [block[:cut], block[cut : cut + 300], block[cut + 300 :]]
    ends = part_ends(pieces, KINDS)
    assert ends is not None
    starts = [0, *ends[:-1]]
    assert part_checksums(pieces, ends) == [crc32c(block[start:end]) for start, end in zip(starts, ends, strict=True)]
    columns = sorted(rng.sample(range(len(KINDS)), rng.randrange(1, 5)))
    parts = [(starts[part], block[starts[part] : ends[part]]) for part in (0, *(column + 1 for column in columns))]
    found = decode_parts(KINDS, columns, parts, len(block))
    assert found.equals(batch.select([KINDS.names[column] for column in columns]))


def test_types_that_are_laid_out_in_another_way_have_no_parts() -> None:
    schema = pa.schema([("a", pa.string_view()), ("b", pa.int8())])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist([{"a": "x", "b": 1}], schema))
    assert part_ends([memoryview(sink.getvalue())[schema.serialize().size : -8].cast("B")], schema) is None


@pytest.mark.parametrize("columns", [["label"], ["vector", "label"], ["text"], ["nested", "nothing"], ["nothing"]])
def test_only_header_and_fields_of_a_block_are_fetched(path: Path, columns: list[str]) -> None:
    whole, all_requests = counted(path)
    narrow, requests = counted(path, *columns)
    assert narrow.index.num_blocks > 3
    assert len(narrow.index.shards) > 1
    assert narrow.fingerprint == whole.fingerprint
    numbers = [119, 3, 4, 60]
    expected, found = whole.get_batch(numbers), narrow.get_batch(numbers)
    assert list(found) == columns
    for name in columns:
        np.testing.assert_equal(list(found[name]), list(expected[name]))
    assert len(requests.requests) == 1
    blocks = len(all_requests.requests[0])
    assert len(requests.requests[0]) <= blocks * (1 + len(columns))
    assert read_bytes(requests) < read_bytes(all_requests) / 5


def test_most_of_a_block_is_read_as_the_block(path: Path) -> None:
    whole, _ = counted(path)
    narrow, requests = counted(path, "image", "label")
    assert narrow.index.pieces is None
    narrow.get_batch([5])
    assert requests.requests == [[whole.index.block_ref(0)]]
    assert narrow.get_batch([5])["label"].tolist() == [5]


def test_a_selection_travels_to_workers_and_is_planned(path: Path) -> None:
    narrow, _ = counted(path, "text")
    assert narrow.index.pieces is not None
    table = block_table(narrow.index)
    assert [table.ref(row) for row in range(2)] == narrow.index.block_refs(0)
    again = pickle.loads(pickle.dumps(open_dataset(path, columns=["text"])))
    assert again.get_batch([2])["text"] == ["é2"]


def test_a_damaged_field_is_found_by_its_own_checksum(path: Path, tmp_path: Path) -> None:
    convert(path, tmp_path / "set")
    dataset = open_dataset(tmp_path / "set", columns=["vector"])
    ref = dataset.index.block_refs(0)[1]
    file = tmp_path / "set" / ref.uri.rpartition("/")[2]
    data = bytearray(file.read_bytes())
    data[ref.offset] ^= 1
    file.write_bytes(data)
    with pytest.raises(ChangedError, match=rf"offset {ref.offset} .*crc32c"):
        open_dataset(tmp_path / "set", columns=["vector"]).get_batch([0])
    assert open_dataset(tmp_path / "set", columns=["label"]).get_batch([0])["label"].tolist() == [0]


def test_bytes_that_are_no_fields_are_an_error(path: Path) -> None:
    narrow, _ = counted(path, "text")
    pieces = [piece.view for piece in narrow.reader.read_blocks(narrow.index.block_refs(0))]
    with pytest.raises(CorruptError, match="fields of block 0 at offset"):
        narrow.source.decode_pieces(0, [bytes(len(pieces[0])), *pieces[1:]])  # type: ignore[attr-defined]


def test_what_was_appended_is_selected_too(path: Path, tmp_path: Path) -> None:
    convert(path, tmp_path / "set", fields=["label", "image", "text"])
    append(path, tmp_path / "set", fields=["label", "image", "text"], workers=0)
    dataset, requests = counted(tmp_path / "set", "text")
    assert dataset.get_batch([5, COUNT + 5])["text"] == ["é5", "é5"]
    assert read_bytes(requests) < 10_000


def test_datasets_of_an_earlier_release_are_read_whole(path: Path) -> None:
    reader = CountingReader(open_reader(path))
    source = open_source(f"file://{path}", reader)
    old = replace(source, index=replace(source.index, blocks=replace(source.index.blocks, parts=None)))  # type: ignore[type-var]
    dataset = Dataset(old, reader, columns=["label"], buffer_bytes=0)
    assert dataset.index.pieces is None
    assert dataset.get_batch([7])["label"].tolist() == [7]


def test_an_origin_gives_the_selected_bytes_once(path: Path) -> None:
    cache = CacheConfig((TierConfig("ram", 64 << 20),))
    with_images = open_dataset(path, cache=cache, buffer_bytes=0)
    labels = open_dataset(path, cache=cache, columns=["label"], buffer_bytes=0)
    try:
        before = labels.reader.stats()["origin"]
        for _ in range(2):
            assert labels.get_batch(range(COUNT))["label"].tolist() == list(range(COUNT))
            origin = labels.reader.stats()["origin"]
            assert origin["bytes"] - before["bytes"] == int(labels.index.ranges.length.sum())
            # Header and first field lie side by side, and are one request.
            assert origin["requests"] - before["requests"] == labels.index.num_blocks
        # Whole blocks are entries of their own.
        before = with_images.reader.stats()["origin"]
        with_images.get_batch([0])
        size_bytes = with_images.index.block_ref(0).length
        assert with_images.reader.stats()["origin"]["bytes"] - before["bytes"] == size_bytes
    finally:
        with_images.reader.close()
        labels.reader.close()


def test_conversion_fetches_the_fields_that_it_writes_and_judges(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[CountingReader] = []

    def counting(*args: object, **options: object) -> CountingReader:
        readers.append(CountingReader(open_reader(*args, **options)))  # type: ignore[arg-type]
        return readers[-1]

    monkeypatch.setattr("dataflow.dataset.opening.open_reader", counting)
    convert(path, tmp_path / "out", fields=["text"], filter="label > 10", workers=0)
    whole = int(open_dataset(path).index.blocks.length.sum())
    assert sum(map(read_bytes, readers)) < whole / 5
    assert len(open_dataset(tmp_path / "out")) == COUNT - 11
