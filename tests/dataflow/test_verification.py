"""Reading a whole dataset to see whether it is what it says."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner

from dataflow.cli.main import main
from dataflow.convert import convert
from dataflow.dataset import open_dataset
from dataflow.dataset.verification import Verification, verify
from dataflow.formats.arrow import ShardWriter

COUNT = 300


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    schema = pa.schema([("n", pa.int64()), ("text", pa.string())])
    with ShardWriter(tmp_path / "set", schema, block_size_bytes=500, shard_size_bytes=3000) as writer:
        for number in range(COUNT):
            writer.write({"n": number, "text": str(number)})
    return tmp_path / "set"


def run(path: Path) -> Verification:
    return verify(open_dataset(path, verify=False))


def test_a_good_dataset_has_no_problems(path: Path) -> None:
    done: list[int] = []
    dataset = open_dataset(path)
    result = verify(dataset, progress=done.append)
    assert (result.num_samples, result.num_problems, result.problems) == (COUNT, 0, [])
    assert result.num_blocks == dataset.index.num_blocks == done[-1]
    assert len(done) == len(dataset.index.shards) > 1


@pytest.mark.parametrize("to", ["parquet", "jsonl", "tfrecord", "webdataset", "mds"])
def test_other_formats_are_decoded_whole(path: Path, tmp_path: Path, to: str) -> None:
    convert(path, tmp_path / "out", to=to, shard_size_bytes=3000)
    result = run(tmp_path / "out")
    assert (result.num_samples, result.num_problems) == (COUNT, 0)


def test_every_damaged_block_is_named_and_the_rest_is_read(path: Path) -> None:
    index = open_dataset(path).index
    broken = [2, 5]
    for block in broken:
        ref = index.block_ref(block)
        shard = Path(ref.uri.removeprefix("file://"))
        content = bytearray(shard.read_bytes())
        content[ref.offset + ref.length - 20] ^= 1
        shard.write_bytes(content)
    result = run(path)
    for block in broken:
        ref = index.block_ref(block)
        assert any(
            f"block {block} " in text and f"offset {ref.offset} of {ref.uri}" in text for text in result.problems
        )
    lost = sum(int(index.blocks.first_sample[block + 1] - index.blocks.first_sample[block]) for block in broken)
    assert result.num_samples == COUNT - lost


def test_damage_outside_the_blocks_is_noticed_too(path: Path) -> None:
    shard = path / "shard-00001.arrow"
    content = bytearray(shard.read_bytes())
    content[-12] ^= 1
    shard.write_bytes(content)
    result = run(path)
    assert result.num_samples == COUNT
    assert result.problems == [f"{shard.as_uri()} does not match its digest"]


def test_a_missing_and_a_short_shard_are_named(path: Path) -> None:
    (path / "shard-00000.arrow").unlink()
    short = path / "shard-00001.arrow"
    short.write_bytes(short.read_bytes()[:2000])
    problems = "\n".join(run(path).problems)
    assert "shard-00000.arrow" in problems
    assert f"{short.as_uri()} has 2000 bytes, the index says" in problems


def test_no_more_problems_are_kept_than_can_be_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataflow.dataset.verification.MAX_PROBLEMS", 2)
    for shard in path.glob("shard-*"):
        shard.unlink()
    result = run(path)
    assert len(result.problems) == 2
    assert result.num_problems == len(open_dataset(path).index.shards)


def test_the_command_tells_the_truth_by_its_exit_code(path: Path) -> None:
    good = CliRunner().invoke(main, ["verify", str(path)])
    assert good.exit_code == 0
    assert "300 of 300 samples" in good.stdout
    (path / "shard-00000.arrow").unlink()
    bad = CliRunner().invoke(main, ["verify", str(path)])
    assert bad.exit_code == 1
    assert "shard-00000.arrow" in bad.stderr
    as_json = CliRunner().invoke(main, ["verify", str(path), "--json"])
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["num_problems"] == 1


def test_the_formats_are_listed() -> None:
    listed = json.loads(CliRunner().invoke(main, ["formats", "--json"]).stdout)
    assert {row["name"] for row in listed if row["write"]} >= {"arrow", "parquet", "webdataset"}
    assert "parquet" in CliRunner().invoke(main, ["formats"]).stdout
