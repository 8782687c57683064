"""`convert --verify`: what was written is read again, and no value may differ from what was to be written."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from connectors.errors import BadInputError, CorruptError, DataError
from connectors.protocols import Buffer
from dataflow import ShardWriter, image_field, open_dataset, tensor_field
from dataflow.cli.main import main
from dataflow.convert import append, convert, parse_rule
from dataflow.convert.comparison import compare
from dataflow.convert.rereading import StreamDigest
from dataflow.formats.destination import Destination
from dataflow.formats.writable import WRITABLE

pytestmark = pytest.mark.usefixtures("kept_scans")

COUNT = 60
SCHEMA = pa.schema(
    [
        pa.field("n", pa.int32()),
        pa.field("text", pa.string()),
        pa.field("ratio", pa.float32(), nullable=False),
    ]
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "set", SCHEMA, block_size_bytes=200, shard_size_bytes=600) as writer:
        for number in range(COUNT):
            writer.write({"n": number, "text": f"größe {number}" * (number % 3), "ratio": number / 7})
    return tmp_path / "set"


@pytest.mark.parametrize(
    ("to", "workers"),
    [("arrow", 2), ("arrow", 0), ("jsonl", 0), ("parquet", 0), ("tfrecord", 0), ("webdataset", 0), ("mds", 0)],
)
def test_a_good_conversion_is_compared_value_by_value(source: Path, tmp_path: Path, to: str, workers: int) -> None:
    result = convert(source, tmp_path / "out", to=to, shard_size_bytes=500, workers=workers, verify=True)
    assert result.num_compared == COUNT
    assert set(result.not_compared) <= ({"n", "text", "ratio"} if to == "webdataset" else set())
    assert result.num_shards > 1


def test_tokens_in_megatron_files_are_compared(tmp_path: Path) -> None:
    rows = [{"tokens": list(range(number % 5))} for number in range(30)]
    result = convert(
        rows, tmp_path / "out", to="megatron", schema=pa.schema([("tokens", pa.list_(pa.int32()))]), verify=True
    )
    assert (result.num_compared, result.not_compared) == (30, ())


def same(sample: dict[str, Any]) -> dict[str, Any]:
    return sample


def twice(sample: dict[str, Any]) -> dict[str, Any]:
    return {"twice": 2 * sample["n"]}


@pytest.mark.parametrize(
    "settings",
    [
        {"shuffle": "full", "seed": 3},
        {"shuffle": "block"},
        {"split": {"train": 0.8, "val": 0.2}},
        {"filter": "n > 20"},
        {"sample_fraction": 0.5},
        {"map": twice},
        {"fields": ["text"]},
        {"compression": "zstd"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_whatever_is_done_on_the_way_is_part_of_what_is_compared(
    source: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    result = convert(source, tmp_path / "out", shard_size_bytes=500, workers=0, verify=True, **settings)
    assert result.num_compared == result.num_samples > 0
    assert result.not_compared == ()


def test_images_and_tensors_are_compared(tmp_path: Path) -> None:
    schema = pa.schema([image_field("image").with_nullable(True), tensor_field("x", "float64", (2, 3))])
    with ShardWriter(tmp_path / "set", schema) as writer:
        for number in range(10):
            writer.write({"image": None if number == 3 else bytes([number]), "x": np.full((2, 3), number)})
    for to in ("arrow", "parquet"):
        result = convert(tmp_path / "set", tmp_path / to, to=to, verify=True, workers=0)
        assert (result.num_compared, result.not_compared) == (10, ())


def test_times_with_nanoseconds_are_compared(tmp_path: Path) -> None:
    values = [1_700_000_000_123_456_789, None, 1_700_000_000_123_456_788, 1_700_000_000_123_456_789]
    kind = pa.timestamp("ns", "Europe/Berlin")
    times = pa.array(values, kind)
    columns = {
        "at": times,
        "took": pa.array(values, pa.duration("ns")),
        "many": pa.array([[value] for value in values], pa.list_(kind)),
        "pair": pa.StructArray.from_arrays([times, pa.array(["a", None, "c", "a"])], ["at", "text"]),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    result = convert(tmp_path / "a.parquet", tmp_path / "out", verify=True)
    assert (result.num_compared, result.not_compared) == (4, ())
    assert compare(open_dataset(tmp_path / "a.parquet"), open_dataset(tmp_path / "out")).equal
    rules = [parse_rule("duplicates fields=at,took")]
    assert convert(tmp_path / "a.parquet", tmp_path / "few", rules=rules).num_samples == 3


def test_times_that_python_lacks_are_refused_where_it_would_have_to_hold_them(tmp_path: Path) -> None:
    late = pa.array([1 << 40], pa.timestamp("s"))  # the year 36812
    pair = pa.StructArray.from_arrays([late], ["at"])
    pq.write_table(pa.table({"at": late, "pair": pair}), tmp_path / "a.parquet")
    assert convert(tmp_path / "a.parquet", tmp_path / "out", verify=True).num_compared == 1
    with pytest.raises(BadInputError, match="field 'at' has a value that a function cannot be given"):
        convert(tmp_path / "a.parquet", tmp_path / "mapped", map=same)
    with pytest.raises(BadInputError, match="cannot be compared"):
        convert(tmp_path / "a.parquet", tmp_path / "all", rules=[parse_rule("duplicates")])
    dataset = open_dataset(tmp_path / "out")
    assert dataset.select(["at"])[0]["at"] == np.datetime64(1 << 40, "s")
    with pytest.raises(BadInputError, match="field 'pair' has a value that is no Python object"):
        dataset.select(["pair"])[0]


def test_arrays_of_zarr_are_compared(tmp_path: Path) -> None:
    schema = pa.schema([tensor_field("x", "float32", (4,)), pa.field("n", pa.int64(), nullable=False)])
    with ShardWriter(tmp_path / "set", schema, block_size_bytes=200) as writer:
        for number in range(50):
            writer.write({"x": np.full(4, number, np.float32), "n": number})
    result = convert(tmp_path / "set", tmp_path / "out", to="zarr", shard_size_bytes=500, workers=0, verify=True)
    assert (result.num_compared, result.not_compared) == (50, ())


def tamper(monkeypatch: pytest.MonkeyPatch, old: bytes, new: bytes) -> None:
    """Make every store hold something else than it was given."""
    put = Destination.put

    def changed(self: Destination, name: str, chunks: Iterable[Buffer]) -> None:
        content = b"".join(map(bytes, chunks))
        put(self, name, [content if name.endswith(".part") else content.replace(old, new)])

    monkeypatch.setattr(Destination, "put", changed)


def test_a_value_that_is_not_what_was_written_is_an_error_that_names_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tamper(monkeypatch, b'"n":37,', b'"n":38,')
    with pytest.raises(CorruptError, match=r"the values of field 'n' in .* are not those that were written"):
        convert(source, tmp_path / "out", to="jsonl", workers=0, verify=True)


def test_a_record_that_is_missing_is_an_error(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tamper(monkeypatch, b'{"n":37', b'\n{"n":37')
    convert(source, tmp_path / "blank", to="jsonl", workers=0, verify=True)
    line = json.dumps({"n": 0, "text": "", "ratio": 0.0}, separators=(",", ":")).encode() + b"\n"
    assert line in b"".join(path.read_bytes() for path in (tmp_path / "blank").iterdir())
    tamper(monkeypatch, line, b"")
    with pytest.raises(CorruptError, match=f"has {COUNT - 1} samples, {COUNT} were written"):
        convert(source, tmp_path / "out", to="jsonl", workers=0, verify=True)


def test_a_flipped_bit_in_a_native_shard_is_an_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tamper(monkeypatch, "größe 37".encode(), "größe 36".encode())
    with pytest.raises(DataError, match="shard-"):
        convert(source, tmp_path / "out", workers=0, verify=True)


def test_shards_of_a_run_without_verify_are_counted_and_not_compared(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    put = Destination.put

    def dying(self: Destination, name: str, chunks: Iterable[Buffer]) -> None:
        if name.startswith("shard-00002"):
            raise KeyboardInterrupt
        put(self, name, chunks)

    monkeypatch.setattr(Destination, "put", dying)
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, shard_size_bytes=500, workers=0)
    monkeypatch.setattr(Destination, "put", put)
    result = convert(source, out, shard_size_bytes=500, workers=0, resume=True, verify=True)
    assert result.num_resumed == 2
    assert 0 < (result.num_compared or 0) < COUNT


def test_an_append_is_compared_too(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", workers=0)
    assert append(source, tmp_path / "out", workers=0, verify=True).num_compared == COUNT


def test_the_command_says_what_was_compared(source: Path, tmp_path: Path) -> None:
    arguments = ["convert", str(source), str(tmp_path / "out"), "--verify", "--workers", "0"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert f"read again and compared: {COUNT} samples" in done.output


def test_every_format_that_can_be_written_was_thought_of() -> None:
    assert set(WRITABLE) == {"arrow", "jsonl", "mds", "megatron", "parquet", "tfrecord", "webdataset", "zarr"}


VALUES = {
    "int": (pa.int16(), st.integers(-9, 9)),
    "bool": (pa.bool_(), st.booleans()),
    "text": (pa.string(), st.text(max_size=5)),
    "wide": (pa.large_binary(), st.binary(max_size=5)),
    "list": (pa.list_(pa.string()), st.lists(st.none() | st.text(max_size=3), max_size=3)),
    "pair": (pa.list_(pa.float32(), 2), st.lists(st.floats(width=32), min_size=2, max_size=2)),
    "struct": (pa.struct([("a", pa.int8())]), st.fixed_dictionaries({"a": st.integers(0, 9)})),
}


def digest(kind: pa.DataType, cuts: list[list[Any]]) -> str:
    found = StreamDigest(pa.schema([("x", kind)]))
    for values in cuts:
        # A slice, so that offsets do not begin at zero.
        found.add("x", pa.array([None, *values, None], kind).slice(1, len(values)))
    return found.result()["x"]


@pytest.mark.parametrize("name", VALUES)
@given(data=st.data())
def test_a_digest_depends_on_the_values_and_not_on_how_they_are_cut(name: str, data: st.DataObject) -> None:
    kind, strategy = VALUES[name]
    values = data.draw(st.lists(st.none() | strategy, min_size=1, max_size=12))
    cut = data.draw(st.integers(0, len(values)))
    assert digest(kind, [values]) == digest(kind, [values[:cut], values[cut:]])
    place = data.draw(st.integers(0, len(values) - 1))
    other = data.draw((st.none() | strategy).filter(lambda value: repr(value) != repr(values[place])))
    assert digest(kind, [values]) != digest(kind, [[*values[:place], other, *values[place + 1 :]]])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([["a", "b"], ["c"]], [["a"], ["b", "c"]]),
        ([[], ["a"]], [["a"], []]),
        ([None, []], [[], None]),
        ([["ab"], ["c"]], [["a"], ["bc"]]),
    ],
)
def test_borders_between_values_count(one: list[Any], other: list[Any]) -> None:
    kind = pa.list_(pa.string())
    assert digest(kind, [one]) != digest(kind, [other])
