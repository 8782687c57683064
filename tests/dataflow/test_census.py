"""Statistics of native datasets: counted while they are written, the same whoever wrote what in which order."""

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from dataflow import image_field, tensor_field
from dataflow.cli.main import main
from dataflow.convert import convert
from dataflow.formats.arrow import ShardWriter
from dataflow.formats.arrow.census import FieldStatistics, Lengths, add_statistics, measure_batch

SCHEMA = pa.schema(
    [
        pa.field("n", pa.int32()),
        pa.field("text", pa.string()),
        pa.field("data", pa.large_binary()),
        pa.field("items", pa.list_(pa.int16())),
    ]
)
ROW = st.fixed_dictionaries(
    {
        "n": st.none() | st.integers(-5, 5),
        "text": st.none() | st.text(max_size=20),
        "data": st.none() | st.binary(max_size=40),
        "items": st.none() | st.lists(st.integers(0, 9), max_size=9),
    }
)


def expected(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    values = [row[name] for row in rows]
    found: dict[str, Any] = {"missing": values.count(None)}
    if name != "n":
        present = [len(value.encode() if isinstance(value, str) else value) for value in values if value is not None]
        histogram = [0] * (max(length.bit_length() for length in present) + 1) if present else []
        for length in present:
            histogram[length.bit_length()] += 1
        found["lengths"] = {
            "count": len(present),
            "min": min(present, default=0),
            "max": max(present, default=0),
            "total": sum(present),
            "histogram": histogram,
        }
    return found


@given(rows=st.lists(ROW, min_size=1, max_size=30), cut=st.integers(1, 29))
def test_statistics_are_what_counting_by_hand_gives_however_cut(rows: list[dict[str, Any]], cut: int) -> None:
    batch = pa.RecordBatch.from_pylist(rows, SCHEMA)
    whole = measure_batch(batch)
    parts = [part for part in (batch.slice(0, cut), batch.slice(cut)) if part.num_rows]
    assert add_statistics(map(measure_batch, parts)) == whole
    for name, found in msgspec.to_builtins(whole).items():
        del found["bytes"]
        assert found == expected(rows, name)


def test_bytes_are_those_of_the_values() -> None:
    batch = pa.RecordBatch.from_pylist([{"n": 1, "text": "abc", "data": b"12345", "items": [1, 2]}] * 10, SCHEMA)
    # Offsets count: 4 bytes a text or list, 8 a large binary.
    assert {name: found.bytes for name, found in measure_batch(batch).items()} == {
        "n": 40,
        "text": 70,
        "data": 130,
        "items": 80,
    }


def test_shards_of_an_older_release_tell_nothing_and_so_does_the_whole() -> None:
    known = {"a": FieldStatistics(1, 10, Lengths(1, 1, 1, 1, [0, 1]))}
    assert add_statistics([known, {}]) == {}
    assert add_statistics([{}, known]) == {}
    assert add_statistics([]) == {}


def test_the_manifest_carries_statistics_and_says_who_wrote_it(tmp_path: Path) -> None:
    schema = pa.schema([image_field("image").with_nullable(True), tensor_field("point", "float32", (2,))])
    with ShardWriter(tmp_path / "set", schema, block_size_bytes=100, shard_size_bytes=300) as writer:
        for number in range(20):
            image = None if number % 5 == 0 else b"x" * number
            writer.write({"image": image, "point": np.zeros(2, np.float32)})
    content = json.loads((tmp_path / "set" / "dataset.json").read_text())
    assert content["num_shards"] > 1
    assert content["statistics"]["image"]["missing"] == 4
    assert content["statistics"]["image"]["lengths"] == {
        "count": 16,
        "min": 1,
        "max": 19,
        "total": sum(number for number in range(20) if number % 5),
        "histogram": [0, 1, 2, 3, 6, 4],
    }
    assert content["statistics"]["point"] == {"missing": 0, "bytes": 160}
    assert content["release"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_conversion_counts_the_same_as_a_writer(tmp_path: Path, workers: int) -> None:
    schema = pa.schema([("n", pa.int64()), ("text", pa.string())])
    with ShardWriter(tmp_path / "set", schema, block_size_bytes=500, shard_size_bytes=3000) as writer:
        for number in range(300):
            writer.write({"n": number, "text": str(number)})
    convert(tmp_path / "set", tmp_path / "out", block_size_bytes=700, shard_size_bytes=2000, workers=workers)
    told = [json.loads((tmp_path / name / "dataset.json").read_text())["statistics"] for name in ("set", "out")]
    assert told[0] == told[1]
    assert told[0]["text"]["lengths"]["total"] == 10 + 90 * 2 + 200 * 3


def test_inspect_shows_statistics_as_table_and_json(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "set", pa.schema([("text", pa.string())])) as writer:
        for number in range(1000):
            writer.write({"text": None if number < 7 else "x" * (number % 4)})
    report = json.loads(CliRunner().invoke(main, ["inspect", str(tmp_path / "set"), "--json"]).stdout)
    assert report["statistics"]["text"]["missing"] == 7
    assert sum(report["statistics"]["text"]["lengths"]["histogram"]) == 993
    assert (report["compression"], bool(report["release"])) == ("none", True)
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "set")], env={"COLUMNS": "200"}).stdout
    assert "0 to 3, 1.5 on average" in shown


def test_inspect_of_other_formats_has_no_statistics(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n')
    report = json.loads(CliRunner().invoke(main, ["inspect", str(tmp_path), "--json"]).stdout)
    assert "statistics" not in report
    assert CliRunner().invoke(main, ["inspect", str(tmp_path)]).exit_code == 0
