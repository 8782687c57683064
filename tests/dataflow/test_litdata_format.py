"""LitData chunks, written by the library (tests/dataflow/data)."""

import itertools
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from connectors.errors import BadInputError, CorruptError, DataError
from dataflow.convert import convert
from dataflow.dataset import open_dataset
from dataflow.formats import field_kind, litdata

pytestmark = pytest.mark.usefixtures("kept_scans")

THEIRS = Path(__file__).parent / "data" / "litdata"
COUNT = 20
LAST = "chunk-0-2.bin"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(THEIRS, tmp_path / "set"))


def change(path: Path, **changes: object) -> None:
    index = json.loads((path / "index.json").read_text())
    index["config"] |= changes
    (path / "index.json").write_text(json.dumps(index))


def expected(number: int) -> dict:
    return {
        "n": -number,
        "f": number / 2,
        "t": f"é{number}",
        "b": bytes([number]) * number,
        "flag": number % 2 == 0,
        "a": np.arange(6, dtype=np.int16).reshape(2, 3) * number,
        "v": np.arange(number % 4, dtype=np.float32),
        "w": np.full((2, 2), number, np.int32),
        "u": np.arange(number % 3),
    }


@pytest.mark.parametrize("block_bytes", [500, 1 << 20])
def test_what_the_library_wrote_is_read(copy: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    monkeypatch.setattr(litdata, "BLOCK_BYTES", block_bytes)
    dataset = open_dataset(copy)
    assert dataset.source.format == "litdata"
    assert (len(dataset), len(dataset.index.shards)) == (COUNT, 3)
    assert (dataset.index.num_blocks > 3) == (block_bytes == 500)
    assert field_kind(dataset.schema.field("p")) == "image"
    for number in (0, 19, 7, 3):
        row = dataset[number]
        for name, value in expected(number).items():
            np.testing.assert_array_equal(row[name], value)
        assert row["p"].shape == (4, 5, 3)
        assert abs(row["p"].astype(int) - number).max() <= 2
    assert dataset[5]["a"].dtype == np.int16
    assert dataset[5]["u"].dtype == np.int64


def test_it_converts_with_everything_it_has(copy: Path, tmp_path: Path) -> None:
    convert(copy, tmp_path / "out", shard_size_bytes=3000)
    for number, row in zip(range(COUNT), open_dataset(tmp_path / "out"), strict=True):
        for name, value in expected(number).items():
            np.testing.assert_array_equal(row[name], value)


WRAPS = ["chunk", "batch", "sample"]


def packed(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


def wrapped(data: bytes, wrap: str) -> bytes:
    """A plain chunk, compressed; the library itself writes them in test_other_libraries.py."""
    if wrap == "chunk":
        return packed(data)
    count = int.from_bytes(data[:4], "little")
    offsets = np.frombuffer(data, "<u4", count + 1, 4)
    begins = [*range(0, count, 3 if wrap == "batch" else 1), count]
    frames = [packed(data[offsets[a] : offsets[b]]) for a, b in itertools.pairwise(begins)]
    begin = offsets[0] if wrap == "sample" else 24 + 4 * (count + 1) + 24 * len(frames)
    ends = (begin + np.cumsum([0, *map(len, frames)])).astype(np.uint32)
    if wrap == "sample":
        return data[:4] + ends.tobytes() + b"".join(frames)
    table = b"".join(
        struct.pack("<IIQII", a, b - a, end, len(frame), offsets[b] - offsets[a])
        for (a, b), end, frame in zip(itertools.pairwise(begins), ends[:-1], frames, strict=True)
    )
    head = struct.pack("<8sHHIII", b"LDFZ01\0\0", 1, 0, count, 3, len(frames))
    return head + (offsets - offsets[0]).tobytes() + table + b"".join(frames)


def compress(path: Path, wrap: str) -> None:
    index = json.loads((path / "index.json").read_text())
    for chunk in index["chunks"]:
        plain = path / chunk["filename"]
        data = wrapped(plain.read_bytes(), wrap)
        if wrap == "chunk":
            chunk["filename"] = plain.with_suffix(".zstd:4.bin").name
            plain.unlink()
        else:
            chunk["chunk_bytes"] = len(data)
        (path / chunk["filename"]).write_bytes(data)
    (path / "index.json").write_text(json.dumps(index))
    change(path, compression="zstd:4", compression_level=None if wrap == "chunk" else wrap)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("block_bytes", [200, 1 << 20])
def test_compressed_chunks_are_read(copy: Path, monkeypatch: pytest.MonkeyPatch, wrap: str, block_bytes: int) -> None:
    monkeypatch.setattr(litdata, "BLOCK_BYTES", block_bytes)
    compress(copy, wrap)
    dataset = open_dataset(copy)
    assert (len(dataset), len(dataset.index.shards)) == (COUNT, 3)
    assert (dataset.index.num_blocks > 3) == (block_bytes == 200 and wrap != "chunk")
    for number in (19, 0, 7, 3, 8):
        for name, value in expected(number).items():
            np.testing.assert_array_equal(dataset[number][name], value)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("damage", ["cut", "empty", "content"])
def test_a_damaged_compressed_chunk_is_named(copy: Path, wrap: str, damage: str) -> None:
    compress(copy, wrap)
    (path,) = copy.glob("chunk-0-2*.bin")
    data = path.read_bytes()
    last = bytes(byte ^ 0xFF for byte in data[-60:])
    path.write_bytes({"cut": data[:-1], "empty": b"", "content": data[:-60] + last}[damage])
    with pytest.raises(CorruptError, match=r"chunk-0-2.*\.bin"):
        open_dataset(copy)[COUNT - 1]


@pytest.mark.parametrize("position", [0, 8, 12, 20, 24 + 4 * 8 + 4, 24 + 4 * 8 + 8, 24 + 4 * 8 + 16])
def test_a_damaged_table_of_frames_is_named(copy: Path, position: int) -> None:
    compress(copy, "batch")
    data = bytearray((copy / "chunk-0-1.bin").read_bytes())
    assert int.from_bytes(data[12:16], "little") == 7
    data[position] ^= 0x01
    (copy / "chunk-0-1.bin").write_bytes(data)
    with pytest.raises(CorruptError, match=r"table of frames of .*chunk-0-1\.bin"):
        open_dataset(copy)


def test_a_chunk_of_another_number_of_items_is_named(copy: Path) -> None:
    compress(copy, "chunk")
    index = json.loads((copy / "index.json").read_text())
    index["chunks"][1]["chunk_size"] -= 1
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptError, match=r"table of .*chunk-0-1\.zstd.*\.bin"):
        open_dataset(copy)[10]


@pytest.mark.parametrize("encoding", ["audio:wav", "image:png", "video:mp4", "file:pdf", "text"])
def test_files_are_fields_of_their_kind(copy: Path, encoding: str) -> None:
    formats = json.loads((copy / "index.json").read_text())["config"]["data_format"]
    place = formats.index("bytes") if encoding != "text" else formats.index("str")
    formats[place] = encoding
    change(copy, data_format=formats)
    name, kind = ("t" if encoding == "text" else "b"), encoding.partition(":")[0]
    dataset = open_dataset(copy, columns=[name], encoded=[] if kind in ("text", "file") else [name])
    assert field_kind(dataset.schema.field(name)) == (None if kind in ("text", "file") else kind)
    assert dataset[7][name] == expected(7)[name]


def test_items_that_are_tuples_have_numbered_fields(copy: Path) -> None:
    spec = json.loads(json.loads((copy / "index.json").read_text())["config"]["data_spec"])
    spec[1] |= {"type": "builtins.tuple", "context": "null"}
    change(copy, data_spec=json.dumps(spec))
    assert open_dataset(copy).schema.names == [str(place) for place in range(10)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compression": "lz4"}, "compression 'lz4'"),
        ({"compression": "zstd", "compression_level": "row"}, "'zstd' by 'row'"),
        ({"encryption": {"algorithm": "x"}}, "encrypted"),
        ({"data_format": ["pickle"] * 10}, "'pickle' is not supported"),
        ({"data_format": ["int"] * 3}, "names 10 leaves and has 3"),
        ({"data_spec": "x"}, "data_spec that cannot be read"),
        (
            {"data_spec": '[1, {"type": "collections.OrderedDict", "context": "[]", "children_spec": []}]'},
            "another layout",
        ),
    ],
    ids=["compression", "level", "encryption", "encoding", "count", "spec", "layout"],
)
def test_what_is_not_supported_is_named(copy: Path, changes: dict, message: str) -> None:
    change(copy, **changes)
    with pytest.raises(DataError, match=message):
        open_dataset(copy)


