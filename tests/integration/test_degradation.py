"""Every rung of the ladder under a training loop: right bytes, no hang, a warning that says it, and the way back up.

The loop is never restarted: what the reader falls back to, and when it returns, is its own affair.
"""

import contextlib
import logging
import os
import secrets
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pyarrow as pa
import pytest

from cache.client import CacheClient, ClientOptions
from cache.config import CacheConfig, TierConfig
from cache.fallback import FallbackReader
from cache.testing import running_server
from connectors.errors import BadInputError, NotFoundError
from dataflow import DataLoader, ElasticBatchSampler, ShardWriter, open_dataset

NUM_SAMPLES = 800
GLOBAL_BATCH = 16
STEPS = NUM_SAMPLES // GLOBAL_BATCH
BLOCK_BYTES = 80_000


@pytest.fixture
def rows(tmp_path):
    """The rows of a dataset at `tmp_path/set`, each different."""
    values = np.random.default_rng(2).integers(0, 2**16, (NUM_SAMPLES, 1000), np.uint16)
    schema = pa.schema([pa.field("tokens", pa.fixed_shape_tensor(pa.uint16(), (1000,)), nullable=False)])
    with ShardWriter(str(tmp_path / "set"), schema, block_size_bytes=BLOCK_BYTES, shard_size_bytes=1 << 19) as writer:
        writer.write_batch(pa.record_batch([pa.FixedShapeTensorArray.from_numpy_ndarray(values)], schema=schema))
    return values


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Readers that give a silent server one second, and look for a lost one at once; each batch asks for itself."""
    options = ClientOptions(silence_timeout_s=1.0)
    monkeypatch.setattr("cache.access.CacheClient", partial(CacheClient, options=options))
    monkeypatch.setattr("cache.access.FallbackReader", partial(FallbackReader, retry_s=0.001, slow_s=60.0))
    monkeypatch.setattr("dataflow.loaders.pace.MAX_BATCHES", 1)


@pytest.fixture
def address(tmp_path):
    return f"@{tmp_path.name[-30:]}-{secrets.token_hex(8)}"


@contextlib.contextmanager
def daemon(address, *options):
    command = [sys.executable, "-m", "dataflow", "cache", "serve", "--socket", address, "--ram", "1MiB", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert "listening" in process.stderr.readline()
            yield process
        finally:
            process.kill()


def train(tmp_path, rows, cache, actions, *, epochs=2, num_workers=0):
    """Train for some epochs, compare every batch, and do `actions[step]` after that step."""
    # Of its own, so small that each epoch reads the blocks again.
    dataset = open_dataset(tmp_path / "set", cache=cache, buffer_bytes=2 * BLOCK_BYTES)
    order = ElasticBatchSampler(dataset, GLOBAL_BATCH, seed=3, window_blocks=4)
    expected = [batch for _ in range(epochs) for batch in order]
    sampler = ElasticBatchSampler(dataset, GLOBAL_BATCH, seed=3, window_blocks=4)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, persistent_workers=num_workers > 0)
    step = 0
    try:
        for _ in range(epochs):
            for batch in loader:
                np.testing.assert_array_equal(batch["tokens"].numpy(), rows[expected[step]])
                step += 1
                if step in actions:
                    actions[step](dataset)
    finally:
        del loader
        dataset.reader.close()
    assert step == epochs * STEPS


def requests_at(address):
    client = CacheClient(address)
    with contextlib.closing(client):
        return client.stats()["server"]["requests"]


def test_a_daemon_that_stutters_is_waited_for(tmp_path, rows, address, caplog, monkeypatch):
    # However long this machine takes to wake it.
    monkeypatch.setattr("cache.access.CacheClient", CacheClient)
    monkeypatch.setattr("cache.access.FallbackReader", partial(FallbackReader, slow_s=60.0))
    with daemon(address) as process:
        # Asleep until the loop's own next read has waited for it a moment.
        def stutter(dataset):
            process.send_signal(signal.SIGSTOP)
            wakers.append(subprocess.Popen(["sh", "-c", f"sleep 0.2; kill -CONT {process.pid}"]))

        wakers = []
        with caplog.at_level(logging.WARNING):
            train(tmp_path, rows, address, dict.fromkeys((5, 20, 60), stutter))
        for waker in wakers:
            assert waker.wait() == 0
    assert caplog.text == ""


def test_a_slow_daemon_is_left_tried_and_returned_to(tmp_path, rows, address, caplog, monkeypatch):
    clock = {"now_s": 0.0, "answer_s": 0.0}
    ladder = partial(FallbackReader, retry_s=30.0, greeting_s=60.0, clock=lambda: clock["now_s"])
    monkeypatch.setattr("cache.access.FallbackReader", ladder)
    monkeypatch.setattr("cache.access.CacheClient", CacheClient)
    asked = []
    with running_server(CacheConfig((TierConfig("ram", 8 << 20),)), address=address) as running:
        get_many = running.server.engine.get_many

        async def dawdle(refs, **options):
            asked.append(clock["now_s"])
            found = await get_many(refs, **options)
            clock["now_s"] += clock["answer_s"]
            return found

        running.server.engine.get_many = dawdle

        def slow_down(dataset):
            clock["answer_s"] = 5.0

        def look_again(dataset):
            clock["now_s"] += 30

        def recover(dataset):
            look_again(dataset)
            clock["answer_s"] = 0.0

        # While the first epoch comes from the origin, that is to blame, as the daemon greets at once.
        actions = {5: slow_down, STEPS + 20: look_again, STEPS + 25: recover}
        with caplog.at_level(logging.WARNING):
            train(tmp_path, rows, address, actions, epochs=3)
    name = f"the cache server at {address}"
    assert [record.message for record in caplog.records] == [
        f"{name} is slow: it was 3 times in a row; going on with a private server with 1024 MiB of memory",
        f"{name} is back",
    ]
    assert len(asked) > 2 * STEPS // 3


def test_a_stopped_daemon_is_left_and_returned_to(tmp_path, rows, address, caplog):
    seen = {}
    with daemon(address) as process:

        def stop(dataset):
            process.send_signal(signal.SIGSTOP)

        def go_on(dataset):
            process.send_signal(signal.SIGCONT)
            seen["requests"] = requests_at(address)

        with caplog.at_level(logging.WARNING):
            # Few steps: each asks the silent server first, here.
            train(tmp_path, rows, address, {5: stop, 9: go_on})
        assert requests_at(address) > seen["requests"] + STEPS // 2
    assert "is stopped or stuck" in caplog.text
    assert "going on with a private server" in caplog.text
    assert f"the cache server at {address} is back" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_killed_daemon_is_replaced_and_its_successor_used(tmp_path, rows, address, caplog, num_workers):
    with contextlib.ExitStack() as daemons:
        first = daemons.enter_context(daemon(address))

        def kill(dataset):
            first.kill()
            first.wait()

        def restart(dataset):
            daemons.enter_context(daemon(address))

        with caplog.at_level(logging.WARNING):
            train(tmp_path, rows, address, {10: kill, 40: restart}, num_workers=num_workers)
        assert requests_at(address) > STEPS // 4
    if num_workers == 0:  # else the workers say it, on their own standard error
        assert "going on with a private server" in caplog.text
        assert "is back" in caplog.text


def disk_when(address, condition):
    """The numbers of the daemon's disk, once they are so."""
    deadline = time.monotonic() + 120
    with contextlib.closing(CacheClient(address)) as client:
        while not condition(disk := next(tier for tier in client.stats()["tiers"] if tier["name"] == "disk")):
            assert time.monotonic() < deadline, disk
            time.sleep(0.02)
    return disk


