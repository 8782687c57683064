"""`dataflow cache` for operators: warm, verify, top and drain, against a real daemon."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

from cache.client import CacheClient
from cache.config import CacheConfig, TierConfig
from cache.testing import running_server
from dataflow import ShardWriter
from dataflow.cli.cache import cache
from dataflow.cli.cache_top import view
from dataflow.cli.sizes import format_size
from dataflow.dataset.warming import warm
from dataflow.formats import open_source


def run(*arguments):
    return CliRunner().invoke(cache, arguments)


def stats_at(address):
    return json.loads(run("status", "--json", "--socket", address).output)


@pytest.fixture
def dataset(tmp_path):
    """1,000 samples of 4 KiB in blocks of 64 KiB."""
    schema = pa.schema({"x": pa.binary(4096)})
    with ShardWriter(str(tmp_path / "set"), schema, block_size_bytes=1 << 16, shard_size_bytes=1 << 20) as writer:
        for _ in range(1000):
            writer.write({"x": np.random.bytes(4096)})
    return f"file://{tmp_path}/set"


def test_warm_loads_all_once_and_finds_it_the_next_time(tmp_path, dataset):
    with running_server(CacheConfig((TierConfig("ram", 64 << 20),))) as running:
        first = run("warm", dataset, "--socket", running.address)
        assert first.exit_code == 0, first.output
        assert "0 B were here" in first.output
        assert "100.0%" in first.output
        fetched = stats_at(running.address)["origin"]["bytes"]
        second = run("warm", dataset, "--socket", running.address, "--no-check")
        assert second.exit_code == 0
        assert "0 B came from the origin" in second.output
        # Only the manifest is read anew.
        assert stats_at(running.address)["origin"]["bytes"] - fetched < 100_000


def test_warm_that_was_interrupted_goes_on_where_it_stopped(dataset, monkeypatch):
    monkeypatch.setattr("dataflow.dataset.warming._WINDOW_BLOCKS", 8)
    with (
        running_server(CacheConfig((TierConfig("ram", 64 << 20),))) as running,
        contextlib.closing(CacheClient(running.address)) as client,
    ):
        progress = warm(open_source(dataset, client).index, client)
        loaded = [next(progress) for _ in range(4)]
        progress.close()
        assert [done.blocks for done in loaded] == [0, 8, 16, 24]
        assert all(done.size_bytes == done.fetched_bytes < done.num_bytes for done in loaded)
        result = run("warm", dataset, "--socket", running.address)
        assert result.exit_code == 0, result.output
        rest_bytes = loaded[-1].num_bytes - loaded[-1].fetched_bytes
        said = f"{format_size(rest_bytes)} came from the origin, {format_size(loaded[-1].fetched_bytes)} were here"
        assert said in result.output
        assert "100.0%" in result.output


def test_warm_finds_a_damaged_block_and_has_it_fetched_again(tmp_path, dataset):
    disk = TierConfig("disk", 64 << 20, path=str(tmp_path / "disk"), medium="nvme")
    with running_server(CacheConfig((disk,))) as running:
        run("warm", dataset, "--socket", running.address, "--no-check")
        asyncio.run_coroutine_threadsafe(running.server.engine.settle(), running.loop).result()
        blocks = stats_at(running.address)["origin"]["blocks"]
        victim, *_ = sorted((tmp_path / "disk" / "blocks-1").glob("*/*"))
        damaged = bytearray(victim.read_bytes())
        damaged[500] ^= 1
        victim.write_bytes(damaged)
        assert "checked: the tiers hold" in run("warm", dataset, "--socket", running.address).output
        assert stats_at(running.address)["origin"]["blocks"] == blocks + 1
        assert stats_at(running.address)["tiers"][0]["corrupt"] == 1


def test_warm_refuses_at_once_what_cannot_fit(dataset):
    with running_server(CacheConfig((TierConfig("ram", 1 << 20),))) as running:
        result = run("warm", dataset, "--socket", running.address)
        assert "the tiers of this cache hold 1048576" in str(result.exception)
        assert stats_at(running.address)["blocks_requested"] == 0


def test_warm_says_what_other_data_left_no_room_for(tmp_path, dataset):
    schema = pa.schema({"x": pa.binary(4096)})
    with ShardWriter(str(tmp_path / "other"), schema, block_size_bytes=1 << 16, shard_size_bytes=1 << 20) as writer:
        for _ in range(1000):
            writer.write({"x": np.random.bytes(4096)})
    with running_server(CacheConfig((TierConfig("ram", 5 << 20),), ring_bytes=0)) as running:
        assert run("warm", dataset, "--socket", running.address).exit_code == 0
        result = run("warm", f"file://{tmp_path}/other", "--socket", running.address)
        assert result.exit_code == 1
        assert "not let in" in result.output
        assert "100.0%" not in result.output


def test_verify_reads_the_directory_beside_its_server(tmp_path, dataset):
    disk = TierConfig("disk", 64 << 20, path=str(tmp_path / "disk"), medium="nvme")
    with running_server(CacheConfig((disk,))) as running:
        assert run("warm", dataset, "--socket", running.address).exit_code == 0
        assert run("verify", str(tmp_path / "disk")).exit_code == 0
        (tmp_path / "[").mkdir()
        (tmp_path / "[" / "disk]").symlink_to(tmp_path / "disk")  # to what shows the bar, the end of a style
        assert run("verify", str(tmp_path / "[" / "disk]")).exit_code == 0
        victim = next((tmp_path / "disk" / "blocks-1").glob("*/*"))
        victim.write_bytes(victim.read_bytes()[:-1])
        result = run("verify", str(tmp_path / "disk"), "--remove")
        assert (result.exit_code, victim.exists()) == (1, False)
        assert f"removed: {victim}" in result.output
        # The server notices by itself.
        assert run("warm", dataset, "--socket", running.address).exit_code == 0


def test_top_shows_each_tier_and_leaves_each_view_where_there_is_no_terminal(dataset):
    with running_server(CacheConfig((TierConfig("fast", 64 << 20),))) as running:
        run("warm", dataset, "--socket", running.address)
        result = run("top", "--socket", running.address, "--interval", "0.05", "--count", "2")
        assert result.exit_code == 0, result.output
        assert "fast" in result.output
        assert result.output.count("found here") == 2


def test_rates_are_differences_over_time_and_a_restart_is_no_negative_rate():
    def stats(pid, asked, hits):
        tier = {"name": "ram", "used_bytes": 0, "capacity_bytes": 10, "blocks": 1, "fault": None}
        tier |= {"hits": hits, "hit_bytes": 0, "written_bytes": 0, "evictions": 0}
        return {
            "tiers": [tier],
            "ring": {**tier, "name": "ring", "hits": 0},
            "origin": {"requests": 0, "bytes": 0, "errors": 0},
            "server": {"pid": pid, "uptime_s": 1.0, "connections": 1, "requests": asked},
            "blocks_requested": asked,
        }

    assert "20 blocks/s asked for, 50.0% found here" in str(
        view("@x", stats(1, 0, 0), stats(1, 40, 20), 2.0).renderables[2]
    )
    assert "0 blocks/s asked for" in str(view("@x", stats(1, 40, 20), stats(2, 10, 5), 2.0).renderables[2])


def test_drain_ends_the_daemon_and_waits_for_it(tmp_path):
    address = str(tmp_path / "cache.sock")
    command = [sys.executable, "-m", "dataflow", "cache", "serve", "--socket", address]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert "listening" in process.stderr.readline()
        result = run("drain", "--socket", address)
        assert result.exit_code == 0, result.output
        assert str(process.pid) in result.output
        assert process.wait() == 0
    assert not os.path.exists(address)
    assert run("drain", "--socket", address).exit_code != 0