def test_another_index_is_none_of_it(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "index.json").write_text('{"chunks": 3}')
    with pytest.raises(BadInputError, match="no dataset"):
        open_dataset(tmp_path / "set")


# Corruption


@pytest.mark.parametrize("keep", [0, 3, 20, 500])
def test_a_cut_off_chunk_is_named(copy: Path, keep: int) -> None:
    (copy / LAST).write_bytes((copy / LAST).read_bytes()[:keep])
    with pytest.raises(CorruptError, match=f"{LAST} has {keep} bytes"):
        open_dataset(copy)


def test_a_missing_chunk_is_named(copy: Path) -> None:
    (copy / LAST).unlink()
    with pytest.raises(CorruptError, match=f"{LAST} is missing"):
        open_dataset(copy)


@pytest.mark.parametrize("position", [0, 4, 8, 28])
def test_a_damaged_table_is_named(copy: Path, position: int) -> None:
    data = bytearray((copy / LAST).read_bytes())
    data[position + 1] ^= 0xFF
    (copy / LAST).write_bytes(data)
    with pytest.raises(CorruptError, match=f"{LAST}"):
        open_dataset(copy)


def test_a_damaged_size_is_named_with_the_offset(copy: Path) -> None:
    data = bytearray((copy / "chunk-0-1.bin").read_bytes())
    start = int.from_bytes(data[4:8], "little")
    data[start + 8] ^= 0x10
    (copy / "chunk-0-1.bin").write_bytes(data)
    with pytest.raises(CorruptError, match=rf"offset {start} of .*chunk-0-1\.bin"):
        open_dataset(copy)[10]


