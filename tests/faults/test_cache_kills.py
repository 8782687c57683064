"""Servers and clients killed and stopped at any moment: every byte right, no hang, nothing left behind."""

import contextlib
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from crc32c import crc32c

from cache.access import open_reader
from cache.address import answers, private_address, unused_address
from cache.client import CacheClient, ClientOptions
from cache.config import CacheConfig, TierConfig
from cache.fallback import FallbackReader
from cache.keys import BlockRef
from cache.testing import read_until_told, running_server, send_blocks
from connectors.bridge import run_sync
from connectors.objects import normalise_url
from connectors.registry import open_store
from connectors.wrappers import CountingStore

BLOCK = 150_000
METHODS = ("fork", "fork", "spawn", "forkserver")

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def make_data(path: Path, blocks: int) -> list[BlockRef]:
    data = os.urandom(BLOCK * blocks)
    path.write_bytes(data)
    return describe(normalise_url(path), data)


def describe(uri: str, data: bytes) -> list[BlockRef]:
    return [
        BlockRef(uri, "digest", begin, BLOCK, crc32c(data[begin : begin + BLOCK]))
        for begin in range(0, len(data), BLOCK)
    ]


def tiers_of(directory: Path) -> CacheConfig:
    """A little memory and a disk for all, so that both and eviction are on the road."""
    memory = TierConfig("ram", 4 * BLOCK)
    return CacheConfig((memory, TierConfig("disk", 64 << 20, path=str(directory), medium="nvme")))


class Readers:
    """Processes that read until they are told to stop."""

    def __init__(self, reader, refs: Sequence[BlockRef], methods: Sequence[str]) -> None:
        self.processes = []
        self._channels = []
        for method in methods:
            context = multiprocessing.get_context(method)
            here, there = context.Pipe()
            process = context.Process(target=read_until_told, args=(reader, refs, there))
            process.start()
            there.close()
            self.processes.append(process)
            self._channels.append(here)

    def wait_until_reading(self) -> None:
        for channel in self._channels:
            assert channel.recv() == "ready"

    def stop(self) -> list[int]:
        """Rounds that each made; fails with what went wrong in one."""
        for channel in self._channels:
            with contextlib.suppress(BrokenPipeError):  # it has said already what went wrong
                channel.send("stop")
        rounds = [channel.recv() for channel in self._channels]
        for process in self.processes:
            process.join()
        assert all(isinstance(count, int) for count in rounds), rounds
        return rounds


