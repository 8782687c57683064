import json
import re

import pyarrow as pa
import pytest
from click.testing import CliRunner

from dataflow import ShardWriter
from dataflow.cli.main import main


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "set"
    with ShardWriter(folder, pa.schema([("number", pa.int64()), ("other", pa.int64())])) as writer:
        for number in range(100):
            writer.write({"number": number, "other": 0})
    return str(folder)


def run(url, *options):
    return CliRunner().invoke(main, ["bench", url, *options])


@pytest.mark.parametrize("workers", [["--workers", "0"], ["--workers", "1", "--worker-kind", "thread"]])
def test_the_walk_goes_on_over_the_end_of_epochs(url, workers):
    result = run(url, "--batch", "10", "--steps", "25", "--json", *workers)
    found = json.loads(result.stdout)
    assert (found["batches"], found["samples"], found["rank"]) == (25, 250, 0)
    assert found["first_batch_s"] > 0
    assert found["step_s"]["p99"] >= found["step_s"]["p50"] > 0
    assert found["bottleneck"]


def test_the_table_names_stages_and_what_limits(url):
    result = run(url, "--batch", "10", "--steps", "3", "--workers", "0", "--columns", "number", "--model-ms", "1")
    assert result.exit_code == 0
    words = re.sub(r"\s+", " ", result.output)
    for part in ("samples 30 in 3 steps", "first batch", "limited by", "decode", "p99"):
        assert part in words


def test_each_rank_walks_its_part(url, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = json.loads(run(url, "--batch", "10", "--steps", "4", "--workers", "0", "--json").stdout)
    assert (found["rank"], found["samples"]) == (1, 20)


@pytest.mark.parametrize("samples", [["[1]", "[1, 2]"], ["[[1]]", "[[1], [2]]"]])
def test_samples_that_make_no_batch_are_refused_with_what_to_do(tmp_path, samples):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"x": {value}}}\n' for value in samples))
    result = run(str(tmp_path), "--batch", "2", "--steps", "1", "--workers", "0")
    assert result.exit_code == 1, result.output
    assert "samples differ in size and make no batch" in result.output
    assert "--columns" in result.output


def test_a_field_that_is_not_there_is_named(url):
    result = run(url, "--columns", "colour", "--workers", "0")
    assert result.exit_code == 2
    assert "colour" in result.output
