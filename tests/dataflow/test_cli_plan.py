import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner, Result

from dataflow.cli.main import main
from dataflow.formats.arrow import ShardWriter


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("plan") / "set", 1000)


def write(folder: Path, num_samples: int) -> str:
    schema = pa.schema([("number", pa.int64())])
    with ShardWriter(folder, schema, block_size_bytes=256) as writer:
        for number in range(num_samples):
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
    assert balanced["equal_costs"] == equal["equal_costs"] == equal["balance_costs"]
    assert "in costs" in run(url, *options[:-1]).stdout


def test_measured_costs_are_balanced(url: str, tmp_path: Path) -> None:
    costs = tmp_path / "costs.npy"
    np.save(costs, np.random.default_rng(0).lognormal(0, 1, 1000).astype(np.float32))
    options = ["--batch", "64", "--world-size", "4", "--json", "--costs", str(costs), "--balance"]
    found = json.loads(run(url, *options).stdout)
    assert found["balance_costs"] < 1.1 < 1.2 < found["equal_costs"]
    np.save(costs, np.ones(999))
    assert "each of the 1000 samples" in run(url, *options).stderr


def test_a_mixture_is_checked_by_the_epochs_of_its_datasets(url: str, other_url: str) -> None:
    options = ["--batch", "40", "--world-size", "2", "--shares", "3,1", "--epoch-samples", "2000", "--epoch", "1"]
    result = CliRunner().invoke(main, ["plan", url, other_url, *options, "--json"])
    found = json.loads(result.stdout)
    assert (found["num_steps"], found["num_dropped"], found["num_repeated"]) == (50, 0, 0)
    assert [source["num_reads"] for source in found["sources"]] == [1500, 500]
    assert [source["own_epochs"] for source in found["sources"]] == [2, 5]
    shown = CliRunner().invoke(main, ["plan", url, other_url, *options]).stdout
    assert "once in each epoch of its own dataset" in shown
    assert "0.7500" in shown


def test_urls_of_a_mixture_are_shown_as_they_are(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("[").mkdir()
    for name in ("[/x]", ":x:"):
        Path(name).symlink_to(url)
    shown = run("[/x]", ":x:", "--batch", "64").stdout
    assert "[/x]" in shown
    assert ":x:" in shown


def test_temperature_filters_and_packs_go_with_mixtures(url: str, other_url: str) -> None:
    options = ["--batch", "8", "--temperature", "2", "--period", "100", "--where", "number > 0", "--json"]
    packs = ["--lengths", "number", "--capacity", "1000"]
    found = json.loads(CliRunner().invoke(main, ["plan", url, other_url, *options, *packs]).stdout)
    assert [source["num_samples"] for source in found["sources"]] == [999, 99]
    assert found["sources"][1]["share"] == pytest.approx(0.24, abs=0.01)
    assert (found["num_dropped"], found["num_repeated"]) == (0, 0)


@pytest.fixture(scope="module")
def other_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("other") / "set", 100)


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
        (["--batch", "8", "--balance"], "--balance needs"),
        (["--batch", "8", "--temperature", "2"], "mix several datasets"),
        (["--batch", "8", "--temperature", "2", "--shares", "1,2"], "give one"),
    ],
)
def test_bad_options_are_named(url: str, options: list[str], message: str) -> None:
    result = run(url, *options)
    assert result.exit_code == 2
    assert message in result.stderr
