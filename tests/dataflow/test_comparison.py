"""`dataflow diff`: what differs between two datasets, whatever their formats and layouts."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

from connectors.errors import BadInputError
from dataflow.cli.main import main
from dataflow.convert import convert
from dataflow.convert.comparison import Comparison, compare
from dataflow.dataset import open_dataset
from dataflow.formats import tensor_field
from dataflow.formats.arrow import ShardWriter

SCHEMA = pa.schema(
    [
        pa.field("n", pa.int64(), nullable=False),
        pa.field("x", pa.float64()),
        pa.field("s", pa.string()),
        tensor_field("t", np.int8, (3,)),
    ]
)


def rows(count: int = 100) -> list[dict]:
    return [
        {
            "n": n,
            "x": None if n % 9 == 0 else float("nan") if n % 9 == 1 else n / 3,
            "s": None if n % 5 == 0 else f"é{n}",
            "t": np.full(3, n % 100, np.int8),
        }
        for n in range(count)
    ]


def write(path: Path, samples: list[dict], block_size_bytes: int = 500, schema: pa.Schema = SCHEMA) -> Path:
    with ShardWriter(path, schema, block_size_bytes=block_size_bytes) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def compared(left: Path, right: Path, **settings: object) -> Comparison:
    return compare(open_dataset(left), open_dataset(right), **settings)


def test_the_same_samples_in_other_blocks_and_formats_are_equal(tmp_path: Path) -> None:
    one = write(tmp_path / "one", rows())
    assert compared(one, write(tmp_path / "two", rows(), 170)).equal
    convert(one, tmp_path / "parquet", to="parquet", block_size_bytes=333)
    seen: list[int] = []
    result = compared(one, tmp_path / "parquet", progress=seen.append)
    assert result.equal
    assert (result.num_compared, seen[-1]) == (100, 100)


@pytest.mark.parametrize("to", ["jsonl", "tfrecord", "parquet"])
def test_tensors_equal_the_lists_that_other_formats_make_of_them(tmp_path: Path, to: str) -> None:
    values = np.arange(24).reshape(4, 2, 3)
    with ShardWriter(tmp_path / "one", pa.schema([tensor_field("t", np.int64, (2, 3))])) as writer:
        writer.write_columns({"t": values})
    convert(tmp_path / "one", tmp_path / "two", to=to)
    result = compared(tmp_path / "one", tmp_path / "two")
    assert (result.num_compared, result.num_different) == (4, 0)
    with ShardWriter(tmp_path / "other", pa.schema([tensor_field("t", np.int64, (2, 3))])) as writer:
        writer.write_columns({"t": values + (values == 7)})
    assert compared(tmp_path / "other", tmp_path / "two").examples == [(1, ["t"])]


def test_times_that_python_lacks_cannot_be_compared_with_other_types(tmp_path: Path) -> None:
    for name, kind in [("one", pa.timestamp("s")), ("two", pa.int64())]:
        with ShardWriter(tmp_path / name, pa.schema([("t", kind)])) as writer:
            writer.write_batch(pa.record_batch([pa.array([1 << 40], kind)], names=["t"]))
    with pytest.raises(BadInputError, match=r"values of timestamp\[s\] and int64 cannot be compared"):
        compared(tmp_path / "one", tmp_path / "two")


def test_every_difference_is_found_and_counted_by_field(tmp_path: Path) -> None:
    changed = rows()
    changed[0]["x"] = 0.0  # was missing
    changed[7]["s"] = "other"
    changed[7]["n"] = -7
    changed[99]["t"] = np.zeros(3, np.int8)
    result = compared(write(tmp_path / "one", rows()), write(tmp_path / "two", changed, 130))
    assert not result.equal
    assert result.by_field == {"n": 1, "x": 1, "s": 1, "t": 1}
    assert result.examples == [(0, ["x"]), (7, ["n", "s"]), (99, ["t"])]
    assert result.num_different == 3


def test_another_number_of_samples_and_other_fields_are_differences(tmp_path: Path) -> None:
    schema = pa.schema([pa.field("n", pa.int32(), nullable=False), pa.field("new", pa.string())])
    samples = [{"n": n, "new": ""} for n in range(80)]
    result = compared(write(tmp_path / "one", rows()), write(tmp_path / "two", samples, schema=schema))
    assert (result.num_left, result.num_right, result.num_compared) == (100, 80, 80)
    assert (result.only_left, result.only_right) == (["x", "s", "t"], ["new"])
    assert result.other_types == [("n", "int64", "int32")]
    assert result.num_different == 0
    assert not result.equal


def test_only_the_fields_asked_for_are_compared(tmp_path: Path) -> None:
    changed = [row | {"n": 0} for row in rows()]
    one, two = write(tmp_path / "one", rows()), write(tmp_path / "two", changed)
    assert compared(one, two, fields=["s", "x"]).equal
    assert compared(one, two).num_different == 99
    assert len(compared(one, two).examples) == 20
    with pytest.raises(BadInputError, match="'missing' is not in both"):
        compared(one, two, fields=["missing"])


def test_the_command_says_what_differs_and_how_it_went(tmp_path: Path) -> None:
    changed = rows()
    changed[3]["s"] = "other"
    one, two = write(tmp_path / "one", rows()), write(tmp_path / "two", changed)
    equal = CliRunner().invoke(main, ["diff", str(one), str(one)])
    assert (equal.exit_code, equal.stdout) == (0, "100 samples compared: no differences\n")
    different = CliRunner().invoke(main, ["diff", str(one), str(two)])
    assert (different.exit_code, different.stdout) == (1, "sample 3: s\n100 samples compared: 1 differ\n")
    as_json = CliRunner().invoke(main, ["diff", str(one), str(two), "--json", "--fields", "n, s"])
    report = json.loads(as_json.stdout)
    assert (as_json.exit_code, report["equal"], report["by_field"]) == (1, False, {"s": 1})
