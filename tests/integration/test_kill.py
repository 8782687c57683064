"""kill -9 of whatever takes part in training: right bytes, no hang, nothing left over, and a cache that stays warm."""

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest

from cache.config import CacheConfig, TierConfig
from dataflow import DataLoader, ElasticBatchSampler, ShardWriter, open_dataset

NUM_SAMPLES = 1500
GLOBAL_BATCH = 16
BLOCK_BYTES = 80_000  # large enough to travel as a descriptor
EPOCHS = 2


@pytest.fixture
def tokens(tmp_path):
    """The rows of a dataset at `tmp_path/set`, each different."""
    rows = np.random.default_rng(1).integers(0, 2**16, (NUM_SAMPLES, 1000), np.uint16)
    field = pa.field("tokens", pa.fixed_shape_tensor(pa.uint16(), (1000,)), nullable=False)
    with ShardWriter(
        str(tmp_path / "set"), pa.schema([field]), block_size_bytes=BLOCK_BYTES, shard_size_bytes=1 << 20
    ) as writer:
        writer.write_batch(
            pa.record_batch([pa.FixedShapeTensorArray.from_numpy_ndarray(rows)], schema=pa.schema([field]))
        )
    return rows


def small_cache(folder):
    """Room for about two thirds, so that blocks come from memory, disk, the ring and the origin."""
    return CacheConfig(
        tiers=(
            TierConfig("ram", capacity_bytes=1 << 20),
            TierConfig("disk", capacity_bytes=1 << 20, path=str(folder / "cache"), medium="nvme"),
        ),
        ring_bytes=500_000,
    )


def batches_of(sampler, rows):
    """What an undisturbed run sees, from the order alone."""
    return [rows[batch] for batch in sampler]


@contextlib.contextmanager
def training(folder, *, num_workers, **options):
    dataset = open_dataset(folder / "set", cache=small_cache(folder), buffer_bytes=2 * BLOCK_BYTES)
    sampler = ElasticBatchSampler(dataset, GLOBAL_BATCH, seed=3, window_blocks=4)
    loader = DataLoader(
        dataset, batch_sampler=sampler, num_workers=num_workers, persistent_workers=num_workers > 0, **options
    )
    try:
        yield dataset, loader
    finally:
        dataset.reader.close()


def expected_batches(folder, rows):
    dataset = open_dataset(folder / "set")
    sampler = ElasticBatchSampler(dataset, GLOBAL_BATCH, seed=3, window_blocks=4)
    return [batch for _ in range(EPOCHS) for batch in batches_of(sampler, rows)]


def kill_and_wait(pid):
    process = psutil.Process(pid)
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(psutil.NoSuchProcess):
        process.wait(30)


@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
def test_training_goes_on_when_its_cache_server_is_killed(tmp_path, tokens, start_method):
    expected = expected_batches(tmp_path, tokens)
    moments = set(random.Random(start_method).sample(range(1, len(expected)), 2))
    servers = set()
    with training(tmp_path, num_workers=2, multiprocessing_context=start_method) as (dataset, loader):
        step = 0
        for _ in range(EPOCHS):
            for batch in loader:
                np.testing.assert_array_equal(batch["tokens"].numpy(), expected[step])
                step += 1
                if step in moments:
                    server = dataset.reader.stats()["server"]["pid"]
                    servers.add(server)
                    kill_and_wait(server)
        del loader
    assert step == len(expected)
    assert len(servers) == len(moments)


def test_training_goes_on_when_its_workers_are_killed(tmp_path, tokens):
    expected = expected_batches(tmp_path, tokens)
    moments = set(random.Random(5).sample(range(1, len(expected)), 4))
    with training(tmp_path, num_workers=2, on_worker_failure="restart") as (_, loader):
        step = 0
        for _ in range(EPOCHS):
            for batch in loader:
                np.testing.assert_array_equal(batch["tokens"].numpy(), expected[step])
                step += 1
                if step in moments:
                    worker = random.Random(step).choice(multiprocessing.active_children())
                    os.kill(worker.pid, signal.SIGKILL)
        del loader
    assert step == len(expected)


def test_a_run_that_follows_a_killed_server_finds_its_blocks_on_disk(tmp_path, tokens):
    disk = TierConfig("disk", capacity_bytes=64 << 20, path=str(tmp_path / "cache"), medium="nvme")
    requests, contents = [], []
    for _ in range(2):
        dataset = open_dataset(tmp_path / "set", cache=CacheConfig(tiers=(disk,)))
        refs = [dataset.index.block_ref(block) for block in range(dataset.index.num_blocks)]
        before = dataset.reader.stats()
        contents.append([bytes(data.view) for data in dataset.reader.read_blocks(refs)])
        after = dataset.reader.stats()
        requests.append(after["origin"]["requests"] - before["origin"]["requests"])
        while (now := dataset.reader.stats())["tiers"][0]["insertions"] < now["origin"]["blocks"]:
            pass  # blocks are handed out, and their space is taken, before they are written
        kill_and_wait(after["server"]["pid"])
        dataset.reader.close()
    assert requests[0] > 0
    assert requests[1] == 0
    assert contents[0] == contents[1]


RANK = textwrap.dedent("""
    import sys, os
    from pathlib import Path
    from cache.config import CacheConfig
    from dataflow import DataLoader, ElasticBatchSampler, open_dataset
    folder, config = sys.argv[1:]
    dataset = open_dataset(folder + "/set", cache=CacheConfig.from_json(config), buffer_bytes=0)
    sampler = ElasticBatchSampler(dataset, 16, seed=3, window_blocks=4)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=2)
    while True:
        for batch in loader:
            print(dataset.reader.stats()["server"]["pid"], flush=True)
""")


def test_a_killed_rank_leaves_no_process_no_shared_memory_and_no_locked_cache(tmp_path, tokens):
    config = small_cache(tmp_path)
    command = [sys.executable, "-P", "-c", RANK, str(tmp_path), config.to_json()]
    before = set(Path("/dev/shm").iterdir())
    rank = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    server = int(rank.stdout.readline())
    for _ in range(20):
        rank.stdout.readline()
    family = [psutil.Process(server), *psutil.Process(rank.pid).children(recursive=True)]
    address = family[0].cmdline()[-1]
    assert address in Path("/proc/net/unix").read_text()
    assert len(family) >= 3  # the server and two workers
    rank.kill()
    rank.wait()
    rank.stdout.close()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    assert set(Path("/dev/shm").iterdir()) <= before
    assert address not in Path("/proc/net/unix").read_text()
    with training(tmp_path, num_workers=0) as (_, loader):  # the directory is free again
        assert len(next(iter(loader))["tokens"]) == GLOBAL_BATCH
