import json
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner, Result

from dataflow.cli.main import main
from dataflow.formats.arrow import ShardWriter


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("plan") / "set"
    schema = pa.schema([("number", pa.int64())])
    with ShardWriter(folder, schema, block_size_bytes=256) as writer:
        for number in range(1000):
            writer.write({"number": number})
    return str(folder)


def run(url: str, *options: str) -> Result:
    return CliRunner().invoke(main, ["plan", url, *options])


def test_the_plan_counts_every_sample_once(url: str) -> None:
    result = run(url, "--batch", "64", "--world-size", "4", "--json")
    found = json.loads(result.stdout)
    assert (found["num_samples"], found["num_steps"], found["num_dropped"], found["num_repeated"]) == (1000, 16, 0, 0)
    assert [share["num_samples"] for share in found["replicas"]] == [250] * 4


def test_the_verdict_and_the_first_replicas_are_shown(url: str) -> None:
    result = run(url, "--batch", "64", "--world-size", "20", "--tail", "drop")
    assert result.exit_code == 0
    assert "each sample once" in result.stdout
    assert "40 left out" in result.stdout
    assert "and 4 more" in result.stdout


def test_mesh_and_weights_decide_the_replicas(url: str) -> None:
    result = run(url, "--batch", "60", "--mesh", "pp=2,dp=3,tp=2", "--weights", "1,1,2", "--tail", "drop", "--json")
    assert [share["num_samples"] for share in json.loads(result.stdout)["replicas"]] == [240, 240, 480]


def test_packs_and_buckets_of_filtered_samples_lose_and_repeat_nothing(url: str) -> None:
    kept = ["--world-size", "4", "--where", "number < 101", "--where", "number > 0", "--json"]
    for options in (["--batch", "8", "--capacity", "100"], ["--batch", "16", "--budget", "800"]):
        found = json.loads(run(url, *options, "--lengths", "number", "--balance", *kept).stdout)
        assert (found["num_samples"], found["num_dropped"], found["num_repeated"]) == (100, 0, 0)
        assert sum(share["num_samples"] for share in found["replicas"]) == 100


def test_the_balance_in_lengths_is_told_with_and_without_balancing(url: str) -> None:
    options = ["--batch", "64", "--world-size", "4", "--lengths", "number", "--json"]
    equal, balanced = (json.loads(run(url, *options, *more).stdout) for more in ([], ["--balance"]))
    assert 1.0 <= balanced["balance_costs"] < 1.01 < equal["balance_costs"]
    assert "in lengths" in run(url, *options[:-1]).stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "2", "--world-size", "4"], "cannot feed 4 replicas"),
        (["--batch", "8", "--mesh", "dp"], "--mesh"),
        (["--batch", "8", "--weights", "one"], "--weights"),
        (["--batch", "8", "--weights", "1,2"], "2 weights for 1 replicas"),
        (["--batch", "8", "--capacity", "9"], "need --lengths"),
        (["--batch", "8", "--lengths", "number", "--capacity", "9", "--budget", "9"], "give one"),
        (["--batch", "8", "--lengths", "number", "--balance", "--weights", "1"], "give one"),
        (["--batch", "8", "--lengths", "depth", "--capacity", "9"], "depth"),
        (["--batch", "8", "--where", "number is 5"], "--where"),
    ],
)
def test_bad_options_are_named(url: str, options: list[str], message: str) -> None:
    result = run(url, *options)
    assert result.exit_code == 2
    assert message in result.stderr
