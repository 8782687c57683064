"""Pins hold and survive, what is too old is never served, quotas are kept to, and what is held can be asked for."""

import asyncio
import itertools
import os
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import numpy as np
import pytest

from cache.block import file_bytes, parse_name
from cache.block_table import BlockTable
from cache.config import CacheConfig, JobConfig, PrefixConfig, TierConfig
from cache.disk import DiskLimits
from cache.engine import Engine, Handle
from cache.keys import BlockRef, block_key
from cache.testing import FaultySystem, check_directory, check_limits, read_blocks, running_engine, until
from cache.tier import Tier
from connectors.errors import BadInputError, NotFoundError
from connectors.registry import open_store
from connectors.wrappers import CountingStore

BLOCK = 4000
SIZE = 4096  # of such a block on either medium

_names = itertools.count()


class Place:
    """A store in memory with objects of known blocks, a clock, and a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = f"memory://administration-{next(_names)}"
        self.store = CountingStore(open_store(self.url))
        self.now_s = 1_000_000.0
        self.data: dict[str, bytes] = {}

    async def put(self, name: str, blocks: int) -> list[BlockRef]:
        self.data[f"{self.url}/{name}"] = data = os.urandom(blocks * BLOCK)
        version = (await self.store.put(name, data)).version
        return [BlockRef(f"{self.url}/{name}", version, number * BLOCK, BLOCK) for number in range(blocks)]

    def disk(self, blocks: int, **settings: object) -> TierConfig:
        return TierConfig("disk", blocks * SIZE, str(self.path), medium="nvme", **settings)

    def running(
        self, config: CacheConfig, system: object = os, limits: DiskLimits | None = None
    ) -> AbstractAsyncContextManager[Engine]:
        return running_engine(
            config,
            open_store=lambda root: self.store,
            system=system,
            disk_limits=limits or DiskLimits(),
            clock=lambda: self.now_s,
        )

    async def read(self, engine: Engine, refs: list[BlockRef], job: str = "") -> list[str]:
        """Read blocks, check their bytes, wait until they are placed; return where they were found."""
        found = await engine.get_many(refs, job=job)
        assert all(isinstance(handle, Handle) for handle in found), found
        results = await read_blocks(engine, refs)
        assert results == [self.data[ref.uri][ref.offset : ref.offset + BLOCK] for ref in refs]
        await engine.settle()
        return [handle.source for handle in found]

    async def held(self, engine: Engine, name: str = "") -> int:
        rows, _ = await engine.administration.usage(f"{self.url}/{name}", depth=0, visible=bool)
        return sum(sum(row.blocks.values()) for row in rows)


@pytest.fixture
async def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "cache")


async def test_pinned_blocks_stay_whatever_else_is_read_also_after_a_restart(place: Place) -> None:
    pinned, others = await place.put("keep/x", 4), await place.put("other", 40)
    config = CacheConfig((place.disk(8, policy="lru"),), ring_bytes=0)
    async with place.running(config) as engine:
        await place.read(engine, pinned[:2])
        # What is there already is pinned, and what comes later as well.
        assert await engine.administration.pin(f"{place.url}/keep/", size_bytes=4 * SIZE, expires_s=None, uid=7)
        await place.read(engine, pinned[2:])
        for ref in others:
            await place.read(engine, [ref])
        assert await place.read(engine, pinned) == ["disk"] * 4
        (tier,) = engine.stats()["tiers"]
        assert (tier["pinned_bytes"], tier["max_pinned_bytes"]) == (4 * SIZE, int(0.8 * 8 * SIZE))
    async with place.running(config) as engine:
        assert engine.stats()["retention"]["pins"] == [
            {"prefix": f"{place.url}/keep", "size_bytes": 4 * SIZE, "expires_unix_s": None, "uid": 7}
        ]
        for ref in others[:20]:
            await place.read(engine, [ref])
        assert await place.read(engine, pinned) == ["disk"] * 4
        assert await engine.administration.unpin(f"{place.url}/keep")
        for ref in others:
            await place.read(engine, [ref])
        assert await place.held(engine, "keep") == 0
    async with place.running(config) as engine:
        assert engine.stats()["retention"]["pins"] == []


async def test_a_pinned_block_displaces_what_the_policy_would_keep(place: Place) -> None:
    pinned, others = await place.put("keep", 20), await place.put("other", 30)
    async with place.running(CacheConfig((place.disk(10, policy="kept"),), ring_bytes=0)) as engine:
        await place.read(engine, others)
        await engine.administration.pin(f"{place.url}/keep", size_bytes=8 * SIZE, expires_s=None, uid=0)
        for ref in pinned:
            await place.read(engine, [ref])
        # Pins may take 0.8 of ten blocks; the others of the same object are blocks like any other.
        assert engine.stats()["tiers"][0]["pinned_bytes"] == 8 * SIZE
        assert await place.held(engine) == 10
        check_limits(engine.stats())


async def test_a_pin_that_cannot_be_kept_is_refused_and_changes_nothing(place: Place) -> None:
    ram = TierConfig("ram", 100 * SIZE)
    async with place.running(CacheConfig((ram, place.disk(10)))) as engine:
        with pytest.raises(BadInputError, match=f"pins may take {80 * SIZE} bytes"):
            await engine.administration.pin(f"{place.url}/x", size_bytes=81 * SIZE, expires_s=None, uid=0)
        assert engine.stats()["retention"]["pins"] == []
        with pytest.raises(NotFoundError):
            await engine.administration.unpin(f"{place.url}/x")


async def test_a_pin_ends_by_itself(place: Place) -> None:
    pinned, others = await place.put("keep", 4), await place.put("other", 40)
    async with place.running(CacheConfig((TierConfig("ram", 8 * SIZE, policy="lru"),), ring_bytes=0)) as engine:
        # Nothing that survives a restart has written it down, and the answer says so.
        assert not await engine.administration.pin(f"{place.url}/keep", size_bytes=4 * SIZE, expires_s=60, uid=0)
        await place.read(engine, pinned)
        place.now_s += 59
        await engine.administration.sweep()
        await place.read(engine, others)
        assert await place.held(engine, "keep") == 4
        place.now_s += 1
        await engine.administration.sweep()
        assert engine.stats()["tiers"][0]["pinned_bytes"] == 0
        await place.read(engine, others)
        assert await place.held(engine, "keep") == 0


async def test_what_is_too_old_goes_and_pins_end_though_nobody_asks(place: Place, monkeypatch) -> None:
    monkeypatch.setattr("cache.administration._SWEEP_EVERY_S", 0.001)
    refs = await place.put("old", 4)
    config = CacheConfig((TierConfig("ram", 8 * SIZE),), prefixes=(PrefixConfig(place.url, ttl_s=60),))
    async with place.running(config) as engine:
        await engine.administration.pin(f"{place.url}/old", size_bytes=4 * SIZE, expires_s=60, uid=0)
        await place.read(engine, refs)
        place.now_s += 60
        await until(lambda: engine.stats()["tiers"][0]["blocks"] == 0)
        assert engine.stats()["retention"]["pins"] == []
        place.now_s += 60
        await place.read(engine, refs)
        place.now_s += 60
        await until(lambda: engine.stats()["retention"]["expired"] == 8)


async def test_a_sweep_that_fails_in_an_unknown_way_is_counted_and_not_the_last(
    place: Place, monkeypatch, caplog
) -> None:
    monkeypatch.setattr("cache.administration._SWEEP_EVERY_S", 0.001)
    refs = await place.put("old", 4)
    config = CacheConfig((TierConfig("ram", 8 * SIZE),), prefixes=(PrefixConfig(place.url, ttl_s=60),))
    async with place.running(config) as engine:
        await place.read(engine, refs)
        with monkeypatch.context() as broken:
            broken.setattr(Tier, "evict", lambda tier, key: 1 // 0)
            place.now_s += 60
            await until(lambda: engine.stats()["retention"]["failed_sweeps"] > 0)
            place.now_s += 60
            await until(lambda: engine.stats()["retention"]["failed_sweeps"] > 1)
        place.now_s += 60
        await until(lambda: engine.stats()["retention"]["expired"] == 4)
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError]


async def test_the_journal_is_as_long_as_what_a_directory_holds(place: Place, monkeypatch) -> None:
    monkeypatch.setattr("cache.journal._SLACK_ENTRIES", 0)
    first, others = await place.put("first", 4), await place.put("other", 40)
    config = CacheConfig((place.disk(4, policy="lru"),), ring_bytes=0)
    async with place.running(config) as engine:
        await place.read(engine, first)
        few_bytes = (place.path / "journal-1").stat().st_size
        for ref in others:
            await place.read(engine, [ref])
        # Twice as many, and one that came while it was written anew.
        assert (place.path / "journal-1").stat().st_size <= 3 * few_bytes
        assert await place.held(engine, "other") == 4


async def test_a_pin_that_has_ended_holds_nothing_also_when_another_was_refused_meanwhile(place: Place) -> None:
    refs = await place.put("keep", 4)
    async with place.running(CacheConfig((TierConfig("ram", 8 * SIZE),))) as engine:
        await engine.administration.pin(f"{place.url}/keep", size_bytes=4 * SIZE, expires_s=60, uid=0)
        await place.read(engine, refs)
        place.now_s += 60
        with pytest.raises(BadInputError, match="pins may take"):
            await engine.administration.pin(f"{place.url}/other", size_bytes=1000 * SIZE, expires_s=None, uid=0)
        await engine.administration.sweep()
        assert engine.stats()["tiers"][0]["pinned_bytes"] == 0


async def test_a_pin_in_the_place_of_an_ended_one_has_all_its_room(place: Place) -> None:
    new, old = await place.put("new", 4), await place.put("old", 4)
    async with place.running(CacheConfig((TierConfig("ram", 8 * SIZE),))) as engine:
        await place.read(engine, new + old)
        await engine.administration.pin(f"{place.url}/old", size_bytes=4 * SIZE, expires_s=60, uid=0)
        place.now_s += 60
        await engine.administration.pin(f"{place.url}/new", size_bytes=4 * SIZE, expires_s=None, uid=0)
        assert engine.stats()["tiers"][0]["pinned_bytes"] == 4 * SIZE


async def test_a_tier_does_not_shrink_below_what_is_pinned(place: Place) -> None:
    pinned = await place.put("keep", 6)
    async with place.running(CacheConfig((place.disk(10),), ring_bytes=0)) as engine:
        await engine.administration.pin(f"{place.url}/keep", size_bytes=6 * SIZE, expires_s=None, uid=0)
        await place.read(engine, pinned)
        with pytest.raises(BadInputError, match=f"{6 * SIZE} pinned bytes where {5 * SIZE}"):
            await engine.resize("disk", capacity_bytes=5 * SIZE)
        await engine.resize("disk", capacity_bytes=7 * SIZE)
        assert await place.read(engine, pinned) == ["disk"] * 6


async def test_pins_are_found_in_the_directory_that_could_write_them(place: Place, tmp_path: Path) -> None:
    def fail(name: str) -> None:
        if broken:
            raise OSError(5, "Input/output error")

    broken: list[bool] = []
    config = CacheConfig((place.disk(10),), ring_bytes=0)
    async with place.running(config, FaultySystem(fail)) as engine:
        assert await engine.administration.pin(f"{place.url}/a", size_bytes=1, expires_s=None, uid=0)
        broken.append(True)
        assert not await engine.administration.pin(f"{place.url}/b", size_bytes=1, expires_s=None, uid=0)
    broken.clear()
    async with place.running(config) as engine:
        assert [pin["prefix"] for pin in engine.stats()["retention"]["pins"]] == [f"{place.url}/a"]


async def test_what_is_asked_before_a_directory_is_known_concerns_all_that_lies_there(place: Place) -> None:
    refs = await place.put("a/x", 4)
    config = CacheConfig((place.disk(10),), ring_bytes=0)
    async with place.running(config) as engine:
        await place.read(engine, refs)
        await engine.administration.pin(f"{place.url}/kept", size_bytes=1, expires_s=None, uid=0)
        await engine.administration.pin(f"{place.url}/ended", size_bytes=1, expires_s=None, uid=0)
    settings = {"open_store": lambda root: place.store, "clock": lambda: place.now_s}
    engine = Engine(config, **settings)
    await engine.start()
    assert await engine.administration.pin(f"{place.url}/new", size_bytes=1, expires_s=None, uid=0)
    await engine.close()
    engine = Engine(config, **settings)
    await engine.start()
    await engine.administration.unpin(f"{place.url}/ended")
    await engine.close()
    engine = Engine(config, **settings)
    await engine.start()
    assert (await engine.administration.evict(f"{place.url}/a")).blocks == 4
    pins = engine.stats()["retention"]["pins"]
    await engine.close()
    assert [pin["prefix"] for pin in pins] == [f"{place.url}/kept", f"{place.url}/new"]
    assert not check_directory(place.path, capacity_bytes=10 * SIZE)


async def test_what_is_too_old_is_never_served_and_is_removed(place: Place) -> None:
    short, long = await place.put("short/x", 3), await place.put("long", 3)
    rule = PrefixConfig(f"{place.url}/short", ttl_s=100)
    config = CacheConfig((TierConfig("ram", 2 * SIZE), place.disk(20)), prefixes=(rule,))
    async with place.running(config) as engine:
        await place.read(engine, short + long)
        place.now_s += 98
        assert "origin" not in await place.read(engine, short + long)
        place.now_s += 2
        assert await place.read(engine, short) == ["origin"] * 3
        assert engine.stats()["retention"]["expired"] == 3
        assert "origin" not in await place.read(engine, short + long)
    # Ages survive a restart.
    place.now_s += 50
    async with place.running(config) as engine:
        assert (await place.read(engine, short + long)).count("origin") <= 2  # what memory held
        place.now_s += 49
        assert (await place.read(engine, long)).count("origin") == 0
        place.now_s += 1
        old = {block_key(ref) for ref in short}
        assert (await place.read(engine, short)).count("origin") >= 1
        # Nobody asks for these any more.
        place.now_s += 1000
        await engine.administration.sweep()
        await engine.settle()
        assert await place.held(engine, "short") == 0
        assert old.isdisjoint(check_directory(place.path, capacity_bytes=20 * SIZE))
        assert await place.held(engine, "long") >= 3


async def test_under_a_rule_a_block_without_a_label_is_fetched_again(place: Place) -> None:
    ruled, free = await place.put("ruled", 2), await place.put("free", 2)
    rules = (PrefixConfig(f"{place.url}/ruled", ttl_s=100),)
    config = CacheConfig((place.disk(20),), ring_bytes=0, prefixes=rules)
    async with place.running(config) as engine:
        await place.read(engine, ruled + free)
    (place.path / "journal-1").unlink()
    async with place.running(config) as engine:
        (row,), _ = await engine.administration.usage("", visible=bool)
        assert (row.name, row.blocks) == ("", {"disk": 4})
        assert await place.read(engine, ruled + free) == ["origin", "origin", "disk", "disk"]
        assert await place.read(engine, ruled) == ["disk"] * 2


@pytest.mark.parametrize("policy", ["kept", "lru", "s3fifo"])
async def test_a_quota_is_never_passed_and_its_blocks_make_room_for_each_other(place: Place, policy: str) -> None:
    small, other = await place.put("small", 60), await place.put("other", 20)
    config = CacheConfig(
        (TierConfig("ram", 10 * SIZE, policy=policy), place.disk(40, policy=policy)),
        ring_bytes=100 * SIZE,
        max_inflight_requests=16,
        prefixes=(PrefixConfig(f"{place.url}/small", quota_bytes=15 * SIZE),),
    )
    # Three of fifteen are for memory, which is a fifth of the whole.
    ours = {block_key(ref) for ref in small}
    most = 0

    def look(name: str) -> None:
        nonlocal most
        if name == "rename":
            lying = [parse_name(file.name)[0] for file in (place.path / "blocks-1").glob("*/*")]
            most = max(most, len(ours.intersection(lying)))

    async with place.running(config, FaultySystem(look)) as engine:
        await place.read(engine, other)

        async def read(reader: int) -> None:
            for ref in small[reader:] + small[:reader]:
                results = await read_blocks(engine, [ref])
                assert results == [place.data[ref.uri][ref.offset : ref.offset + BLOCK]]
                for tier in engine.stats()["tiers"]:
                    assert all(quota["used_bytes"] <= quota["limit_bytes"] for quota in tier["quotas"])

        await asyncio.gather(*(read(reader * 3) for reader in range(16)))
        await engine.settle()
        assert 0 < await place.held(engine, "small") <= 15
        assert most <= 12
        # There was room for all of it, so nobody else had to leave.
        assert await place.held(engine, "other") >= 20
        check_limits(engine.stats())
    lower = CacheConfig(config.tiers, prefixes=(PrefixConfig(f"{place.url}/small", quota_bytes=5 * SIZE),))
    async with place.running(lower) as engine:
        assert await place.held(engine, "small") <= 4


async def test_each_job_has_a_quota_for_what_it_fetches(place: Place) -> None:
    first, second = await place.put("first", 12), await place.put("second", 12)
    config = CacheConfig((place.disk(40, policy="lru"),), ring_bytes=0, jobs=(JobConfig("tune-*", 5 * SIZE),))
    async with place.running(config) as engine:
        for ref in first:
            await place.read(engine, [ref], job="tune-1")
        for ref in second[:6]:
            await place.read(engine, [ref], job="tune-2")
        assert [await place.held(engine, name) for name in ("first", "second")] == [5, 5]
        await place.read(engine, second[6:], job="main")
        assert await place.held(engine, "second") == 11
        quotas = [(quota["name"], quota["used_bytes"]) for quota in engine.stats()["tiers"][0]["quotas"]]
        assert quotas == [("job tune-1", 5 * SIZE), ("job tune-2", 5 * SIZE)]
    async with place.running(config) as engine:
        await place.read(engine, second[:1], job="tune-1")
        assert len(engine.stats()["tiers"][0]["quotas"]) == 2


async def test_what_is_fetched_ahead_for_a_job_falls_under_its_quota(place: Place) -> None:
    refs = await place.put("set", 8)
    table = BlockTable.from_columns(
        [refs[0].uri],
        [refs[0].version],
        object_of=np.zeros(8, np.int64),
        offset=np.arange(8) * BLOCK,
        length=np.full(8, BLOCK),
        crc32c=None,
    )
    jobs = (JobConfig("tune-*", 5 * SIZE),)
    config = CacheConfig((place.disk(40, policy="lru"),), ring_bytes=16 * SIZE, jobs=jobs)
    async with place.running(config) as engine:
        number = engine.prefetcher.open(table.digest, table, job="tune-1")
        engine.prefetcher.extend(number, np.arange(8, dtype="<i4").tobytes())
        await until(lambda: engine.stats()["origin"]["bytes"] == 8 * BLOCK)
        await until(lambda: not engine._tasks)
        await engine.settle()
        assert await place.held(engine) == 5
        assert engine.stats()["tiers"][0]["quotas"] == [
            {"name": "job tune-1", "limit_bytes": 5 * SIZE, "used_bytes": 5 * SIZE}
        ]


async def test_eviction_takes_what_lies_below_and_leaves_what_is_pinned(place: Place) -> None:
    refs = {name: await place.put(name, 3) for name in ("set/a", "set/b", "sets")}
    config = CacheConfig((TierConfig("ram", 2 * SIZE), place.disk(20)), ring_bytes=SIZE)
    async with place.running(config) as engine:
        await place.read(engine, [ref for some in refs.values() for ref in some])
        await engine.administration.pin(f"{place.url}/set/a", size_bytes=3 * SIZE, expires_s=None, uid=0)
        held = {name: await place.held(engine, name) for name in refs}
        done = await engine.administration.evict(f"{place.url}/set")
        assert (done.pinned, done.failed) == (held["set/a"], 0)
        assert done.blocks >= held["set/b"]
        assert done.size_bytes == held["set/b"] * SIZE
        assert [await place.held(engine, name) for name in refs] == [held["set/a"], 0, held["sets"]]
        assert await place.read(engine, refs["set/b"]) == ["origin"] * 3


async def test_space_of_blocks_that_are_evicted_is_given_back_also_when_who_asked_has_gone(place: Place) -> None:
    refs = await place.put("x", 4)
    unlinking, goes_on = threading.Event(), threading.Event()

    def hold(name: str) -> None:
        if name == "unlink":
            unlinking.set()
            goes_on.wait(60)

    async with place.running(CacheConfig((place.disk(10),)), FaultySystem(hold)) as engine:
        await place.read(engine, refs)
        asking = asyncio.create_task(engine.administration.evict(place.url))
        await until(unlinking.is_set)
        asking.cancel()
        await asyncio.wait({asking})
        goes_on.set()
        await engine.settle()
        tier = engine.stats()["tiers"][0]
        assert (tier["blocks"], tier["used_bytes"], tier["evictions"]) == (0, 0, 4)
    assert not check_directory(place.path, capacity_bytes=0)


async def test_what_is_held_is_told_page_by_page_for_each_name_below(place: Place) -> None:
    for number in range(7):
        refs = await place.put(f"set/{number}", 2)
        async with place.running(CacheConfig((place.disk(99),), ring_bytes=0)) as engine:
            await place.read(engine, refs)
    deep = await place.put("set/deep/er", 1)
    async with place.running(CacheConfig((place.disk(99),), ring_bytes=0)) as engine:
        await place.read(engine, deep)
        usage: Callable = engine.administration.usage
        names, after, more = [], "", True
        while more:
            rows, more = await usage(f"{place.url}/set/", after=after, limit=3, visible=bool)
            assert len(rows) <= 3
            names += [(row.name.removeprefix(place.url), row.blocks["disk"]) for row in rows]
            after = rows[-1].name
        assert names == [*((f"/set/{number}", 2) for number in range(7)), ("/set/deep/", 1)]
        (root,), _ = await usage("", visible=bool)
        assert (root.name, root.blocks, root.size_bytes) == (f"{place.url}/", {"disk": 15}, {"disk": 15 * SIZE})
        (one,), _ = await usage(f"{place.url}/set/3", visible=bool)
        assert (one.name, one.blocks) == (f"{place.url}/set/3", {"disk": 2})
        rows, _ = await usage(f"{place.url}/set", visible=lambda uri: uri.endswith("er"))
        assert [row.name for row in rows] == [f"{place.url}/set/deep/"]
        assert await usage(f"{place.url}/nothing", visible=bool) == ([], False)


async def test_a_block_whose_label_cannot_be_written_is_not_kept_and_is_read(place: Place) -> None:
    refs = await place.put("x", 3)
    seen = []

    def fail(name: str) -> None:
        seen.append(name)
        if name == "open" and broken:
            raise OSError(28, "No space left on device")

    broken = [True]
    async with place.running(CacheConfig((place.disk(9),), ring_bytes=0), FaultySystem(fail)) as engine:
        assert await place.read(engine, refs) == ["origin"] * 3
        assert await place.held(engine) == 0
        assert "posix_fallocate" not in seen
        check_directory(place.path, capacity_bytes=0)


async def test_labels_of_blocks_that_are_gone_are_forgotten_in_time(place: Place, monkeypatch) -> None:
    monkeypatch.setattr("cache.administration._SLACK_LABELS", 20)
    refs = await place.put("x", 200)
    async with place.running(CacheConfig((TierConfig("ram", 5 * SIZE),), ring_bytes=0)) as engine:
        for ref in refs:
            await place.read(engine, [ref])
        assert engine.stats()["retention"]["labels"] <= 2 * 5 + 20 + 2
        assert await place.held(engine) == 5


async def test_labels_of_a_disk_that_is_left_alone_are_not_forgotten(place: Place, monkeypatch) -> None:
    monkeypatch.setattr("cache.administration._SLACK_LABELS", 20)
    kept, others = await place.put("kept/x", 8), await place.put("other", 40)
    config = CacheConfig((place.disk(10),), ring_bytes=0)
    patient = DiskLimits(first_retry_s=1000, last_retry_s=1000)
    async with place.running(config, limits=patient) as engine:
        await engine.administration.pin(f"{place.url}/kept", size_bytes=8 * SIZE, expires_s=None, uid=0)
        await place.read(engine, kept)
        engine._stack.levels[0].members[0]._calls.distrust("a call does not return")
        for ref in others:
            assert await place.read(engine, [ref]) == ["origin"]
        assert engine.stats()["retention"]["labels"] < 48
        assert await place.held(engine, "kept") == 8


async def test_blocks_that_expire_at_once_are_all_counted(place: Place) -> None:
    refs = await place.put("x", 12)
    config = CacheConfig((place.disk(20),), ring_bytes=0, prefixes=(PrefixConfig(place.url, ttl_s=100),))
    async with place.running(config) as engine:
        await place.read(engine, refs)
        place.now_s += 100
        await asyncio.gather(*(place.read(engine, [ref]) for ref in refs))
        assert engine.stats()["retention"]["expired"] == 12


def test_a_block_takes_a_page_here() -> None:
    assert file_bytes(BLOCK) <= SIZE