def test_without_its_directory_a_cache_passes_through_and_has_it_again_when_it_is_made_anew(tmp_path, rows, address):
    path = tmp_path / "disk"
    with daemon(address, "--disk", str(path), "--disk-size", "64MiB") as process:

        def lose(dataset):
            # At once, whatever is being written.
            path.rename(tmp_path / "gone")

        train(tmp_path, rows, address, {20: lose}, epochs=3)
        lost = disk_when(address, lambda disk: disk["state"] == "down")
        assert f"No such file or directory: '{path}" in lost["state_reason"]
        assert not path.exists()
        path.mkdir()
        found = disk_when(address, lambda disk: disk["state"] == "normal" and not disk["scanning"])
        assert found["blocks"] == 0
        train(tmp_path, rows, address, {}, epochs=1)
        disk_when(address, lambda disk: disk["insertions"] > found["insertions"])
        process.terminate()
        said = process.stderr.read()
    assert f"No such file or directory: '{path}" in said
    assert "reads go on without it" in said
    assert list((path / "blocks-1").glob("*/*"))


def test_a_directory_that_cannot_be_is_refused_by_name_before_the_first_step(tmp_path, rows):
    (tmp_path / "file").write_text("not a folder")
    disk = TierConfig("disk", 1 << 20, path=str(tmp_path / "file" / "x"), medium="nvme")
    with pytest.raises(BadInputError, match="not a directory"):
        train(tmp_path, rows, CacheConfig((disk,)), {})


def test_what_is_cached_outlives_its_origin_and_the_rest_is_a_clear_error(tmp_path, rows, address):
    with daemon(address, "--disk", str(tmp_path / "disk"), "--disk-size", "64MiB"):

        def take_away(dataset):
            os.rename(tmp_path / "set", tmp_path / "away")

        def bring_back(dataset):
            os.rename(tmp_path / "away", tmp_path / "set")

        # The first epoch caches all; the second reads without an origin.
        train(tmp_path, rows, address, {STEPS: take_away, 2 * STEPS: bring_back}, epochs=3)
    with daemon(address):
        dataset = open_dataset(tmp_path / "set", cache=address)
        take_away(dataset)
        with contextlib.closing(dataset.reader):
            with pytest.raises(NotFoundError, match="set/"):
                dataset[0]
            bring_back(dataset)
            np.testing.assert_array_equal(dataset[0]["tokens"], rows[0])
