"""`dataflow cache ls|du|pin|unpin|evict|resize` against a real server."""

import asyncio
import json

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

from cache.client import CacheClient
from cache.config import CacheConfig, TierConfig
from cache.testing import running_server
from connectors.errors import BadInputError, NotFoundError
from dataflow import ShardWriter
from dataflow.cli.cache import cache
from dataflow.cli.durations import parse_duration


@pytest.fixture
def dataset(tmp_path):
    """208 samples of 4 KiB in 13 blocks of one size, so that none finds room in memory beside what stays there."""
    schema = pa.schema({"x": pa.binary(4096)})
    with ShardWriter(str(tmp_path / "set"), schema, block_size_bytes=1 << 16, shard_size_bytes=1 << 19) as writer:
        for _ in range(208):
            writer.write({"x": np.random.bytes(4096)})
    return f"file://{tmp_path}/set"


@pytest.fixture
def run(tmp_path):
    """Runs a command against a server with memory and a disk, and says what it printed."""
    disk = TierConfig("disk", 64 << 20, path=str(tmp_path / "disk"), medium="nvme")
    with running_server(CacheConfig((TierConfig("ram", 1 << 19), disk))) as running:

        def run(*arguments, code=0):
            result = CliRunner().invoke(cache, [*arguments, "--socket", running.address])
            if isinstance(code, type):
                assert isinstance(result.exception, code), result.output
                return str(result.exception)
            assert result.exit_code == code, result.output
            return result.output

        run.address = running.address
        # What is on its way to the disk is counted when it is there.
        run.settle = lambda: asyncio.run_coroutine_threadsafe(running.server.engine.settle(), running.loop).result()
        yield run


def rows(output):
    return [json.loads(line) for line in output.splitlines()]


def test_what_is_held_is_listed_by_name_and_summed_up(run, dataset):
    run("warm", dataset)
    run.settle()
    (store,) = rows(run("ls", "--json"))
    assert (store["name"], store["blocks"]) == ("file:///", 13)
    assert [row["name"] for row in rows(run("ls", "/", "--json"))] == [f"file:///{dataset.split('/')[3]}/"]
    assert [row["name"] for row in rows(run("du", "/", "--json"))] == ["file:///"]
    shards = rows(run("ls", dataset, "--json"))
    assert sum(row["blocks"] for row in shards) == 13
    assert [row["name"] for row in shards] == sorted(row["name"] for row in shards)
    assert all(row["name"].startswith(f"{dataset}/") for row in shards)
    assert len(shards) == 2
    (whole,) = rows(run("du", dataset, "--json"))
    assert (whole["name"], whole["blocks"]) == (dataset, 13)
    assert whole["size_bytes"] == sum(tier["size_bytes"] for tier in whole["tiers"].values()) > 208 * 4096
    assert set(whole["tiers"]) == {"ram", "disk"}
    table = run("du", dataset, "/nothing/there")
    assert dataset in table
    assert "0 B" in table
    assert shards[0]["name"] in run("ls", dataset)
    assert "the cache holds nothing at or below file:///nothing" in run("ls", "/nothing", code=1)


def test_names_are_shown_as_they_are(run):
    name = "s3://bucket/[/b]/:tada:"
    assert name in run("du", name)
    run("pin", name, "--size", "1MiB")
    assert name in run("status")


def test_a_data_set_is_pinned_by_its_real_size_for_as_long_as_was_said(run, dataset):
    said = run("pin", dataset, "--for", "7d")
    assert "of which 0 B are here" in said
    run("warm", dataset)
    run.settle()
    status = run("status")
    assert f"{dataset}: " in status
    assert " until 20" in status
    with_blocks = json.loads(run("status", "--json"))
    (pin,) = with_blocks["retention"]["pins"]
    (whole,) = rows(run("du", dataset, "--json"))
    # What was promised is what the blocks take, to the last page.
    assert pin["size_bytes"] == whole["size_bytes"]
    # Memory may be pinned to four fifths.
    assert whole["pinned_bytes"] > whole["tiers"]["disk"]["size_bytes"]
    assert "not removed: 13 pinned blocks, and 0 on their way" in run("evict", dataset, code=1)
    assert "no longer pinned" in run("unpin", dataset)
    assert "not pinned" in run("unpin", dataset, code=NotFoundError)
    before = run("evict", dataset, "--dry-run")
    assert before.startswith("13 blocks")
    assert "removed: 13 blocks" in run("evict", dataset)
    assert rows(run("du", dataset, "--json"))[0]["blocks"] == 0


def test_one_block_is_counted_as_one(run, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n')
    place = str(tmp_path / "a.jsonl")
    assert "\n1 block, 9 B: " in run("warm", place)
    assert run("evict", place, "--dry-run").startswith("1 block, ")
    assert "removed: 1 block, " in run("evict", place)


def test_folders_objects_and_what_is_not_there_yet_can_be_pinned(run, tmp_path):
    (tmp_path / "files").mkdir()
    for name in "ab":
        (tmp_path / "files" / f"{name}.bin").write_bytes(b"x" * 5000)
    assert "16.0 KiB" in run("pin", str(tmp_path / "files"))
    assert "8.0 KiB" in run("pin", str(tmp_path / "files" / "a.bin"))
    assert "--size" in run("pin", str(tmp_path / "later"), code=BadInputError)
    assert "1.0 MiB" in run("pin", str(tmp_path / "later"), "--size", "1MiB")
    assert "pins may take" in run("pin", str(tmp_path / "much"), "--size", "1TiB", code=BadInputError)
    run("pin", "/x", "--size", "1", "--for", "soon", code=2)


def test_a_tier_is_resized_while_it_is_in_use(run, dataset):
    run("warm", dataset)
    run.settle()
    assert "disk may take 128.0 KiB" in run("resize", "disk", "128KiB")
    client = CacheClient(run.address)
    assert client.stats()["tiers"][1]["capacity_bytes"] == 128 << 10
    client.close()
    assert "no tier 'tape'" in run("resize", "tape", "1GiB", code=BadInputError)


def test_where_nothing_is_written_down_the_operator_is_told(tmp_path):
    with running_server(CacheConfig((TierConfig("ram", 1 << 20),))) as running:
        result = CliRunner().invoke(cache, ["pin", "/x", "--size", "1", "--socket", running.address])
        assert (result.exit_code, "it holds until the cache ends" in result.stderr) == (0, True)


@pytest.mark.parametrize("text", ["", "7", "d", "0s", "-1h", "1.5.2h", "nan d"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(text)


def test_durations_are_read_as_written():
    assert [parse_duration(text) for text in ("90s", "1.5 h", "7D", "2w")] == [90, 5400, 604800, 1209600]
