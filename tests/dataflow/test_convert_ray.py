"""Conversions on a real Ray cluster: two nodes on this machine, in processes of their own.

The cluster's process is the driver of most tests too: it takes settings of conversions, one a line, and answers with
what `convert` returned or raised. Everything listens on loopback and lives in one temporary folder.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from connectors.errors import BadInputError
from dataflow.convert import convert, parse_rule
from dataflow.formats.arrow import ShardWriter

pytest.importorskip("ray")

COUNT = 120
SIZES = {"shard_size_bytes": 2000, "block_size_bytes": 500}

CLUSTER = """
import json, sys
from dataclasses import asdict

import ray
from ray.cluster_utils import Cluster

from connectors.errors import DataError
from dataflow.convert import convert, parse_rule

node = {"num_cpus": 1, "object_store_memory": 80 << 20, "plasma_directory": sys.argv[1], "node_ip_address": "127.0.0.1",
        "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=node)
try:
    cluster.add_node(**node)
    ray.init(cluster.address, log_to_driver=False)
    print(json.dumps({"address": cluster.address}), flush=True)
    for line in sys.stdin:
        settings = json.loads(line)
        sys.path[:0] = settings.pop("path", [])
        settings["rules"] = map(parse_rule, settings.pop("rules", []))
        try:
            answer = asdict(convert(engine="ray", **settings))
        except DataError as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
finally:
    ray.shutdown()
    cluster.shutdown()
"""

FUNCTIONS = """
import os, signal, time
from pathlib import Path

import pyarrow as pa

MARKERS = Path(__file__).parent

def meet(sample):
    # Tasks on two nodes meet here; a cluster that used one of them only would wait in vain.
    import ray
    (MARKERS / f"node-{ray.get_runtime_context().get_node_id()}").touch()
    deadline = time.monotonic() + 60
    while len(list(MARKERS.glob("node-*"))) < 2:
        if time.monotonic() > deadline:
            raise TimeoutError("only one node works")
        time.sleep(0.01)
    return sample

def die_once(sample):
    marker = MARKERS / "died"
    if sample["id"] == 70 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return sample

def fail(sample):
    if sample["id"] == 70:
        raise ValueError("seventy")
    return sample

# Declared, so that none is called by the driver, which otherwise looks at what they make of the first samples.
meet.schema = die_once.schema = fail.schema = pa.schema(
    [("id", pa.int64()), ("value", pa.float64()), ("text", pa.string())]
)
"""

Driver = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # a short name, as those of sockets have to be
        settings = {
            "RAY_TMPDIR": folder,
            "RAY_USAGE_STATS_ENABLED": "0",
            # Everything has the address 127.0.0.1 instead of the machine's own.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            # However full this machine's memory is, no task is ended for that.
            "RAY_memory_monitor_refresh_ms": "0",
        }
        yield {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | settings


@pytest.fixture(scope="module")
def cluster(environment: dict[str, str]) -> Iterator[subprocess.Popen]:
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER, environment["RAY_TMPDIR"]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    ) as process:
        environment["RAY_ADDRESS"] = answer(process)["address"]
        yield process
        process.stdin.close()
        assert process.wait() == 0


def answer(process: subprocess.Popen) -> dict[str, Any]:
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise AssertionError(f"the cluster ended with {process.wait()}")


@pytest.fixture
def drive(cluster: subprocess.Popen) -> Driver:
    def ask(src: Path, dst: Path, **settings: Any) -> dict[str, Any]:
        cluster.stdin.write(json.dumps({"src": str(src), "dst": str(dst)} | SIZES | settings) + "\n")
        cluster.stdin.flush()
        return answer(cluster)

    return ask


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "set"
    schema = pa.schema([pa.field("id", pa.int64()), pa.field("value", pa.float64()), pa.field("text", pa.string())])
    values = np.random.default_rng(0).normal(size=COUNT).tolist()
    with ShardWriter(path, schema, block_size_bytes=400) as writer:
        for number, value in enumerate(values):
            writer.write({"id": number, "value": value, "text": f"text {number % 50} " * 3})
    return path


@pytest.fixture
def functions(tmp_path: Path) -> str:
    # A module of its own for each test: the cluster's processes keep those that they have met.
    module = f"functions_{tmp_path.name}"
    (tmp_path / f"{module}.py").write_text(FUNCTIONS)
    return module


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_the_bytes_depend_on_neither_engine_nor_number_of_tasks(source: Path, tmp_path: Path, drive: Driver) -> None:
    rules = ["zscore field=value limit=1.6", "duplicates fields=text"]
    settings = SIZES | {"filter": "id > 5", "split": {"a": 3, "b": 1}, "shuffle": "full", "seed": 3}
    whole = convert(source, tmp_path / "local", workers=0, rules=map(parse_rule, rules), **settings)
    for name, workers in [("all", None), ("one", 1), ("many", 5)]:
        found = drive(source, tmp_path / name, workers=workers, rules=rules, **settings)
        assert "error" not in found, found
        assert (found["num_samples"], found["num_shards"]) == (whole.num_samples, whole.num_shards)
        assert content(tmp_path / name) == content(tmp_path / "local")


def test_all_nodes_work(source: Path, tmp_path: Path, functions: str, drive: Driver) -> None:
    found = drive(source, tmp_path / "out", map=f"{functions}:meet", path=[str(tmp_path)])
    assert found["num_samples"] == COUNT
    assert len(list(tmp_path.glob("node-*"))) == 2


def test_a_task_that_dies_is_done_again(source: Path, tmp_path: Path, functions: str, drive: Driver) -> None:
    convert(source, tmp_path / "local", workers=0, **SIZES)
    found = drive(source, tmp_path / "out", map=f"{functions}:die_once", path=[str(tmp_path)])
    assert (tmp_path / "died").exists()
    assert found["num_samples"] == COUNT
    shards = {name: data for name, data in content(tmp_path / "local").items() if name.startswith("shard")}
    assert {name: data for name, data in content(tmp_path / "out").items() if name.startswith("shard")} == shards


def test_what_a_task_raises_arrives(source: Path, tmp_path: Path, functions: str, drive: Driver) -> None:
    found = drive(source, tmp_path / "out", map=f"{functions}:fail", path=[str(tmp_path)])
    assert found["error"].startswith("DataError: map failed on sample 70")
    assert "seventy" in found["error"]
    assert not (tmp_path / "out" / "dataset.json").exists()
    found = drive(source, tmp_path / "skipped", map=f"{functions}:fail", on_error="skip", path=[str(tmp_path)])
    assert (found["num_samples"], found["num_errors"]) == (COUNT - 1, 1)


KILLED_AT = """
import os, signal, sys
from dataflow.convert import convert

def kill(state):
    if state.shards == 2:
        os.kill(os.getpid(), signal.SIGKILL)

# One task at a time, so that none is left when the driver is killed.
convert(sys.argv[1], sys.argv[2], engine="ray", workers=1, progress=kill, shard_size_bytes=2000,
        block_size_bytes=500)
"""


def test_a_killed_driver_leaves_what_a_resumed_conversion_goes_on_with(
    source: Path, tmp_path: Path, environment: dict[str, str], cluster: subprocess.Popen
) -> None:
    path = tmp_path / "out"
    command = [sys.executable, "-c", KILLED_AT, str(source), str(path)]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    assert not (path / "dataset.json").exists()
    command = [sys.executable, "-m", "dataflow", "convert", str(source), str(path), "--engine", "ray"]
    command += ["--resume", "--json", "--shard-size", "2000", "--block-size", "500"]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    assert json.loads(done.stdout.splitlines()[-1])["num_resumed"] >= 2
    convert(source, tmp_path / "local", workers=0, **SIZES)
    assert content(path) == content(tmp_path / "local")


# Without a cluster


def test_without_ray_the_error_names_the_extra(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BadInputError, match=r"pip install 'tiered-dataflow\[ray\]'"):
        convert(source, tmp_path / "out", engine="ray")
    assert not (tmp_path / "out").exists()


def test_without_a_cluster_the_error_says_how_to_get_one(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: object) -> None:
        raise ConnectionError("nobody is there")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=init))
    with pytest.raises(BadInputError, match="ray start --head"):
        convert(source, tmp_path / "out", engine="ray")


def test_an_engine_that_is_none_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="engine must be one of local, ray, got 'spark'"):
        convert(source, tmp_path / "out", engine="spark")


def test_a_dry_run_needs_no_cluster(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert convert(source, tmp_path / "out", engine="ray", dry_run=True).num_samples == COUNT


def test_samples_of_this_process_are_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))
    with pytest.raises(BadInputError, match="in this process alone"):
        convert([{"x": 1}], tmp_path / "out", engine="ray")
    with pytest.raises(BadInputError, match="memory:// lives in one process"):
        convert(source, "memory://ray/out", engine="ray")
