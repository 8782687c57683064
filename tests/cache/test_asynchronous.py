"""The synchronous reader's bytes and errors, for tasks of any loop; a cancelled call leaves nothing behind."""

import asyncio
import contextlib
import multiprocessing
import os
import pickle
import signal
import threading

import pytest
from crc32c import crc32c

from cache import open_async_reader
from cache.address import unused_address
from cache.asynchronous import AsyncReader
from cache.client import CacheClient
from cache.config import CacheConfig, TierConfig
from cache.connection import ServerGoneError
from cache.fallback import FallbackReader
from cache.in_place import InPlaceReader
from cache.keys import BlockRef
from cache.server import ServerLimits
from cache.testing import running_server, send_awaited_blocks, until
from connectors.errors import BadInputError, NotFoundError
from connectors.objects import normalise_url

RAM = CacheConfig((TierConfig("ram", 16 << 20),))
SIZES = (1000, 70_000, 600_000)


@pytest.fixture
def refs(tmp_path):
    path = tmp_path / "data.bin"
    path.write_bytes(os.urandom(1 << 20))
    data, found, begin = path.read_bytes(), [], 0
    for length in SIZES:
        found.append(BlockRef(normalise_url(path), "digest", begin, length, crc32c(data[begin : begin + length])))
        begin += length
    return found


def right(refs, blocks):
    return [crc32c(block.view) for block in blocks] == [ref.crc32c for ref in refs]


class Gate:
    """Holds the answers of a server under test back, while its loop goes on."""

    def __init__(self, running):
        self._loop = running.loop
        self._open = asyncio.Event()
        self._get_many = running.server.engine.get_many
        running.server.engine.get_many = self._wait
        self.asked = 0

    async def _wait(self, refs, **options):
        self.asked += 1
        await self._open.wait()
        return await self._get_many(refs, **options)

    def open(self):
        self._loop.call_soon_threadsafe(self._open.set)


async def test_every_method_gives_what_the_reader_gives(refs, tmp_path):
    uri = refs[0].uri
    with running_server(RAM) as running:
        sync = CacheClient(running.address)
        async with AsyncReader(CacheClient(running.address)) as reader:
            assert right(refs, await reader.read_blocks(refs))
            assert [block.source for block in await reader.read_blocks(refs)] == ["ram"] * 3
            assert await reader.read_object(uri) == await asyncio.to_thread(sync.read_object, uri)
            assert await reader.head(uri) == await asyncio.to_thread(sync.head, uri)
            assert [meta.key for meta in await reader.list_objects(f"file://{tmp_path}")] == ["data.bin"]
            assert (await reader.stats())["server"]["pid"] == os.getpid()
            with pytest.raises(NotFoundError, match="absent"):
                await reader.head(f"{uri}.absent")
        await asyncio.to_thread(sync.close)


async def test_the_door_opens_what_the_synchronous_one_does(refs):
    async with await open_async_reader(refs[0].uri) as reader:
        assert isinstance(reader.reader, InPlaceReader)
        assert right(refs, await reader.read_blocks(refs))
    with pytest.raises(BadInputError, match='cache is "auto"'):
        await open_async_reader(refs[0].uri, 5)
    with pytest.raises(BadInputError, match="max_calls"):
        await open_async_reader(refs[0].uri, max_calls=0)


async def test_tasks_of_one_loop_read_at_once_within_the_limit(refs):
    with running_server(RAM) as running:
        gate = Gate(running)
        async with AsyncReader(CacheClient(running.address), max_calls=4) as reader:
            tasks = [asyncio.create_task(reader.read_blocks(refs)) for _ in range(20)]
            await until(lambda: gate.asked == 4)
            assert len(running.server._sessions) == 4
            gate.open()
            assert all(right(refs, blocks) for blocks in await asyncio.gather(*tasks))
            assert gate.asked == 20


async def test_a_cancelled_call_frees_its_thread_and_its_server(refs):
    with running_server(RAM) as running:
        gate = Gate(running)
        async with AsyncReader(CacheClient(running.address), max_calls=1) as reader:
            task = asyncio.create_task(reader.read_blocks(refs))
            await until(lambda: gate.asked == 1)
            waiting = asyncio.create_task(reader.read_blocks(refs))
            await asyncio.sleep(0)
            for call in (waiting, task):
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
            # The only thread is free again, though the answer never came.
            assert (await reader.head(refs[0].uri)).size_bytes == 1 << 20
            gate.open()
            assert right(refs, await reader.read_blocks(refs))
            assert gate.asked == 2, "the one that waited never began"