def processes_at(address: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if address in process.cmdline():
                found.append(process)
    return found


def wait_for_the_end(address: str) -> None:
    for process in processes_at(address):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.wait(timeout=20)
    assert not processes_at(address)
    assert not answers(address)


@pytest.mark.slow
def test_readers_survive_a_server_that_is_killed_again_and_again(tmp_path):
    refs, config = make_data(tmp_path / "data.bin", 24), tiers_of(tmp_path / "cache")
    control = CacheClient(private_address(config), private=config)
    readers = Readers(control, refs, METHODS)
    readers.wait_until_reading()
    chance, pause = random.Random(7), threading.Event()
    killed = set()
    for _ in range(6):
        pid = control.stats()["server"]["pid"]
        pause.wait(chance.uniform(0, 0.2))  # not to wait for something, but to hit it anywhere
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        killed.add(pid)
    assert min(readers.stop()) >= 1
    assert len(killed) == 6
    while {block.source for block in control.read_blocks(refs)} - {"ram", "disk"}:
        pass  # until all has been kept
    control.close()
    wait_for_the_end(control.address)

    with contextlib.closing(open_reader(tmp_path / "data.bin", config)) as again:
        blocks = again.read_blocks(refs)
        # What only memory held went with its server.
        on_disk = [block for block in blocks if block.source == "disk"]
        assert len(on_disk) >= len(refs) - 4
        assert again.stats()["origin"]["requests"] <= len(refs) - len(on_disk)
        assert b"".join(bytes(block.view) for block in blocks) == (tmp_path / "data.bin").read_bytes()
    wait_for_the_end(private_address(config))
    assert not list((tmp_path / "cache" / "tmp").iterdir())


def test_what_a_killed_server_had_on_disk_costs_the_next_no_request(tmp_path):
    refs = make_data(tmp_path / "data.bin", 10)
    config = CacheConfig((TierConfig("disk", 64 << 20, path=str(tmp_path / "cache"), medium="nvme"),))
    with contextlib.closing(open_reader(tmp_path / "data.bin", config)) as reader:
        while {block.source for block in reader.read_blocks(refs)} != {"disk"}:
            pass
        os.kill(reader.stats()["server"]["pid"], signal.SIGKILL)
        blocks = reader.read_blocks(refs)
        while reader.stats()["tiers"][0]["scanning"]:
            pass
        assert b"".join(bytes(block.view) for block in blocks) == (tmp_path / "data.bin").read_bytes()
        assert reader.stats()["origin"]["requests"] == 0


def test_killed_clients_leave_no_descriptor_in_the_server(tmp_path):
    refs, config = make_data(tmp_path / "data.bin", 24), tiers_of(tmp_path / "cache")
    control = CacheClient(private_address(config), private=config)
    while {block.source for block in control.read_blocks(refs)} - {"ram", "disk"}:
        pass
    server = psutil.Process(control.stats()["server"]["pid"])
    before = server.num_fds()
    chance, pause = random.Random(11), threading.Event()
    for method in ("fork", "spawn", "fork", "forkserver", "fork", "fork"):
        readers = Readers(control, refs, [method] * 2)
        readers.wait_until_reading()
        pause.wait(chance.uniform(0, 0.05))
        for process in readers.processes:
            process.kill()
            process.join()
    while control.stats()["server"]["connections"] > 1:
        pass
    assert len(control.read_blocks(refs)) == 24
    while server.num_fds() > before:  # reads that had begun for the dead end by themselves
        pause.wait(0.01)
    assert control.stats()["server"]["pid"] == server.pid
    control.close()
    wait_for_the_end(control.address)


def test_a_private_server_ends_when_all_its_users_are_killed(tmp_path):
    refs = make_data(tmp_path / "data.bin", 8)
    client = CacheClient(unused_address(), private=CacheConfig())
    readers = Readers(client, refs, METHODS)
    readers.wait_until_reading()
    for process in readers.processes:
        process.kill()
        process.join()
    wait_for_the_end(client.address)


@pytest.mark.parametrize("blocks_each", [1, 4])
def test_eight_processes_that_want_the_same_cold_objects_cause_one_fetch_a_block(tmp_path, blocks_each):
    refs = [ref for number in range(10) for ref in make_data(tmp_path / f"{number}.bin", blocks_each)]
    stores = []

    def counting(url):
        stores.append(CountingStore(open_store(url)))
        return stores[-1]

    config = CacheConfig((TierConfig("ram", 64 << 20),))
    with running_server(config, store_opener=counting) as running:
        children = []
        for number in range(8):
            context = multiprocessing.get_context(METHODS[number % len(METHODS)])
            here, there = context.Pipe()
            child = context.Process(target=send_blocks, args=(CacheClient(running.address), refs, there))
            child.start()
            there.close()
            children.append((child, here))
        for child, here in children:
            assert [crc32c(here.recv_bytes()) for _ in refs] == [ref.crc32c for ref in refs]
            child.join()
        with contextlib.closing(CacheClient(running.address)) as client:
            origin = client.stats()["origin"]
        [store] = stores
        assert store.bytes["get_range"] + store.bytes["get_ranges"] == origin["bytes"] == BLOCK * len(refs)
        assert store.requests["get_range"] + store.requests["get_ranges"] == origin["requests"] == 10


@contextlib.contextmanager
def daemon(address: str):
    start = "from dataflow.cli.main import main; main()"
    command = [sys.executable, "-c", start, "cache", "serve", "--socket", address, "--ram", "8MiB"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        try:
            process.stderr.readline()
            yield process
        finally:
            process.kill()


def test_readers_of_a_daemon_that_dies_go_on_and_come_back(tmp_path, caplog):
    refs, address = make_data(tmp_path / "data.bin", 6), str(tmp_path / "cache.sock")
    private = CacheClient(unused_address(), private=CacheConfig())
    rungs = [("the daemon", CacheClient(address)), ("a private server", private)]
    reader = FallbackReader(rungs, retry_s=0, slow_s=60, greeting_s=60)
    with contextlib.closing(reader):
        pids = []
        with daemon(address) as first:
            pids.append(reader.stats()["server"]["pid"] == first.pid)
            reader.read_blocks(refs)
            first.kill()
            first.wait()
            assert [crc32c(block.view) for block in reader.read_blocks(refs)] == [ref.crc32c for ref in refs]
            pids.append(reader.stats()["server"]["pid"] == first.pid)
        with daemon(address) as second:
            reader.read_blocks(refs)
            pids.append(reader.stats()["server"]["pid"] == second.pid)
        assert pids == [True, False, True]
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2


def test_readers_of_a_daemon_that_is_stopped_go_on(tmp_path, caplog):
    refs, address = make_data(tmp_path / "data.bin", 6), str(tmp_path / "cache.sock")
    hasty = CacheClient(address, options=ClientOptions(silence_timeout_s=0.3))
    private = CacheClient(unused_address(), private=CacheConfig())
    reader = FallbackReader([("the daemon", hasty), ("a private server", private)])
    with daemon(address) as process, contextlib.closing(reader):
        reader.read_blocks(refs)
        process.send_signal(signal.SIGSTOP)
        assert [crc32c(block.view) for block in reader.read_blocks(refs)] == [ref.crc32c for ref in refs]
    assert "stopped or stuck; going on with a private server" in caplog.text


@pytest.mark.s3
def test_blocks_of_an_object_store_survive_kills_too(s3_server, s3_bucket, tmp_path, monkeypatch):
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    data = os.urandom(BLOCK * 16)

    async def upload():
        store = open_store(f"s3://{s3_bucket}")
        await store.put("set/data.bin", data)
        await store.close()

    run_sync(upload())
    refs, config = describe(f"s3://{s3_bucket}/set/data.bin", data), tiers_of(tmp_path / "cache")
    control = CacheClient(private_address(config), private=config)
    assert control.read_object(refs[0].uri).data == data
    # Not forked: the upload has used the native client in this process. Not from a fork server: it has the environment
    # of its own start, without the credentials, and so would a server that its children start.
    readers = Readers(control, refs, ("spawn", "spawn"))
    readers.wait_until_reading()
    pause = threading.Event()
    for _ in range(3):
        pid = control.stats()["server"]["pid"]
        pause.wait(0.05)
        os.kill(pid, signal.SIGKILL)
    readers.stop()
    control.close()
    wait_for_the_end(control.address)