def test_an_array_of_another_shape_is_an_error(copy: Path) -> None:
    data = (copy / LAST).read_bytes()
    header = np.array([1, 2, 2, 3], "<u4").tobytes()
    assert data.count(header) > 1
    (copy / LAST).write_bytes(data.replace(header, np.array([1, 2, 3, 2], "<u4").tobytes()))
    with pytest.raises(CorruptError, match=r"\[3, 2\], the first one has the shape \[2, 3\]"):
        open_dataset(copy)[COUNT - 1]


def test_a_chunk_that_changes_under_the_reader_is_an_error(copy: Path) -> None:
    dataset = open_dataset(copy)
    (copy / LAST).write_bytes((copy / LAST).read_bytes() + b"\0")
    with pytest.raises(DataError, match=LAST):
        dataset[COUNT - 1]


def rows_chunk(rows: list[dict], *, stream: bool = False, compression: str | None = None) -> bytes:
    """A chunk of rows, as the library writes mappings of plain values; batches of two rows instead of 256."""
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, max_chunksize=2)
    arrow, head = sink.getvalue().to_pybytes(), 4 * (len(rows) + 2)
    table_of_items = struct.pack(f"<{len(rows) + 2}I", len(rows), *[head] * (len(rows) + 1))
    return table_of_items + arrow + struct.pack("<I", len(arrow)) + b"LDARW01\0"


def write_rows(path: Path, *chunks: bytes, **config: object) -> Path:
    path.mkdir()
    told = []
    for number, data in enumerate(chunks):
        name, count = f"chunk-0-{number}.bin", int.from_bytes(data[:4], "little")
        (path / name).write_bytes(data)
        told.append({"chunk_bytes": len(data), "chunk_size": count, "dim": None, "filename": name})
    tree = {"type": "builtins.dict", "context": '["n"]', "children_spec": [{"type": None, "context": None}]}
    told_of_all = {"data_format": ["json"], "data_spec": json.dumps([1, tree]), "types": {"n": "int"}} | config
    (path / "index.json").write_text(json.dumps({"chunks": told, "config": told_of_all}))
    return path