async def test_a_call_that_is_cancelled_again_and_again_leaks_no_connection(refs):
    with running_server(RAM) as running:
        gate = Gate(running)
        async with AsyncReader(CacheClient(running.address), max_calls=2) as reader:
            for number in range(1, 21):
                task = asyncio.create_task(reader.read_blocks(refs))
                await until(lambda number=number: gate.asked == number)
                task.cancel()
            gate.open()
            assert right(refs, await reader.read_blocks(refs))
            await until(lambda: len(running.server._sessions) <= 2)
            assert len(reader.reader._connections) <= 2


async def test_cancelling_the_only_call_does_not_end_a_private_server(refs):
    async with AsyncReader(CacheClient(unused_address(), private=RAM)) as reader:
        assert right(refs, await reader.read_blocks(refs))
        pid = (await reader.stats())["server"]["pid"]
        os.kill(pid, signal.SIGSTOP)
        try:
            task = asyncio.create_task(reader.read_blocks(refs))
            await until(lambda: not reader.reader._idle)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        finally:
            os.kill(pid, signal.SIGCONT)
        assert [block.source for block in await reader.read_blocks(refs)] == ["ram"] * 3
        assert (await reader.stats())["server"]["pid"] == pid


async def test_a_private_server_never_sees_a_cancelled_call_as_the_end_of_its_last_connection(refs):
    with running_server(RAM, grace_s=60, limits=ServerLimits(heartbeat_s=0.01)) as running:
        gate = Gate(running)
        async with AsyncReader(CacheClient(running.address, private=RAM)) as reader:
            task = asyncio.create_task(reader.read_blocks(refs))
            await until(lambda: gate.asked == 1)
            (cancelled,) = running.server._sessions.values()
            task.cancel()
            await until(lambda: cancelled not in running.server._sessions.values())
            gate.open()
            assert right(refs, await reader.read_blocks(refs))
            assert not running.server.stopping


async def test_a_daemon_that_is_gone_is_an_error_or_another_rung(refs, caplog):
    with running_server(RAM) as running:
        alone = AsyncReader(CacheClient(running.address))
        ladder = AsyncReader(FallbackReader([("it", CacheClient(running.address)), ("in place", InPlaceReader())]))
        for reader in (alone, ladder):
            assert right(refs, await reader.read_blocks(refs))
    with pytest.raises(ServerGoneError, match="no cache server answers"):
        await alone.read_blocks(refs)
    assert right(refs, await ladder.read_blocks(refs))
    assert "going on with in place" in caplog.text
    for reader in (alone, ladder):
        await reader.aclose()


async def test_closing_lets_calls_end_and_a_later_one_connects_again(refs):
    with running_server(RAM) as running:
        gate = Gate(running)
        reader = AsyncReader(CacheClient(running.address))
        task = asyncio.create_task(reader.read_blocks(refs))
        await until(lambda: gate.asked == 1)
        closing = asyncio.create_task(reader.aclose())
        await asyncio.sleep(0)
        assert not closing.done()
        gate.open()
        assert right(refs, await task)
        await closing
        await until(lambda: not running.server._sessions)
        assert right(refs, await reader.read_blocks(refs))
        await reader.aclose()


def test_several_loops_share_a_reader(refs):
    with running_server(RAM) as running:
        reader, results = AsyncReader(CacheClient(running.address)), []

        async def read():
            results.extend(await asyncio.gather(*(reader.read_blocks(refs) for _ in range(5))))

        threads = [threading.Thread(target=lambda: asyncio.run(read())) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [right(refs, blocks) for blocks in results] == [True] * 15
        asyncio.run(reader.aclose())


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_used_reader_works_in_a_child_and_still_in_the_parent(refs, method):
    with running_server(RAM) as running:
        reader = AsyncReader(CacheClient(running.address))
        asyncio.run(reader.read_blocks(refs))
        context = multiprocessing.get_context(method)
        here, there = context.Pipe()
        with contextlib.closing(here):
            child = context.Process(target=send_awaited_blocks, args=(reader, refs, there))
            child.start()
            there.close()
            assert [crc32c(here.recv_bytes()) for _ in refs] == [ref.crc32c for ref in refs]
            child.join()
        assert child.exitcode == 0
        assert right(refs, asyncio.run(reader.read_blocks(refs)))
        asyncio.run(reader.aclose())


async def test_a_pickled_copy_reads(refs):
    with running_server(RAM) as running:
        async with AsyncReader(CacheClient(running.address), max_calls=3) as reader:
            async with pickle.loads(pickle.dumps(reader)) as copy:
                assert right(refs, await copy.read_blocks(refs))
            assert copy._max_calls == 3
