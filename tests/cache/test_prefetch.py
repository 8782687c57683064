"""Planned blocks are there before their readers, within a window, and without ever standing in a reader's way."""

from __future__ import annotations

import asyncio
import itertools
import random
import shutil
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from math import inf
from pathlib import Path

import numpy as np
import pytest

from cache.block_table import BlockTable
from cache.config import CacheConfig, TierConfig
from cache.engine import Engine
from cache.handle import Handle
from cache.keys import block_key
from cache.prefetch import MAX_PLANS
from cache.testing import FaultySystem, check_limits, read_handle, running_engine, until
from cache.window import Window
from connectors.errors import BadInputError, DataError, TransientError
from connectors.objects import Span
from connectors.protocols import Store
from connectors.registry import open_store
from connectors.wrappers import CountingStore

BLOCK = 4000
SIZE = 4096
WINDOW = 12  # blocks: three quarters of the ring
RING = 16 * SIZE

_names = itertools.count()


class Origin:
    """One object a block, or all in one, in a store whose reads can be held back."""

    def __init__(self) -> None:
        self.url = f"memory://prefetch-{next(_names)}"
        self.store = CountingStore(open_store(self.url))
        self.asked: list[tuple[str, Span]] = []
        self.more = asyncio.Condition()
        self.gate = asyncio.Event()
        self.gate.set()
        self.broken: set[str] = set()
        for name in ("get_range", "get_ranges"):
            setattr(self.store, name, self._watch(name, getattr(self.store, name)))

    def _watch(self, name: str, read: Callable[..., Awaitable[object]]) -> Callable[..., Awaitable[object]]:
        async def watched(key: str, wanted: object, *, version: str | None = None) -> object:
            self.asked += [(key, span) for span in ([wanted] if name == "get_range" else wanted)]
            async with self.more:
                self.more.notify_all()
            await self.gate.wait()
            if key in self.broken:
                raise TransientError(f"{key} is broken")
            return await read(key, wanted, version=version)

        return watched

    async def table(self, blocks: int, *, per_object: int = 1) -> BlockTable:
        objects = blocks // per_object
        versions = []
        for number in range(objects):
            body = b"".join(content(number * per_object + inside) for inside in range(per_object))
            versions.append((await self.store.put(f"o{number:04}", body)).version)
        return BlockTable.from_columns(
            [f"{self.url}/o{number:04}" for number in range(objects)],
            versions,
            object_of=np.repeat(np.arange(objects), per_object),
            offset=np.tile(np.arange(per_object) * BLOCK, objects),
            length=np.full(blocks, BLOCK),
            crc32c=None,
        )

    def open(self, root: str) -> Store:
        return self.store

    async def was_asked(self, times: int) -> None:
        async with self.more:
            await self.more.wait_for(lambda: len(self.asked) >= times)

    def blocks_asked(self, per_object: int = 1) -> list[int]:
        return [int(key[1:]) * per_object + span.offset // BLOCK for key, span in self.asked]


def content(block: int) -> bytes:
    return block.to_bytes(4, "big") * (BLOCK // 4)


@pytest.fixture
async def origin() -> Origin:
    return Origin()


def running(origin: Origin, *tiers: TierConfig, **settings: int) -> AbstractAsyncContextManager[Engine]:
    return running_engine(CacheConfig(tiers, **{"ring_bytes": RING} | settings), open_store=origin.open)


def planned(engine: Engine, table: BlockTable, blocks: list[int]) -> int:
    number = engine.prefetcher.open(table.digest, table)
    engine.prefetcher.extend(number, ids(blocks))
    return number


def ids(blocks: list[int]) -> bytes:
    return np.array(blocks, "<i4").tobytes()


async def settled(engine: Engine) -> None:
    """Until nothing is fetched or placed any more."""
    while tasks := [*engine._tasks, *engine._stack._tasks]:
        await asyncio.wait(tasks)
        await asyncio.sleep(0)


async def read(engine: Engine, table: BlockTable, *blocks: int) -> list[str]:
    refs = [table.ref(block) for block in blocks]
    handles = await engine.get_many(refs)
    for ref, block, handle in zip(refs, blocks, handles, strict=True):
        assert isinstance(handle, Handle), handle
        assert read_handle(block_key(ref), handle) == content(block)
    return [handle.source for handle in handles if isinstance(handle, Handle)]


def counts(engine: Engine) -> dict[str, int]:
    return engine.stats()["prefetch"]


async def test_a_reader_in_plan_order_never_meets_the_origin(origin: Origin) -> None:
    table = await origin.table(100)
    order = random.Random(0).sample(range(100), 100)
    async with running(origin) as engine:
        planned(engine, table, order)
        for block in order:
            await settled(engine)
            assert await read(engine, table, block) == ["ring"]
        stats = counts(engine)
    assert origin.blocks_asked() == order
    assert stats["useful"] == stats["issued"] == 100
    assert stats["late"] == stats["wasted"] == stats["failed"] == 0


async def test_the_window_is_not_passed(origin: Origin) -> None:
    table = await origin.table(100)
    async with running(origin) as engine:
        planned(engine, table, list(range(100)))
        await settled(engine)
        assert len(origin.asked) == WINDOW
        await read(engine, table, 0, 1, 2)
        await settled(engine)
        assert origin.blocks_asked() == list(range(WINDOW + 3))
        check_limits(engine.stats())


async def test_what_a_tier_with_room_has_taken_is_no_longer_in_the_window(origin: Origin) -> None:
    table = await origin.table(200)
    async with running(origin, TierConfig("ram", 20 * SIZE)) as engine:
        planned(engine, table, list(range(200)))
        await settled(engine)
        # At most half of the tier, and the window behind it, all of which is still here.
        issued = len(origin.asked)
        assert sorted(origin.blocks_asked()) == list(range(issued))
        assert WINDOW < issued <= WINDOW + 10
        assert counts(engine)["ahead_bytes"] <= WINDOW * BLOCK
        assert "origin" not in await read(engine, table, *range(issued))
        await settled(engine)
        stats = counts(engine)
        assert (stats["wasted"], stats["useful"]) == (0, issued)
        assert engine.prefetcher._all_spared_bytes == sum(engine.prefetcher._spared.values())
        check_limits(engine.stats())


async def test_a_tier_with_much_room_takes_some_windows_ahead_and_gives_them_back(origin: Origin) -> None:
    table = await origin.table(200)
    async with running(origin, TierConfig("ram", 1000 * SIZE)) as engine:
        number = planned(engine, table, list(range(200)))
        await settled(engine)
        assert len(origin.asked) == (4 + 1) * WINDOW
        engine.prefetcher.close(number)
        stats = counts(engine)
        assert (stats["wasted"], stats["ahead_bytes"]) == (5 * WINDOW, 0)
        assert engine.prefetcher._all_spared_bytes == 0


async def test_neighbours_share_a_request(origin: Origin) -> None:
    table = await origin.table(100, per_object=100)
    async with running(origin) as engine:
        planned(engine, table, list(range(100)))
        await settled(engine)
        assert engine.stats()["origin"]["requests"] == 1
        for block in range(100):
            await read(engine, table, block)
            await settled(engine)
        assert engine.stats()["origin"]["requests"] <= 100 // (WINDOW // 4) + 1
        assert counts(engine)["useful"] == 100


async def test_a_reader_goes_before_what_nobody_waits_for(origin: Origin) -> None:
    table = await origin.table(50)
    async with running(origin, max_inflight_requests=4) as engine:
        origin.gate.clear()
        planned(engine, table, list(range(20)))
        await origin.was_asked(3)
        assert origin.blocks_asked() == [0, 1, 2], "one request stays free"
        demand = asyncio.create_task(read(engine, table, 40))
        await origin.was_asked(4)
        assert origin.blocks_asked()[3] == 40
        joined = asyncio.create_task(read(engine, table, 9))
        await asyncio.sleep(0)
        origin.gate.set()
        assert await demand == await joined == ["origin"]
        assert origin.blocks_asked()[4] == 9, "a block that a reader waits for by now goes first"
        assert counts(engine)["late"] == 1
        await settled(engine)
    assert len(set(origin.asked)) == len(origin.asked), "every block once"


@pytest.mark.parametrize("ending", ["close", "replace"])
async def test_what_only_an_ended_plan_wanted_is_cancelled(origin: Origin, ending: str) -> None:
    table = await origin.table(50)
    async with running(origin, max_inflight_requests=4) as engine:
        origin.gate.clear()
        number = planned(engine, table, list(range(20)))
        other = planned(engine, table, [1, 30])
        waiting = asyncio.create_task(read(engine, table, 2))
        await origin.was_asked(3)
        getattr(engine.prefetcher, ending)(number)
        if ending == "replace":
            engine.prefetcher.extend(number, ids([44]))
        origin.gate.set()
        assert await waiting == ["origin"]
        await settled(engine)
        fetched = {1, 2, 30} | ({44} if ending == "replace" else set())
        assert {b for b in range(50) if engine._stack.holds(block_key(table.ref(b)))} == fetched
        assert await read(engine, table, 0, 1, 30) == ["origin", "ring", "ring"]
        stats = counts(engine)
        assert stats["issued"] == stats["useful"] + stats["late"] + stats["wasted"] + (ending == "replace")
        engine.prefetcher.close(other)


async def test_a_request_for_several_plans_goes_on_while_one_of_them_wants_a_block_of_it(origin: Origin) -> None:
    table = await origin.table(2, per_object=2)
    async with running(origin) as engine:
        origin.gate.clear()
        first = planned(engine, table, [0, 1])
        second = planned(engine, table, [1])
        await origin.was_asked(2)
        engine.prefetcher.close(first)
        planned(engine, table, [0])
        engine.prefetcher.close(second)
        origin.gate.set()
        await settled(engine)
        assert await read(engine, table, 0) == ["ring"]
        assert len(origin.asked) == 2


async def test_a_reader_does_not_wait_for_ever_for_what_a_plan_began_while_a_file_was_found_gone(
    tmp_path: Path, origin: Origin
) -> None:
    table = await origin.table(1)
    unlinking, goes_on = threading.Event(), threading.Event()

    def hold(name: str) -> None:
        if name == "unlink":
            unlinking.set()
            goes_on.wait(60)

    config = CacheConfig((TierConfig("disk", SIZE, str(tmp_path)),), ring_bytes=RING)
    async with running_engine(config, open_store=origin.open, system=FaultySystem(hold)) as engine:
        assert await read(engine, table, 0) == ["origin"]
        await engine.settle()
        shutil.rmtree(tmp_path / "blocks-1")
        origin.gate.clear()
        reader = asyncio.create_task(read(engine, table, 0))
        await until(unlinking.is_set)
        number = planned(engine, table, [0])
        await origin.was_asked(2)
        goes_on.set()
        await until(lambda: counts(engine)["late"] == 1)
        engine.prefetcher.close(number)
        origin.gate.set()
        assert await reader == ["origin"]
        assert len(origin.asked) == 2


async def test_a_block_given_up_while_it_came_can_be_asked_for_at_once(origin: Origin) -> None:
    table = await origin.table(3)
    async with running(origin) as engine:
        origin.gate.clear()
        number = planned(engine, table, [0])
        await origin.was_asked(1)
        engine.prefetcher.close(number)
        waiting = asyncio.create_task(read(engine, table, 0))
        await asyncio.sleep(0)
        origin.gate.set()
        assert await waiting == ["origin"]


async def test_what_arrived_for_a_plan_that_ended_is_counted_as_wasted(origin: Origin) -> None:
    table = await origin.table(50)
    async with running(origin) as engine:
        number = planned(engine, table, list(range(20)))
        await settled(engine)
        await read(engine, table, 0)
        issued = counts(engine)["issued"]
        engine.prefetcher.close(number)
        stats = counts(engine)
        assert (stats["useful"], stats["wasted"], stats["ahead_bytes"]) == (1, issued - 1, 0)


@pytest.mark.parametrize("was_read", [False, True])
async def test_a_block_that_left_before_its_reader_and_is_wanted_anew_takes_its_place_once(
    origin: Origin, was_read: bool
) -> None:
    table = await origin.table(1)
    async with running(origin) as engine:
        if was_read:
            await read(engine, table, 0)
        plans = [planned(engine, table, [0])]
        await settled(engine)
        await engine.administration.evict(origin.url)
        plans.append(planned(engine, table, [0]))
        await settled(engine)
        assert counts(engine)["ahead_bytes"] == BLOCK
        for number in plans:
            engine.prefetcher.close(number)
        stats = counts(engine)
        assert (stats["issued"] - stats["wasted"], stats["ahead_bytes"]) == (0, 0)


async def test_a_block_that_left_before_its_reader_came_was_fetched_in_vain(origin: Origin) -> None:
    table = await origin.table(1)
    async with running(origin) as engine:
        planned(engine, table, [0])
        await settled(engine)
        await engine.administration.evict(origin.url)
        assert await read(engine, table, 0) == ["origin"]
        stats = counts(engine)
        assert [stats[name] for name in ("issued", "useful", "wasted", "ahead_bytes")] == [1, 0, 1, 0]


async def test_a_failed_prefetch_is_asked_again_by_its_reader_who_hears_why(origin: Origin) -> None:
    table = await origin.table(5)
    origin.broken = {"o0001"}
    async with running(origin) as engine:
        planned(engine, table, [0, 1, 2])
        await settled(engine)
        assert counts(engine)["failed"] == 1
        assert counts(engine)["ahead_bytes"] == 2 * BLOCK
        (error,) = await engine.get_many([table.ref(1)])
        assert isinstance(error, TransientError)
        origin.broken = set()
        assert await read(engine, table, 1) == ["origin"]


async def test_progress_makes_room_for_what_comes(origin: Origin) -> None:
    table = await origin.table(60)
    async with running(origin) as engine:
        number = planned(engine, table, list(range(60)))
        await settled(engine)
        engine.prefetcher.advance(number, 40)  # its reader found those elsewhere
        await settled(engine)
        assert origin.blocks_asked() == [*range(WINDOW), *range(40, 40 + WINDOW)]
        assert counts(engine)["wasted"] == WINDOW


async def test_others_who_use_the_ring_do_not_displace_what_a_plan_wants_soon(origin: Origin) -> None:
    table = await origin.table(200)
    async with running(origin) as engine:
        planned(engine, table, list(range(WINDOW)))
        await settled(engine)
        for block in range(100, 200):
            await read(engine, table, block)
        assert await read(engine, table, *range(WINDOW)) == ["ring"] * WINDOW
        for block in range(100, 100 + WINDOW):
            await read(engine, table, block)
        assert await read(engine, table, 0) == ["origin"], "after its last use it leaves"


async def test_what_a_plan_wants_much_later_stays_in_the_ring_no_longer_than_other_blocks(origin: Origin) -> None:
    table = await origin.table(200)
    async with running(origin) as engine:
        await read(engine, table, 199)
        planned(engine, table, [*range(WINDOW + 2), 199])
        await settled(engine)
        for block in range(100, 110):
            await read(engine, table, block)
        assert not engine.has(block_key(table.ref(199)))


async def test_what_a_tier_holds_is_not_fetched(tmp_path: Path, origin: Origin) -> None:
    table = await origin.table(30)
    disk = TierConfig("disk", 10 * SIZE, str(tmp_path), medium="nvme")
    async with running(origin, disk) as engine:
        for block in range(30):
            await read(engine, table, block)
            await settled(engine)
        before = len(origin.asked)
        planned(engine, table, list(range(30)))
        await settled(engine)
        held = engine.stats()["tiers"][0]["blocks"]
        assert held == 10
        assert counts(engine)["resident"] >= 5
        assert not set(origin.blocks_asked()[before:]) & {
            b for b in range(30) if engine._stack.levels[0].holds(block_key(table.ref(b)))
        }


async def test_a_block_that_is_wanted_again_soon_stays_in_the_window(origin: Origin) -> None:
    table = await origin.table(40)
    # Half of the first window comes again before anything new does.
    order = [*range(WINDOW), *reversed(range(WINDOW // 2, WINDOW)), *range(WINDOW, 40)]
    async with running(origin) as engine:
        number = planned(engine, table, order)
        for place, block in enumerate(order):
            await settled(engine)
            assert await read(engine, table, block) == ["ring"]
            engine.prefetcher.advance(number, place + 1)
            held = engine._stack.ring.members[0].ledger.keys()
            ahead = [key for key in held if engine._futures.near_use(key) < inf]
            assert len(ahead) * BLOCK <= counts(engine)["ahead_bytes"] <= WINDOW * BLOCK
    assert len(set(origin.asked)) == len(origin.asked), "every block once"
    assert counts(engine)["ahead_bytes"] == 0


async def test_a_block_that_came_late_and_is_wanted_again_soon_is_in_the_window(origin: Origin) -> None:
    table = await origin.table(3)
    async with running(origin) as engine:
        origin.gate.clear()
        number = planned(engine, table, [0, 1, 0, 2])
        await origin.was_asked(3)
        late = asyncio.create_task(read(engine, table, 0))
        await asyncio.sleep(0)
        origin.gate.set()
        assert await late == ["origin"]
        await settled(engine)
        assert counts(engine)["ahead_bytes"] == 3 * BLOCK
        assert await read(engine, table, 1, 0, 2) == ["ring"] * 3
        assert counts(engine)["ahead_bytes"] == 0
        engine.prefetcher.close(number)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
async def test_what_a_tier_gives_up_before_its_reader_came_is_in_the_window(
    tmp_path: Path, origin: Origin, on_disk: bool, ahead: bool
) -> None:
    table = await origin.table(3)
    low, middle, high = sorted(range(3), key=lambda block: block_key(table.ref(block)))
    tier = TierConfig("tier", 2 * SIZE, str(tmp_path) if on_disk else None)
    async with running(origin, tier) as engine:
        if not ahead:
            await read(engine, table, high)
            await engine.settle()
        planned(engine, table, [high])
        await settled(engine)
        assert counts(engine)["ahead_bytes"] == (BLOCK if ahead and on_disk else 0)
        for block in (middle, low):
            await read(engine, table, block)
            await engine.settle()
        assert engine._stack.passes_by(block_key(table.ref(high)))
        assert counts(engine)["ahead_bytes"] == BLOCK
        assert await read(engine, table, high) == ["ring"]
        assert counts(engine)["ahead_bytes"] == 0


async def test_two_ranks_share_what_both_will_read(origin: Origin) -> None:
    table = await origin.table(40)
    order = random.Random(2).sample(range(40), 40)
    async with running(origin) as engine:
        for _ in range(2):
            planned(engine, table, order)
        for block in order:
            await settled(engine)
            assert await read(engine, table, block) == ["ring"]
            assert await read(engine, table, block) == ["ring"]
    assert len(origin.asked) == 40


async def test_what_waits_in_the_ring_for_several_plans_takes_its_place_in_the_window_once(origin: Origin) -> None:
    table = await origin.table(1)
    async with running(origin) as engine:
        await read(engine, table, 0)
        for _ in range(2):
            planned(engine, table, [0])
            assert counts(engine)["ahead_bytes"] == BLOCK
        await read(engine, table, 0, 0)
        assert counts(engine)["ahead_bytes"] == 0


async def test_a_block_as_large_as_the_window_is_fetched(origin: Origin) -> None:
    table = await origin.table(2)
    async with running(origin, ring_bytes=2 * SIZE) as engine:
        engine.prefetcher._window.size_bytes = BLOCK
        planned(engine, table, [0, 1])
        await settled(engine)
        assert origin.blocks_asked() == [0]


async def test_a_block_larger_than_the_window_is_left_to_its_reader(origin: Origin) -> None:
    table = await origin.table(10)
    async with running(origin, ring_bytes=BLOCK) as engine:
        planned(engine, table, list(range(10)))
        await settled(engine)
        assert origin.asked == []
        assert await read(engine, table, 3) == ["origin"]


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
async def test_over_epochs_the_hit_ratio_is_the_bound_and_the_disk_is_written_once(
    tmp_path: Path, origin: Origin, share: float
) -> None:
    blocks, epochs = 200, 4
    table = await origin.table(blocks)
    capacity = int(share * blocks)
    disk = TierConfig("disk", capacity * SIZE, str(tmp_path), medium="nvme")
    rng = random.Random(3)
    orders = [rng.sample(range(blocks), blocks) for _ in range(epochs)]
    async with running(origin, disk) as engine:
        number = planned(engine, table, orders[0])
        for epoch in range(epochs):
            if epoch + 1 < epochs:
                engine.prefetcher.extend(number, ids(orders[epoch + 1]))  # before this one ends
            if epoch == 1:
                await settled(engine)
                fetched, written = len(origin.asked), engine.stats()["tiers"][0]["written_bytes"]
                ahead = counts(engine)["ahead_bytes"] // BLOCK
            for place, block in enumerate(orders[epoch]):
                await settled(engine)
                (source,) = await read(engine, table, block)
                assert source != "origin", "a reader never waits"
                engine.prefetcher.advance(number, epoch * blocks + place + 1)
        # What lay ahead when the counting began was fetched before it.
        hits = 1 - (len(origin.asked) - fetched + ahead) / (blocks * (epochs - 1))
        assert hits >= 0.98 * share
        assert hits <= share + WINDOW / blocks
        assert engine.stats()["tiers"][0]["written_bytes"] == written, "later epochs write nothing"
        check_limits(engine.stats())


async def test_a_table_is_kept_while_a_plan_uses_it(origin: Origin) -> None:
    table = await origin.table(3)
    async with running(origin) as engine:
        prefetcher = engine.prefetcher
        with pytest.raises(BadInputError):
            prefetcher.open(table.digest)
        first = prefetcher.open(table.digest, table)
        second = prefetcher.open(table.digest)
        prefetcher.close(first)
        assert prefetcher.table(table.digest) is table
        prefetcher.close(second)
        assert prefetcher.table(table.digest) is None


async def test_bad_numbers_and_too_many_plans_are_refused(origin: Origin) -> None:
    table = await origin.table(3)
    async with running(origin) as engine:
        number = engine.prefetcher.open(table.digest, table)
        with pytest.raises(BadInputError):
            engine.prefetcher.extend(number, b"123")
        with pytest.raises(BadInputError):
            engine.prefetcher.extend(number, ids([3]))
        for _ in range(MAX_PLANS - 1):
            engine.prefetcher.open(table.digest)
        with pytest.raises(BadInputError, match=str(MAX_PLANS)):
            engine.prefetcher.open(table.digest)


async def test_a_plan_of_a_closed_engine_changes_nothing(origin: Origin) -> None:
    table = await origin.table(30)
    async with running(origin) as engine:
        origin.gate.clear()
        number = planned(engine, table, list(range(30)))
        await asyncio.sleep(0)
    assert not engine._tasks
    engine.prefetcher.close(number)
    assert counts(engine)["ahead_bytes"] == 0


async def test_what_comes_for_a_reader_of_a_neighbour_after_its_plan_has_ended_is_in_no_window(origin: Origin) -> None:
    table = await origin.table(10, per_object=10)
    async with running(origin) as engine:
        origin.gate.clear()
        number = planned(engine, table, list(range(10)))
        await origin.was_asked(10)
        waiting = asyncio.create_task(read(engine, table, 4))
        await asyncio.sleep(0)
        engine.prefetcher.close(number)
        origin.gate.set()
        assert await waiting == ["origin"]
        await settled(engine)
        stats = counts(engine)
        assert (stats["late"], stats["wasted"], stats["ahead_bytes"]) == (1, 9, 0)


def kinds(engine: Engine) -> dict[str, tuple[int, int, int]]:
    """Blocks fetched ahead, useful, and wasted, by kind."""
    found = engine.stats()["prefetch"]["kinds"]
    return {kind: (n["issued"], n["useful"] + n["late"], n["wasted"]) for kind, n in found.items() if n["issued"]}


@pytest.mark.parametrize(("kind", "step"), [("sequential", 1), ("strided", 3)])
async def test_a_walk_through_an_object_is_followed_to_its_end(origin: Origin, kind: str, step: int) -> None:
    table = await origin.table(120, per_object=60)
    async with running(origin, ring_bytes=256 * SIZE) as engine:
        sources = []
        for block in range(0, 60, step):
            sources += await read(engine, table, block)
            await settled(engine)
        # It counts from the fifth read on, and is asked how long it is.
        assert sources == ["origin"] * 6 + ["ring"] * (60 // step - 6)
        assert kinds(engine) == {kind: (60 // step - 6, 60 // step - 6, 0)}
        assert sorted(origin.blocks_asked(60)) == list(range(0, 60, step)), "and nothing behind the end"
        assert len(engine._futures) == 0
        assert counts(engine)["ahead_bytes"] == 0


@pytest.mark.parametrize("order", [list(range(100)), random.Random(7).sample(range(100), 100) * 3])
async def test_many_samples_of_one_block_are_one_step(origin: Origin, order: list[int]) -> None:
    table = await origin.table(100, per_object=100)
    guessed = []
    for samples in (1, 5):
        async with running(origin, ring_bytes=64 * SIZE) as engine:
            for block in order:
                for _ in range(samples):
                    await read(engine, table, block)
                    await settled(engine)
            guessed.append(kinds(engine))
    assert guessed[0] == guessed[1] != {}


async def test_a_walk_that_stops_leaves_little_behind(origin: Origin) -> None:
    table = await origin.table(2000, per_object=1000)
    async with running(origin, ring_bytes=256 * SIZE) as engine:
        for block in range(40):
            await read(engine, table, block)
            await settled(engine)
        for block in random.Random(1).sample(range(100, 1000), 20):
            await read(engine, table, block)
            await settled(engine)
        issued, useful, wasted = kinds(engine)["sequential"]
        assert issued == useful + wasted
        assert 0 < wasted <= 192 // 8
        assert len(engine._futures) == 0


async def test_reads_in_random_order_are_left_alone(origin: Origin) -> None:
    table = await origin.table(300, per_object=300)
    rng = random.Random(6)
    async with running(origin, ring_bytes=64 * SIZE) as engine:
        for _ in range(4):
            for block in rng.sample(range(300), 300):
                await read(engine, table, block)
        assert kinds(engine) == {}
        assert len(engine._futures) == 0


async def test_an_order_that_comes_again_is_followed(origin: Origin, monkeypatch) -> None:
    monkeypatch.setattr("cache.guesses._PEACE_READS", 8)  # while guesses bring blocks, they do not rest
    table = await origin.table(200)
    order = random.Random(7).sample(range(200), 200)
    async with running(origin, ring_bytes=64 * SIZE) as engine:
        for _ in range(4):
            sources = []
            for block in order:
                sources += await read(engine, table, block)
                await settled(engine)
        assert sources == ["ring"] * 200, "also over the end of the epoch"
        issued, _, wasted = kinds(engine)["repeated"]
        assert issued >= 400
        assert wasted == 0
        for block in random.Random(8).sample(range(200), 200):
            await read(engine, table, block)
            await settled(engine)
        assert len(engine._futures) == 0, "and given up when it does not"
        assert counts(engine)["ahead_bytes"] == 0


@pytest.mark.parametrize("order", [list(range(40)), random.Random(7).sample(range(100), 100) * 3])
async def test_what_was_guessed_goes_with_the_last_reader_and_comes_again_with_the_next(
    origin: Origin, order: list[int]
) -> None:
    table = await origin.table(100, per_object=100)
    async with running(origin, ring_bytes=64 * SIZE) as engine:
        for block in order:
            await read(engine, table, block)
            await settled(engine)
        (kind,) = kinds(engine)
        assert counts(engine)["ahead_bytes"] > 0
        engine.prefetcher.nobody_reads()
        assert len(engine._futures) == 0
        assert counts(engine)["ahead_bytes"] == 0
        issued, useful, wasted = kinds(engine)[kind]
        assert issued == useful + wasted
        for block in order if kind == "repeated" else range(40, 50):
            await read(engine, table, block)
            await settled(engine)
        assert kinds(engine)[kind][1] > useful


async def test_guesses_that_rest_wake_when_a_block_is_missed(origin: Origin, monkeypatch) -> None:
    monkeypatch.setattr("cache.guesses._PEACE_READS", 8)
    table = await origin.table(60, per_object=60)
    async with running(origin, ring_bytes=256 * SIZE) as engine:
        for _ in range(20):
            await read(engine, table, 0)
        sources = []
        for block in range(1, 60):
            sources += await read(engine, table, block)
            await settled(engine)
        first = sources.index("ring")
        assert sources == ["origin"] * first + ["ring"] * (59 - first)


async def test_what_a_reader_announces_is_not_guessed_at(origin: Origin) -> None:
    table = await origin.table(60, per_object=60)
    async with running(origin, ring_bytes=256 * SIZE) as engine:
        planned(engine, table, list(range(60)))
        for block in range(60):
            await settled(engine)
            await read(engine, table, block)
        assert kinds(engine) == {"plan": (60, 60, 0)}


async def test_labels_of_blocks_that_only_plans_asked_for_are_forgotten_in_time(origin: Origin, monkeypatch) -> None:
    monkeypatch.setattr("cache.administration._SLACK_LABELS", 20)
    table = await origin.table(300)
    async with running(origin) as engine:
        planned(engine, table, list(range(300)))
        most = 0
        for block in range(300):
            await settled(engine)
            assert await read(engine, table, block) == ["ring"]
            most = max(most, engine.stats()["retention"]["labels"])
    # Of twice what the ring holds, the slack, and what was on its way.
    assert most <= 2 * 16 + 20 + WINDOW


async def test_an_object_that_cannot_be_measured_is_not_followed(origin: Origin) -> None:
    table = await origin.table(60, per_object=60)
    async with running(origin, ring_bytes=256 * SIZE) as engine:
        await origin.store.delete("o0000")
        for block in range(10):
            (error,) = await engine.get_many([table.ref(block)])
            assert isinstance(error, DataError)
            await settled(engine)
        assert kinds(engine) == {}


async def test_the_window_hears_of_a_block_that_came_late_once(origin: Origin, monkeypatch) -> None:
    late: list[float] = []
    monkeypatch.setattr(Window, "came_late", lambda window, now_s: late.append(now_s))
    table = await origin.table(3)
    async with running(origin) as engine:
        origin.gate.clear()
        planned(engine, table, [0, 1, 2])
        await origin.was_asked(3)
        readers = [asyncio.create_task(read(engine, table, 0)) for _ in range(2)]
        await until(lambda: engine.stats()["joined"] == 2)
        assert len(late) == counts(engine)["late"] == 1
        origin.gate.set()
        await asyncio.gather(*readers)
    assert len(late) == 1


async def test_the_window_follows_what_readers_take_and_the_origin_needs(origin: Origin) -> None:
    table = await origin.table(100)
    async with running(origin) as engine:
        planned(engine, table, list(range(100)))
        for block in range(100):
            await settled(engine)
            await read(engine, table, block)
        stats = counts(engine)
        assert stats["latency_s"] > 0
        assert stats["rate_bytes_s"] > 0