ROWS = [{"n": n, "t": f"é{n}", "b": bytes(n), "none": None, "deep": {"a": [n, None], "s": "x"}} for n in range(5)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_chunks_of_rows_are_read(
    tmp_path: Path, stream: bool, compression: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = [rows_chunk(rows, stream=stream, compression=compression) for rows in (ROWS, ROWS[1:4])]
    path = write_rows(tmp_path / "set", *chunks, compression=compression, compression_level="chunk")
    dataset = open_dataset(path)
    assert [dataset[number] for number in range(len(dataset))] == ROWS + ROWS[1:4]
    assert dataset.index.num_blocks == 5
    monkeypatch.setattr("dataflow.formats.litdata.find_rows", pytest.fail)
    assert open_dataset(path)[6] == ROWS[2]  # from the scan that was kept: no chunk is looked at again


def test_chunks_of_rows_have_the_types_of_all_of_them(tmp_path: Path) -> None:
    first = [{"n": 1, "deep": {"a": 1}, "none": None}]
    second = [{"n": 0.5, "deep": {"a": 2, "b": "x"}, "none": "text", "more": "x"}]
    dataset = open_dataset(write_rows(tmp_path / "set", rows_chunk(first), rows_chunk(second)))
    assert dataset[0] == {"n": 1.0, "deep": {"a": 1, "b": None}, "none": None, "more": None}
    assert dataset[1] == second[0]


def test_chunks_of_rows_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="types that do not fit"):
        open_dataset(write_rows(tmp_path / "types", rows_chunk([{"n": 1}]), rows_chunk([{"n": "text"}])))
    plain = (THEIRS / LAST).read_bytes()
    with pytest.raises(BadInputError, match=r"chunk-0-1\.bin holds no rows"):
        open_dataset(write_rows(tmp_path / "kinds", rows_chunk([{"n": 1}]), plain))
    large = write_rows(tmp_path / "large", rows_chunk([{"n": 2**60 + 1}]), rows_chunk([{"n": 0.5}]))
    with pytest.raises(BadInputError, match=r"chunk-0-0\.bin does not fit the types"):
        open_dataset(large)[0]


def test_damaged_chunks_of_rows_are_named(tmp_path: Path) -> None:
    whole = rows_chunk(ROWS)
    told_more = whole[:-12] + struct.pack("<I", len(whole)) + whole[-8:]
    with pytest.raises(CorruptError, match=r"chunk-0-0\.bin is damaged"):
        open_dataset(write_rows(tmp_path / "long", told_more))
    one_less = (4).to_bytes(4, "little") + whole[4:]
    with pytest.raises(CorruptError, match="has 5 rows, the index says 4"):
        open_dataset(write_rows(tmp_path / "count", one_less))


def test_arrays_of_booleans_are_read(tmp_path: Path) -> None:
    leaves = [struct.pack("<III", 13, 1, 3) + b"\1\0\1", struct.pack(">III", 19, 1, 2) + b"\0\1", b"\1\0", b"\0"]
    item = struct.pack("<4I", *map(len, leaves)) + b"".join(leaves)
    data = struct.pack("<III", 1, 12, 12 + len(item)) + item
    children = [{"type": None, "context": None, "children_spec": []}] * 4
    tree = json.dumps([1, {"type": "builtins.list", "context": "null", "children_spec": children}])
    kinds = ["numpy", "tensor", "no_header_numpy:13", "no_header_tensor:19"]
    row = open_dataset(write_rows(tmp_path / "set", data, data_format=kinds, data_spec=tree))[0]
    assert [np.asarray(row[name]).tolist() for name in "0123"] == [
        [True, False, True],
        [False, True],
        [True, False],
        [False],
    ]
    assert row["0"].dtype == np.bool_
