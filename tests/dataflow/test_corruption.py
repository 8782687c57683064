"""Every format under every damage: an error that names the file, or the values as they were; never anything else.

A format is one line in `FORMATS`. What it has no means to notice stands there too, and in docs/reference/formats.md.
"""

import gzip
import itertools
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pytest

from connectors.errors import ChangedError, DataError, NotFoundError
from dataflow.convert import convert
from dataflow.dataset import open_dataset
from dataflow.formats import field_kind, image_field, tensor_field
from dataflow.formats.arrow import ShardWriter
from dataflow.testing.media import encode_image

COUNT = 24
DATA = Path(__file__).parent / "data"
SCHEMA = pa.schema(
    [
        image_field("photo"),
        tensor_field("matrix", np.float32, (2, 3)),
        pa.field("label", pa.int64(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("many", pa.list_(pa.int64())),
    ]
)


Make: TypeAlias = Callable[[Path, Path], Any]


@dataclass(frozen=True)
class Format:
    """A dataset of one format, and what there is to damage.

    Attributes:
        make: Writes it into a folder that does not exist, from a native one.
        shard: Pattern of the files with samples; there are at least two.
        index: The file that says what the shards are; None where there is none, and a missing shard cannot be noticed.
        checked: Whether a flipped byte in a shard is always noticed, or changes nothing.
        index_checked: The same for the index, names of fields apart.
        cut_unseen: Whether what is left of a shard looks like a shard.
    """

    make: Make
    shard: str
    index: str | None = None
    checked: bool = False
    index_checked: bool = True
    cut_unseen: Callable[[bytes], bool] = lambda left: False


def converted(to: str, *fields: str, compression: str = "none") -> Make:
    sizes = {"shard_size_bytes": 1500, "block_size_bytes": 700}
    return lambda source, target: convert(
        source, target, to=to, fields=list(fields) or None, compression=compression, workers=0, **sizes
    )


def packed(make: Make, pack: Callable[[bytes], bytes], suffix: str) -> Make:
    def write(source: Path, target: Path) -> None:
        make(source, target)
        for file in list(target.iterdir()):
            file.with_name(file.name + suffix).write_bytes(pack(file.read_bytes()))
            file.unlink()

    return write


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.output_stream(sink, compression="zstd") as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


def lines(line: Callable[[int], str], suffix: str, header: str = "") -> Make:
    def write(source: Path, target: Path) -> None:
        target.mkdir()
        for shard in range(3):
            text = header + "".join(line(number) for number in range(shard * 8, shard * 8 + 8))
            (target / f"{shard}{suffix}").write_text(text)

    return write


def pictures(source: Path, target: Path) -> None:
    for number in range(4):
        (target / f"c{number % 2}").mkdir(parents=True, exist_ok=True)
        (target / f"c{number % 2}" / f"{number}.png").write_bytes(encode_image(number))


def tabled(source: Path, target: Path) -> None:
    pictures(source, target)
    rows = (f"c{number % 2}/{number}.png,{number}\n" for number in range(4))
    (target / "metadata.csv").write_text("file_name,n\n" + "".join(rows))


def theirs(name: str) -> Make:
    return lambda source, target: shutil.copytree(DATA / name, target)


FLAT = ("photo", "label", "name")
JSON = ("matrix", "label", "name", "many")
FORMATS = {
    "arrow": Format(converted("arrow"), "*-*.arrow", "index.arrow", checked=True),
    "arrow lz4": Format(converted("arrow", compression="lz4"), "*-*.arrow", "dataset.json", checked=True),
    "csv": Format(lines(lambda n: f"{n},é{n}\n", ".csv", "n,name\n"), "*.csv", cut_unseen=lambda left: b"\n" in left),
    "folder": Format(pictures, "c*/*.png"),
    "folder with table": Format(tabled, "c*/*.png", "metadata.csv", index_checked=False),
    "huggingface": Format(theirs("huggingface"), "*.arrow", "state.json"),
    "jsonl": Format(converted("jsonl", *JSON), "*.jsonl", cut_unseen=lambda left: left.endswith(b"}")),
    "jsonl gz": Format(packed(converted("jsonl", *JSON), gzip.compress, ".gz"), "*.gz", checked=True),
    "jsonl zst": Format(converted("jsonl", *JSON, compression="zstd"), "*.zst"),
    "litdata": Format(theirs("litdata"), "*.bin", "index.json"),
    "mds": Format(converted("mds", *FLAT, "matrix"), "*.mds", "index.json"),
    "mds zstd": Format(converted("mds", *FLAT, "matrix", compression="zstd"), "*.zstd", "index.json"),
    "mds of streaming": Format(theirs("mds-plain"), "*.mds", "index.json"),
    "megatron": Format(converted("megatron", "many"), "*.bin", "shard-00001.idx"),
    "parquet": Format(converted("parquet"), "*.parquet", checked=True),
    "text": Format(lines(lambda n: f"line {n} é\n", ".txt"), "*.txt", cut_unseen=lambda left: True),
    "tfrecord": Format(converted("tfrecord", *FLAT, "many"), "*.tfrecord", checked=True),
    "tfrecord gz": Format(packed(converted("tfrecord", *FLAT), gzip.compress, ".gz"), "*.gz", checked=True),
    "webdataset": Format(converted("webdataset", *FLAT, "matrix"), "*.tar"),
    "webdataset gz": Format(packed(converted("webdataset", *FLAT), gzip.compress, ".gz"), "*.gz", checked=True),
    "webdataset zst": Format(packed(converted("webdataset", *FLAT), zstd, ".zst"), "*.zst"),
}
Case: TypeAlias = tuple[Format, Path, Path]

times = itertools.count(1_600_000_000)


def put(path: Path, content: bytes) -> None:
    """Replace a file by another one, whose time is one that no file had before."""
    part = path.with_name(path.name + ".new")
    part.write_bytes(content)
    os.utime(part, (next(times),) * 2)
    part.replace(path)


def flip(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 0x55]) + content[position + 1 :]


def read(path: Path) -> list[dict[str, Any]]:
    """Everything; media as bytes, which is what formats know of them, but those that are files by themselves."""
    dataset = open_dataset(path, cache=None)
    if dataset.source.format != "folder":
        media = [field.name for field in dataset.schema if field_kind(field)]
        dataset.reader.close()
        dataset = open_dataset(path, cache=None, encoded=media)
    try:
        columns = dataset.get_batch(range(len(dataset)))
    finally:
        dataset.reader.close()
    return [{name: plain(column[row]) for name, column in columns.items()} for row in range(len(dataset))]


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def outcome(path: Path, victim: Path) -> list[dict[str, Any]] | None:
    """The values; None for an error that names the victim, or field and sample."""
    try:
        return read(path)
    except DataError as error:
        named = victim.name in str(error) or re.search(r"field '\w+' of sample \d+", str(error))
        if not named:
            raise AssertionError(f"an error that names neither {victim.name} nor a sample") from error
        return None


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("native") / "set"
    with ShardWriter(path, SCHEMA) as writer:
        for number in range(COUNT):
            matrix = np.full((2, 3), number, np.float32)
            row = {"photo": encode_image(number), "matrix": matrix, "label": number, "name": f"é{number}"}
            writer.write(row | {"many": list(range(number % 4 + 1))})
    return path


@pytest.fixture(scope="module", params=FORMATS)
def pristine(
    request: pytest.FixtureRequest, native: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Format, Path]:
    path = tmp_path_factory.mktemp("pristine") / "set"
    FORMATS[request.param].make(native, path)
    return FORMATS[request.param], path


@pytest.fixture
def case(pristine: tuple[Format, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    """A format, a dataset of it to damage, and the shard to damage."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    entry, path = pristine
    shutil.copytree(path, tmp_path / "set")
    shards = sorted((tmp_path / "set").glob(entry.shard))
    assert len(shards) > 1
    return entry, tmp_path / "set", shards[1]


def test_a_truncated_file_is_named(case: Case) -> None:
    entry, path, shard = case
    content, before = shard.read_bytes(), read(path)
    for length in sorted({1, len(content) // 3, len(content) // 2, len(content) - 9, len(content) - 1}):
        put(shard, content[:length])
        found = outcome(path, shard)
        assert found in (None, before) or entry.cut_unseen(content[:length]), f"cut to {length} bytes"


def test_a_file_without_bytes_is_named(case: Case) -> None:
    _, path, shard = case
    put(shard, b"")
    assert outcome(path, shard) is None


def test_a_flipped_byte_is_an_error_or_changes_values_only(case: Case) -> None:
    entry, path, shard = case
    content, before = shard.read_bytes(), read(path)
    for position in range(0, len(content), max(1, len(content) // 30)):
        put(shard, flip(content, position))
        found = outcome(path, shard)
        assert found in (None, before) or not entry.checked, f"at {position}"


def test_a_shard_that_the_index_names_and_that_is_missing_is_named(case: Case) -> None:
    entry, path, shard = case
    shard.unlink()
    if entry.index:
        assert outcome(path, shard) is None
    else:
        assert 0 < len(read(path)) < COUNT


def test_a_shard_that_vanishes_under_the_reader_is_named(case: Case) -> None:
    _, path, shard = case
    dataset = open_dataset(path, cache=None)
    shard.unlink()
    try:
        with pytest.raises((ChangedError, NotFoundError), match=shard.name):
            dataset.get_batch(range(len(dataset)))
    finally:
        dataset.reader.close()


def test_a_shard_that_changes_under_the_reader_is_named(case: Case) -> None:
    _, path, shard = case
    dataset = open_dataset(path, cache=None)
    put(shard, shard.read_bytes()[::-1])
    try:
        with pytest.raises(ChangedError, match=shard.name):
            dataset.get_batch(range(len(dataset)))
    finally:
        dataset.reader.close()


def test_an_index_that_is_damaged_is_an_error_or_changes_nothing(case: Case) -> None:
    entry, path, _ = case
    if entry.index is None:
        return
    index, before = path / entry.index, read(path)
    content = index.read_bytes()
    flipped = [flip(content, position) for position in range(0, len(content), max(1, len(content) // 30))]
    for damaged in (b"", content[: len(content) // 2], content[::-1], *(flipped if entry.index_checked else ())):
        put(index, damaged)
        try:
            found = read(path)
        except DataError:
            continue
        # A field may have another name.
        assert [list(row.values()) for row in found] == [list(row.values()) for row in before], damaged
