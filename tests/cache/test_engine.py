"""The engine fetches each block once, serves right bytes or says why not, and picks up after a kill where it was."""

import asyncio
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from crc32c import crc32c

from cache.block import block_path
from cache.config import CacheConfig, TierConfig
from cache.directory_shelf import DirectoryShelf
from cache.disk import DiskLimits
from cache.engine import Engine, Handle
from cache.handle import seal_block
from cache.journal import Journal
from cache.keys import BlockRef, block_key
from cache.testing import (
    FaultySystem,
    check_directory,
    check_limits,
    read_blocks,
    read_handle,
    running_engine,
    until,
)
from connectors.errors import BadInputError, DataError, NotFoundError, PermissionDeniedError, TransientError
from connectors.objects import Span
from connectors.protocols import Store
from connectors.registry import open_store
from connectors.wrappers import CountingStore

BLOCK = 4000
SIZE = 4096  # of such a block on either medium
MIB = 1 << 20
DISK_LIMITS = DiskLimits()
# Probed at once and all the time.
BRISK = DiskLimits(first_retry_s=1e-3, last_retry_s=1e-3)
# Never probed, so what a state means can be looked at.
GRIM = DiskLimits(first_retry_s=1e6, last_retry_s=1e6)

_names = itertools.count()


class Origin:
    """A store in memory with objects of known blocks, whose ranged reads can be held back."""

    def __init__(self) -> None:
        self.url = f"memory://engine-{next(_names)}"
        self.store = CountingStore(open_store(self.url))
        self.spans: list[tuple[str, Span]] = []
        self.asked = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self.fault: DataError | None = None
        for name in ("get_range", "get_ranges"):
            setattr(self.store, name, self._watch(name, getattr(self.store, name)))

    def _watch(self, name: str, read: Callable[..., Awaitable[object]]) -> Callable[..., Awaitable[object]]:
        async def watched(key: str, wanted: object, *, version: str | None = None) -> object:
            self.spans += [(key, span) for span in ([wanted] if name == "get_range" else wanted)]
            self.asked.set()
            await self.gate.wait()
            if self.fault is not None:
                raise self.fault
            return await read(key, wanted, version=version)

        return watched

    async def put(self, key: str, blocks: int, *, fill: int = 0) -> list[BlockRef]:
        """Write an object and describe its blocks, without checksums."""
        data = b"".join((fill + number).to_bytes(4, "big") * (BLOCK // 4) for number in range(blocks))
        version = (await self.store.put(key, data)).version
        return [BlockRef(f"{self.url}/{key}", version, number * BLOCK, BLOCK) for number in range(blocks)]

    def open(self, root: str) -> Store:
        assert root == self.url
        return self.store


def expected(ref: BlockRef, fill: int = 0) -> bytes:
    return (fill + ref.offset // BLOCK).to_bytes(4, "big") * (BLOCK // 4)


@pytest.fixture
async def origin() -> Origin:
    return Origin()


def running(
    config: CacheConfig, origin: Origin, system: object = os, disk_limits: DiskLimits = DISK_LIMITS
) -> AbstractAsyncContextManager[Engine]:
    return running_engine(config, open_store=origin.open, system=system, disk_limits=disk_limits)


def disk(path: Path, blocks: int, **settings: object) -> TierConfig:
    return TierConfig("disk", blocks * SIZE, str(path), medium="nvme", **settings)


async def sources(engine: Engine, refs: list[BlockRef]) -> list[str]:
    """Read the blocks, check every byte, and return where each was found."""
    handles = await engine.get_many(refs)
    for ref, handle in zip(refs, handles, strict=True):
        assert isinstance(handle, Handle), handle
        assert read_handle(block_key(ref), handle) == expected(ref)
    return [handle.source for handle in handles if isinstance(handle, Handle)]


async def test_eight_readers_of_ten_cold_objects_cost_one_fetch_a_block(tmp_path: Path, origin: Origin) -> None:
    refs = [ref for number in range(10) for ref in await origin.put(f"o{number}", 10)]
    config = CacheConfig((TierConfig("ram", 20 * SIZE), disk(tmp_path, 50)), ring_bytes=200 * SIZE)
    async with running(config, origin) as engine:

        async def read(reader: int) -> None:
            mine = refs[reader * 7 :] + refs[: reader * 7]
            for start in range(0, len(mine), 9):
                results = await read_blocks(engine, mine[start : start + 9])
                assert results == [expected(ref) for ref in mine[start : start + 9]]

        await asyncio.gather(*(read(reader) for reader in range(8)))
        assert sorted(origin.spans, key=repr) == sorted(
            [(ref.uri.rpartition("/")[2], Span(ref.offset, ref.length)) for ref in refs], key=repr
        )
        stats = engine.stats()
        assert stats["blocks_requested"] == 800
        assert stats["origin"]["bytes"] == 100 * BLOCK
        check_limits(stats)


async def test_a_waiter_that_gives_up_does_not_end_the_fetch(origin: Origin) -> None:
    (ref,) = await origin.put("x", 1)
    async with running(CacheConfig(), origin) as engine:
        origin.gate.clear()
        first, second = (asyncio.create_task(engine.get_many([ref])) for _ in range(2))
        await origin.asked.wait()
        first.cancel()
        await asyncio.wait({first})
        origin.gate.set()
        (handle,) = await second
        assert isinstance(handle, Handle)
        assert read_handle(block_key(ref), handle) == expected(ref)
        assert first.cancelled()
        assert len(origin.spans) == 1
        assert engine.stats()["joined"] == 1


async def test_a_fetch_without_waiters_still_fills_the_cache(origin: Origin) -> None:
    (ref,) = await origin.put("x", 1)
    async with running(CacheConfig((TierConfig("ram", SIZE),)), origin) as engine:
        origin.gate.clear()
        waiter = asyncio.create_task(engine.get_many([ref]))
        await origin.asked.wait()
        waiter.cancel()
        await asyncio.wait({waiter})
        origin.gate.set()
        await asyncio.wait(list(engine._tasks))
        assert await sources(engine, [ref]) == ["ram"]


async def test_a_failure_reaches_all_waiters_and_is_not_remembered(origin: Origin) -> None:
    (ref,) = await origin.put("x", 1)
    async with running(CacheConfig((TierConfig("ram", SIZE),)), origin) as engine:
        origin.fault = TransientError("the network is down")
        results = await asyncio.gather(*(engine.get_many([ref]) for _ in range(3)))
        assert [type(result) for (result,) in results] == [TransientError] * 3
        assert len(origin.spans) == 1
        origin.fault = None
        assert await sources(engine, [ref]) == ["origin"]


async def test_one_bad_block_does_not_spoil_the_others(origin: Origin) -> None:
    first, second = await origin.put("x", 2)
    missing = BlockRef(f"{origin.url}/none", "1", 0, 5)
    async with running(CacheConfig(), origin) as engine:
        results = await engine.get_many([first, missing, second, first])
        assert [type(result) for result in results] == [Handle, NotFoundError, Handle, Handle]
        assert len(origin.spans) == 3


async def test_an_object_written_anew_is_never_mixed_with_the_old(origin: Origin) -> None:
    old = await origin.put("x", 2)
    async with running(CacheConfig((TierConfig("ram", 9 * SIZE),)), origin) as engine:
        assert await sources(engine, old[:1]) == ["origin"]
        new = await origin.put("x", 2, fill=100)
        kept, gone = await engine.get_many(old)
        assert isinstance(kept, Handle)
        assert "x" in str(gone)
        assert await read_blocks(engine, new) == [expected(ref, 100) for ref in new]
        assert await read_blocks(engine, old[:1]) == [expected(old[0])]


async def test_handles_survive_eviction_and_close(origin: Origin) -> None:
    refs = await origin.put("x", 5)
    async with running(CacheConfig((TierConfig("ram", SIZE, policy="lru"),), ring_bytes=0), origin) as engine:
        handles = []
        for ref in refs:
            handles += await engine.get_many([ref])
        assert engine.stats()["tiers"][0]["evictions"] == 4
    for ref, handle in zip(refs, handles, strict=True):
        assert isinstance(handle, Handle)
        assert read_handle(block_key(ref), handle) == expected(ref)


async def test_without_any_memory_it_passes_through(origin: Origin, tmp_path: Path) -> None:
    refs = await origin.put("x", 3)
    tiers = (TierConfig("ram", 0), disk(tmp_path, 0))
    async with running(CacheConfig(tiers, ring_bytes=0), origin) as engine:
        for _ in range(2):
            assert await sources(engine, refs) == ["origin"] * 3
        assert len(origin.spans) == 6
        check_limits(engine.stats())


async def test_a_block_above_every_limit_still_arrives(origin: Origin) -> None:
    data = os.urandom(100_000)
    version = (await origin.store.put("big", data)).version
    ref = BlockRef(f"{origin.url}/big", version, 0, len(data))
    small = await origin.put("x", 3)
    config = CacheConfig((TierConfig("ram", 10),), ring_bytes=10, max_inflight_bytes=50, max_inflight_requests=1)
    async with running(config, origin) as engine:
        assert await read_blocks(engine, [ref, *small]) == [data, *map(expected, small)]


async def test_adjacent_cold_blocks_share_requests(origin: Origin) -> None:
    refs = await origin.put("x", 50)
    async with running(CacheConfig(), origin) as engine:
        assert await sources(engine, refs[::-1]) == ["origin"] * 50
        assert engine.stats()["origin"]["requests"] == 1
        assert await sources(engine, refs) == ["ring"] * 50


async def test_a_corrupt_file_is_fetched_again(tmp_path: Path, origin: Origin) -> None:
    refs = await origin.put("x", 4)
    config = CacheConfig((disk(tmp_path, 9),), ring_bytes=0)
    async with running(config, origin) as engine:
        await sources(engine, refs)
        await engine.settle()
        files = [tmp_path / "blocks-1" / block_path(block_key(ref), BLOCK) for ref in refs]
        contents = [file.read_bytes() for file in files]
        files[0].write_bytes(b"\xff" + contents[0][1:])
        files[1].write_bytes(contents[1][:-1])
        files[2].write_bytes(contents[3])
        assert await read_blocks(engine, refs) == [expected(ref) for ref in refs]
        await engine.settle()
        assert len(origin.spans) == 7
        assert engine.stats()["tiers"][0]["corrupt"] == 3
        assert await sources(engine, refs) == ["disk"] * 4
    check_directory(tmp_path, capacity_bytes=9 * SIZE)


async def test_a_restart_finds_every_block_without_one_request(tmp_path: Path, origin: Origin) -> None:
    refs = await origin.put("x", 6)
    config = CacheConfig((disk(tmp_path, 9),))
    async with running(config, origin) as engine:
        await sources(engine, refs)
    # `close` finished the placements.
    assert len(check_directory(tmp_path, capacity_bytes=9 * SIZE)) == 6
    async with running(config, origin) as engine:
        assert await sources(engine, refs) == ["disk"] * 6
        assert engine.stats()["origin"].items() >= {"requests": 0, "bytes": 0, "errors": 0}.items()


async def test_blocks_are_served_before_the_directory_is_scanned(tmp_path: Path, origin: Origin) -> None:
    refs = await origin.put("x", 2)
    config = CacheConfig((TierConfig("ram", 0), disk(tmp_path, 9)))
    async with running(config, origin) as engine:
        await sources(engine, refs[:1])
    engine = Engine(config, open_store=origin.open)
    await engine.start()
    try:
        assert engine.stats()["tiers"][1]["scanning"]
        assert await sources(engine, refs) == ["disk", "origin"]
        await engine.scanned()
        assert await sources(engine, refs[:1]) == ["disk"]
    finally:
        await engine.close()


@pytest.mark.parametrize("policy", ["kept", "lru"])
async def test_a_smaller_configuration_evicts_at_once(tmp_path: Path, origin: Origin, policy: str) -> None:
    refs = await origin.put("x", 8)
    async with running(CacheConfig((disk(tmp_path, 8, policy=policy),)), origin) as engine:
        await sources(engine, refs)
    async with running(CacheConfig((disk(tmp_path, 3, policy=policy),)), origin) as engine:
        check_limits(engine.stats())
        blocks = check_directory(tmp_path, capacity_bytes=3 * SIZE)
        if policy == "kept":
            assert sorted(blocks) == sorted(block_key(ref) for ref in refs)[:3]
        assert sorted(await sources(engine, refs)) == ["disk"] * 3 + ["origin"] * 5


@pytest.mark.parametrize("batch", [1, 8, 40])
async def test_in_the_second_epoch_exactly_what_does_not_fit_is_fetched(
    tmp_path: Path, origin: Origin, batch: int
) -> None:
    refs = await origin.put("x", 40)
    config = CacheConfig((TierConfig("ram", 10 * SIZE), disk(tmp_path, 20)), ring_bytes=0)
    async with running(config, origin) as engine:
        for epoch in range(4):
            before = len(origin.spans)
            for start in range(0, 40, batch):
                await sources(engine, refs[start : start + batch])
                await engine.settle()
            assert len(origin.spans) - before == (10 if epoch else 40)
        written = [tier["written_bytes"] for tier in engine.stats()["tiers"]]
        await sources(engine, refs)
        await engine.settle()
        assert [tier["written_bytes"] for tier in engine.stats()["tiers"]] == written


async def test_two_servers_do_not_share_a_directory(tmp_path: Path, origin: Origin) -> None:
    config = CacheConfig((TierConfig("ram", SIZE), disk(tmp_path, 9)))
    async with running(config, origin):
        with pytest.raises(BadInputError, match=f"process {os.getpid()}"):
            await Engine(config, open_store=origin.open).start()
    async with running(config, origin):
        pass


async def test_a_path_that_cannot_be_a_directory_is_refused(tmp_path: Path, origin: Origin) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises((BadInputError, PermissionDeniedError), match="tier disk"):
            await Engine(CacheConfig((disk(path, 9),)), open_store=origin.open).start()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
async def test_a_directory_that_cannot_be_opened_is_done_without_until_it_can(
    tmp_path: Path, origin: Origin, number: int, monkeypatch
) -> None:
    really_lock = DirectoryShelf.lock

    def lock(shelf: DirectoryShelf) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(DirectoryShelf, "lock", lock)
    refs = await origin.put("x", 3)
    config = CacheConfig((disk(tmp_path, 9),), ring_bytes=0)
    async with running(config, origin, disk_limits=BRISK) as engine:
        assert await sources(engine, refs) == ["origin"] * 3
        (tier,) = engine.stats()["tiers"]
        assert (tier["used_bytes"], tier["blocks"], tier["state"]) == (0, 0, "down")
        assert os.strerror(number) in tier["state_reason"]
        assert os.strerror(number) in tier["fault"]
        monkeypatch.setattr(DirectoryShelf, "lock", really_lock)
        await until(lambda: state(engine) == "normal" and not engine.stats()["tiers"][0]["scanning"])
        assert await sources(engine, refs) == ["origin"] * 3
        await engine.settle()
        assert await sources(engine, refs) == ["disk"] * 3


async def test_more_blocks_in_memory_than_files_may_be_open_are_refused(origin: Origin) -> None:
    config = CacheConfig((TierConfig("ram", MIB, capacity_blocks=1 << 40),))
    with pytest.raises(BadInputError, match="ulimit"):
        await Engine(config, open_store=origin.open).start()


@pytest.mark.parametrize("policy", ["kept", "lru", "s3fifo", "next_use", "drop_behind", "auto"])
async def test_a_tier_that_shrinks_evicts_as_its_policy_likes_and_offers_below(
    tmp_path: Path, origin: Origin, policy: str
) -> None:
    refs = await origin.put("x", 12)
    below = TierConfig("below", 20 * SIZE, str(tmp_path / "below"), medium="hdd")
    config = CacheConfig((disk(tmp_path / "disk", 12, policy=policy), below), ring_bytes=0)
    async with running(config, origin) as engine:
        for ref in refs:  # one by one: what is written together is there in any order
            await sources(engine, [ref])
            await engine.settle()
        await engine.resize("disk", capacity_bytes=5 * SIZE)
        await engine.settle()
        upper, lower = engine.stats()["tiers"]
        assert (upper["capacity_bytes"], upper["blocks"], upper["evictions"]) == (5 * SIZE, 5, 7)
        assert lower["blocks"] == 7
        kept = check_directory(tmp_path / "disk", capacity_bytes=5 * SIZE)
        keys = [block_key(ref) for ref in refs]
        likes = {"kept": sorted(keys)[:5], "lru": sorted(keys[-5:])}
        assert policy not in likes or sorted(kept) == likes[policy]
        # What it kept first: a block that is read below comes up, and another makes room for it.
        assert await sources(engine, [ref for ref in refs if block_key(ref) in kept]) == ["disk"] * 5
        assert await sources(engine, [ref for ref in refs if block_key(ref) not in kept]) == ["below"] * 7
        await engine.resize("disk", capacity_bytes=12 * SIZE, capacity_blocks=3)
        assert engine.stats()["tiers"][0]["blocks"] == 3
        await engine.resize("disk", capacity_bytes=12 * SIZE)
        assert engine.stats()["tiers"][0]["capacity_blocks"] is None
        assert len(origin.spans) == 12
        check_limits(engine.stats())


async def test_limits_hold_while_a_tier_is_resized_under_load(tmp_path: Path, origin: Origin) -> None:
    refs = await origin.put("x", 60)
    config = CacheConfig(
        (TierConfig("ram", 10 * SIZE, policy="lru"), disk(tmp_path, 40, policy="lru")), ring_bytes=SIZE
    )
    async with running(config, origin) as engine:

        async def read(reader: int) -> None:
            for turn in range(6):
                mine = refs[reader * 7 + turn :] + refs[: reader * 7 + turn]
                for start in range(0, 60, 10):
                    await sources(engine, mine[start : start + 10])
                    check_limits(engine.stats())

        async def resize() -> None:
            for blocks in (3, 30, 1, 0, 12):
                await engine.resize("ram", capacity_bytes=blocks * SIZE)
                await engine.resize("disk", capacity_bytes=2 * blocks * SIZE)
                check_limits(engine.stats())
                check_directory(tmp_path, capacity_bytes=2 * blocks * SIZE, verified=False)

        await asyncio.gather(resize(), *(read(reader) for reader in range(4)))
        await engine.settle()
        ram, tier = engine.stats()["tiers"]
        assert (ram["capacity_bytes"], tier["capacity_bytes"]) == (12 * SIZE, 24 * SIZE)
    check_directory(tmp_path, capacity_bytes=24 * SIZE)


async def test_a_tier_that_cannot_be_resized_says_why(tmp_path: Path, origin: Origin) -> None:
    broken = Disk()
    refs = await origin.put("x", 8)
    config = CacheConfig((TierConfig("ram", 0), disk(tmp_path, 8)), ring_bytes=0)
    async with running(config, origin, broken.system, GRIM) as engine:
        await sources(engine, refs)
        await engine.settle()
        with pytest.raises(BadInputError, match="no tier 'tape'; there are: ram, disk"):
            await engine.resize("tape", capacity_bytes=1)
        with pytest.raises(BadInputError, match="capacity_bytes"):
            await engine.resize("disk", capacity_bytes=-1)
        with pytest.raises(BadInputError, match="ulimit"):
            await engine.resize("ram", capacity_bytes=1, capacity_blocks=1 << 40)
        broken.failing = {"unlink": errno.EIO}
        with pytest.raises(TransientError, match="does not let go"):
            await engine.resize("disk", capacity_bytes=2 * SIZE)
        check_limits(engine.stats())
        assert engine.stats()["tiers"][1]["state"] == "unstable"
    check_directory(tmp_path, capacity_bytes=8 * SIZE)


async def test_a_tier_is_resized_to_the_end_also_when_who_asked_has_gone(tmp_path: Path, origin: Origin) -> None:
    slow = Disk()
    refs = await origin.put("x", 8)
    async with running(CacheConfig((disk(tmp_path, 8),), ring_bytes=0), origin, slow.system) as engine:
        await sources(engine, refs)
        await engine.settle()
        slow.answers.clear()
        asking = asyncio.create_task(engine.resize("disk", capacity_bytes=2 * SIZE))
        await until(lambda: slow.calls["unlink"] == 1)
        asking.cancel()
        await asyncio.wait({asking})
        assert asking.cancelled()
        slow.answers.set()
        await until(lambda: engine.stats()["tiers"][0]["capacity_bytes"] == 2 * SIZE)
        assert engine.stats()["tiers"][0]["blocks"] == 2
        check_limits(engine.stats())
    check_directory(tmp_path, capacity_bytes=2 * SIZE)


class Disk:
    """System calls of a disk, some of which fail, hang or are counted."""

    def __init__(self) -> None:
        self.failing: dict[str, int] = {}
        self.calls: Counter[str] = Counter()
        self.answers = threading.Event()
        self.answers.set()
        self.system = FaultySystem(self._before)

    def _before(self, name: str) -> None:
        self.calls[name] += 1
        self.answers.wait(10)
        if name in self.failing:
            raise OSError(self.failing[name], os.strerror(self.failing[name]))


def state(engine: Engine) -> str:
    return str(engine.stats()["tiers"][0]["state"])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
async def test_a_full_disk_is_not_tried_for_every_block_and_written_again_when_there_is_space(
    tmp_path: Path, origin: Origin, number: int
) -> None:
    broken = Disk()
    refs = await origin.put("x", 20)
    config = CacheConfig((disk(tmp_path, 30),), ring_bytes=0)
    async with running(config, origin, broken.system, GRIM) as engine:
        await sources(engine, refs[:2])
        await engine.settle()
        broken.failing = {"posix_fallocate": number}
        for ref in refs:
            await sources(engine, [ref])
            await engine.settle()
        (tier,) = engine.stats()["tiers"]
        assert broken.calls["posix_fallocate"] == 3
        assert (tier["blocks"], tier["hits"], tier["state"]) == (2, 2, "normal")
        assert os.strerror(number) in tier["full"]["reason"]
        assert tier["full"]["since_unix_s"] > 0
    broken.failing = {}
    async with running(config, origin, broken.system, BRISK) as engine:
        broken.failing = {"write": number}
        await sources(engine, refs[2:4])
        await engine.settle()
        assert engine.stats()["tiers"][0]["full"] is not None
        broken.failing = {}

        async def is_kept() -> bool:
            await sources(engine, refs[2:3])
            await engine.settle()
            return engine.stats()["tiers"][0]["full"] is None

        while not await is_kept():
            pass
        assert await sources(engine, refs[:3]) == ["disk"] * 3
    check_directory(tmp_path, capacity_bytes=30 * SIZE)


async def test_a_disk_that_fails_writes_is_read_but_not_written_until_its_probes_pass(
    tmp_path: Path, origin: Origin, caplog
) -> None:
    broken = Disk()
    refs = await origin.put("x", 30)
    async with running(CacheConfig((disk(tmp_path, 40),), ring_bytes=0), origin, broken.system, BRISK) as engine:
        await sources(engine, refs[:2])
        await engine.settle()
        broken.failing = dict.fromkeys(["write", "pwrite"], errno.EIO)
        for ref in refs[2:]:
            assert await sources(engine, [ref]) == ["origin"]
            await engine.settle()
        assert broken.calls["write"] < 10
        assert state(engine) == "unstable"
        assert "Input/output error" in engine.stats()["tiers"][0]["state_reason"]
        assert await sources(engine, refs[:2]) == ["disk"] * 2
        broken.failing = {}
        await until(lambda: state(engine) == "normal")
        await sources(engine, refs)
        await engine.settle()
        assert await sources(engine, refs) == ["disk"] * 30
    states = [record.getMessage().split(": ")[1] for record in caplog.records if "the disk is" in record.getMessage()]
    assert states[0] == "the disk is unstable"


async def test_a_disk_that_fails_reads_is_left_alone_and_what_it_held_is_held_again(
    tmp_path: Path, origin: Origin
) -> None:
    broken = Disk()
    refs = await origin.put("x", 40)
    config = CacheConfig((disk(tmp_path, 50),), ring_bytes=0)
    async with running(config, origin, broken.system, BRISK) as engine:
        await sources(engine, refs)
        await engine.settle()
        broken.failing = dict.fromkeys(["open", "preadv"], errno.EIO)
        for ref in refs:
            assert await sources(engine, [ref]) == ["origin"]
        assert state(engine) == "down"
        check_limits(engine.stats())
        # Some were lost to the errors that gave the disk away; the others were not even tried.
        lost = 40 - engine.stats()["tiers"][0]["blocks"]
        assert lost < 20
        broken.failing = {}
        await until(lambda: state(engine) == "normal")
        assert (await sources(engine, refs)).count("disk") == 40 - lost


async def test_a_directory_that_is_deleted_and_made_again_is_taken_up_when_nobody_else_has_it(
    tmp_path: Path, origin: Origin
) -> None:
    path = tmp_path / "cache"
    refs = await origin.put("x", 8)
    other = DirectoryShelf(str(tmp_path / "other"), medium="nvme", system=os)
    await asyncio.to_thread(other.lock)
    async with running(CacheConfig((disk(path, 9),), ring_bytes=0), origin, disk_limits=BRISK) as engine:
        (data,) = await read_blocks(engine, refs[3:4])
        block = await asyncio.to_thread(seal_block, block_key(refs[3]), data)
        await asyncio.to_thread(other.write, block)
        await sources(engine, refs)
        await engine.settle()
        await asyncio.to_thread(shutil.rmtree, path)
        for _ in range(4):
            assert await sources(engine, refs) == ["origin"] * 8
            await engine.settle()
        await until(lambda: state(engine) == "down")
        assert f"No such file or directory: '{path}" in engine.stats()["tiers"][0]["state_reason"]
        # There at once with its lock, as nobody waits here for whose turn it is.
        await asyncio.to_thread(os.rename, tmp_path / "other", path)
        await until(lambda: "in use by process" in engine.stats()["tiers"][0]["state_reason"])
        assert await sources(engine, refs) == ["origin"] * 8
        assert state(engine) == "down"
        other.close()
        await until(lambda: state(engine) == "normal")
        await engine.scanned()
        assert engine.stats()["tiers"][0]["blocks"] == 1
        assert (await sources(engine, refs)).count("disk") == 1
        await engine.settle()
        assert await sources(engine, refs) == ["disk"] * 8
        assert engine.stats()["tiers"][0]["used_bytes"] == 8 * SIZE
    check_directory(path, capacity_bytes=8 * SIZE)


async def test_a_disk_that_was_unmounted_for_a_while_holds_no_more_than_its_limit(
    tmp_path: Path, origin: Origin
) -> None:
    path, away = tmp_path / "cache", tmp_path / "away"
    refs = await origin.put("x", 16)
    async with running(CacheConfig((disk(path, 8),), ring_bytes=0), origin, disk_limits=BRISK) as engine:
        await sources(engine, refs[:8])
        await engine.settle()
        await asyncio.to_thread(os.rename, path, away)
        while state(engine) != "down":
            assert await sources(engine, refs[:8]) == ["origin"] * 8
            await engine.settle()
        await asyncio.to_thread(os.rename, away, path)
        await until(lambda: state(engine) == "normal")
        await engine.scanned()
        assert engine.stats()["tiers"][0]["fault"] is None
        assert await sources(engine, refs[:8]) == ["disk"] * 8
        for ref in refs[8:]:
            await sources(engine, [ref])
            await engine.settle()
    check_directory(path, capacity_bytes=8 * SIZE)


async def test_a_disk_that_hangs_holds_up_neither_its_readers_nor_the_others(tmp_path: Path, origin: Origin) -> None:
    broken = Disk()
    refs = await origin.put("x", 6)
    ram = TierConfig("ram", 2 * SIZE)
    config = CacheConfig((disk(tmp_path, 3), ram), ring_bytes=0)
    limits = DiskLimits(stuck_s=1.0, first_retry_s=1e-3, last_retry_s=1e-3)
    async with running(config, origin, broken.system, limits) as engine:
        for _ in range(4):
            found = await sources(engine, refs)
            await engine.settle()
        assert sorted(found) == ["disk"] * 3 + ["origin"] + ["ram"] * 2
        on = {place: [ref for ref, source in zip(refs, found, strict=True) if source == place] for place in set(found)}
        broken.answers.clear()
        stuck = asyncio.create_task(sources(engine, on["disk"]))
        await asyncio.sleep(0)
        assert await sources(engine, on["ram"]) == ["ram"] * 2
        assert await stuck == ["origin"] * 3
        assert state(engine) == "down"
        assert "no call has returned" in engine.stats()["tiers"][0]["state_reason"]
        assert "the disk is down: no call" in engine.stats()["tiers"][0]["fault"]
        begun = broken.calls["open"]
        assert "disk" not in await sources(engine, refs)
        await engine.report_bad(on["disk"][0])
        assert broken.calls["open"] == begun
        check_limits(engine.stats())
        broken.answers.set()
        await until(lambda: state(engine) == "normal")
        await engine.settle()
        assert await sources(engine, on["disk"][1:]) == ["disk"] * 2


async def test_a_directory_that_hangs_when_it_is_opened_does_not_hold_up_the_start(
    tmp_path: Path, origin: Origin, monkeypatch
) -> None:
    answers, really_lock = threading.Event(), DirectoryShelf.lock

    def lock(shelf: DirectoryShelf) -> None:
        answers.wait(60)
        really_lock(shelf)

    monkeypatch.setattr(DirectoryShelf, "lock", lock)
    refs = await origin.put("x", 2)
    limits = DiskLimits(stuck_s=0.5, first_retry_s=1e-3, last_retry_s=1e-3)
    async with running(CacheConfig((disk(tmp_path, 3),), ring_bytes=0), origin, disk_limits=limits) as engine:
        assert await sources(engine, refs) == ["origin"] * 2
        assert state(engine) == "down"
        answers.set()
        await until(lambda: state(engine) == "normal" and not engine.stats()["tiers"][0]["scanning"])
        await sources(engine, refs)
        await engine.settle()
        assert await sources(engine, refs) == ["disk"] * 2


async def test_a_scan_that_hangs_holds_up_no_operator(tmp_path: Path, origin: Origin, monkeypatch) -> None:
    answers, really_load = threading.Event(), Journal.load

    def load(journal: Journal) -> object:
        answers.wait(60)
        return really_load(journal)

    monkeypatch.setattr(Journal, "load", load)
    engine = Engine(
        CacheConfig((disk(tmp_path, 3),), ring_bytes=0), open_store=origin.open, disk_limits=DiskLimits(stuck_s=0.1)
    )
    await engine.start()
    try:
        await engine.resize("disk", capacity_bytes=2 * SIZE)
        assert not await engine.administration.pin(origin.url, size_bytes=1, expires_s=None, uid=0)
        assert state(engine) == "down"
    finally:
        answers.set()
        await engine.close()


async def test_no_descriptor_left_is_a_clear_error(tmp_path: Path, origin: Origin) -> None:
    out_of_files = False

    def before(name: str) -> None:
        if out_of_files:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    (ref,) = await origin.put("x", 1)
    async with running(CacheConfig((disk(tmp_path, 9),), ring_bytes=0), origin, FaultySystem(before)) as engine:
        await sources(engine, [ref])
        await engine.settle()
        out_of_files = True
        (result,) = await engine.get_many([ref])
        assert isinstance(result, TransientError)
        assert "Too many open files" in str(result)
        out_of_files = False
        assert await sources(engine, [ref]) == ["disk"]


async def test_close_tells_also_those_whose_fetch_has_not_begun(origin: Origin) -> None:
    refs = await origin.put("x", 3)
    engine = Engine(CacheConfig(ring_bytes=0), open_store=origin.open)
    await engine.start()
    waiting = asyncio.create_task(engine.get_many(refs))
    await asyncio.sleep(0)  # it has asked, and the task of its fetch has not had its first step
    await engine.close()
    results = await asyncio.wait_for(waiting, 5)
    assert all(isinstance(result, TransientError) for result in results)
    assert not origin.spans


async def test_close_tells_the_waiters_and_is_final(origin: Origin) -> None:
    (ref,) = await origin.put("x", 1)
    engine = Engine(CacheConfig(), open_store=origin.open)
    await engine.start()
    origin.gate.clear()
    waiter = asyncio.create_task(engine.get_many([ref]))
    await origin.asked.wait()
    await engine.close()
    await engine.close()
    assert [type(result) for result in await waiter] == [TransientError]
    assert [type(result) for result in await engine.get_many([ref])] == [TransientError]
    with pytest.raises(TransientError, match="closed"):
        await engine.get_object(ref.uri)
    await engine.report_bad(ref)
    json.dumps(engine.stats())


async def test_whole_objects_and_listings_pass_by_the_tiers(origin: Origin) -> None:
    (ref,) = await origin.put("a/x", 1)
    async with running(CacheConfig((TierConfig("ram", MIB),)), origin) as engine:
        assert await engine.get_object(ref.uri) == (expected(ref), ref.version)
        assert (await engine.head(ref.uri)).size_bytes == BLOCK
        assert [meta.key for meta in await engine.list_objects(f"{origin.url}/a")] == ["x"]
        assert engine.stats()["tiers"][0]["blocks"] == 0


async def test_statistics_are_plain_numbers_by_name(tmp_path: Path, origin: Origin) -> None:
    config = CacheConfig((TierConfig("ram", MIB), disk(tmp_path, 9)))
    async with running(config, origin) as engine:
        await sources(engine, await origin.put("x", 3))
        stats = json.loads(json.dumps(engine.stats()))
    assert list(stats) == ["tiers", "ring", "origin", "blocks_requested", "joined", "prefetch", "pattern", "retention"]
    assert [tier["name"] for tier in stats["tiers"]] == ["ram", "disk"]
    named = {"medium", "policy", "capacity_bytes", "used_bytes", "capacity_blocks", "blocks", "hits", "hit_bytes"}
    named |= {"insertions", "written_bytes", "evictions", "evicted_bytes", "refused", "corrupt", "errors"}
    for tier in (*stats["tiers"], stats["ring"]):
        assert named <= set(tier)


def test_a_kill_before_any_system_call_leaves_a_cache_that_goes_on(tmp_path: Path) -> None:
    """Six blocks pass through a directory for three; each of its system calls is the last one once."""
    origin_path = tmp_path / "origin"
    origin_path.write_bytes(b"".join(number.to_bytes(4, "big") * (BLOCK // 4) for number in range(6)))
    refs = [
        BlockRef(f"file://{origin_path}", "digest", number * BLOCK, BLOCK, crc32c(number.to_bytes(4, "big") * 1000))
        for number in range(6)
    ]

    async def run(path: Path, before: Callable[[str], None]) -> tuple[int, dict[str, Any]]:
        """Read all blocks; return how many were adopted, and the statistics."""
        engine = Engine(CacheConfig((disk(path, 3),), ring_bytes=0), system=FaultySystem(before))
        await engine.start()
        await engine.scanned()
        adopted = engine.stats()["tiers"][0]["blocks"]
        for ref in refs:
            await sources(engine, [ref])
            await engine.settle()
        await engine.close()
        return adopted, engine.stats()

    outcomes = set()
    for last in range(200):
        path = tmp_path / str(last)
        calls = itertools.count()

        def die(name: str, calls: itertools.count = calls, last: int = last) -> None:
            if next(calls) == last:
                os.kill(os.getpid(), signal.SIGKILL)

        pid = os.fork()
        if pid == 0:
            try:
                asyncio.run(run(path, die))
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitpid(pid, 0)[1]
        assert status in (0, signal.SIGKILL)
        survived = check_directory(path, capacity_bytes=3 * SIZE)
        adopted, stats = asyncio.run(run(path, lambda name: None))
        assert adopted == len(survived)
        assert stats["origin"]["requests"] <= 6
        check_limits(stats)
        kept = check_directory(path, capacity_bytes=3 * SIZE)
        assert sorted(kept) == sorted(map(block_key, refs))[:3]
        assert list((path / "tmp").iterdir()) == []
        outcomes.add(adopted)
        shutil.rmtree(path)
        if status == 0:
            break
    assert status == 0
    assert outcomes == {0, 1, 2, 3}


FULL_DISK = """
import asyncio, json, os, sys
from cache.config import CacheConfig, TierConfig
from cache.disk import DiskLimits
from cache.engine import Engine
from cache.keys import BlockRef
from cache.testing import read_blocks
from connectors.registry import open_store

async def main(path, block):
    store = open_store("memory://full")
    data = os.urandom(64 * block)
    version = (await store.put("x", data)).version
    refs = [BlockRef("memory://full/x", version, at, block) for at in range(0, len(data), block)]
    tier = TierConfig("disk", 1 << 30, path, medium="nvme", policy="lru")
    engine = Engine(CacheConfig((tier,), ring_bytes=0), disk_limits=DiskLimits(first_retry_s=0.001))
    await engine.start()
    await engine.scanned()
    while engine.stats()["tiers"][0]["evictions"] < 80:
        for ref in refs:
            assert await read_blocks(engine, [ref]) == [data[ref.offset:ref.offset + block]]
            await engine.settle()
    await engine.close()
    left = [name for name in os.listdir(path + "/tmp")]
    print(json.dumps([engine.stats()["tiers"][0], left]))

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


@pytest.mark.parametrize(("options", "block"), [("size=1m", 50_000), ("nr_inodes=100", 4000)])
def test_on_a_really_full_disk_no_read_fails_and_blocks_are_replaced(tmp_path: Path, options: str, block: int) -> None:
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-Urm"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("a private mount namespace is not permitted here")
    mount = f'mount -t tmpfs -o {options} tmpfs "$1" && exec "$2" -c "$3" "$1" {block}'
    command = [*unshare, "sh", "-c", mount, "sh", str(tmp_path), sys.executable, FULL_DISK]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    tier, left = json.loads(done.stdout)
    assert left == []
    assert 0 < tier["blocks"] < 64
    assert tier["errors"] > 0
    assert tier["used_bytes"] <= 1 << 20
