"""The engine beside a dict: whatever happens to objects, files, disk, clock and process, right bytes or a clear error.

Pins hold, what is too old is not served, quotas are kept to, and plans change nothing but when things are fetched.

Nothing here depends on how fast anything is: what files and pins are compared with is looked at when the engine rests.
A crash is an engine that is left in the middle of its work: its directory is taken over as it lies there.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import random
import shutil
import tempfile
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cache.block import parse_name
from cache.block_table import BlockTable
from cache.config import CacheConfig, JobConfig, PrefixConfig, TierConfig
from cache.disk import DiskLimits
from cache.engine import Engine
from cache.keys import BlockRef, block_key
from cache.testing import FaultySystem, check_directory, check_limits, read_blocks
from cache.tier import Tier
from connectors.errors import BadInputError, ChangedError, DataError, NotFoundError, TransientError
from connectors.objects import Span
from connectors.registry import open_store

BLOCK = 1000
PAGE = 4096
OBJECTS = ["a", "b", "c"]
BLOCKS_PER_OBJECT = 6
RAM_BLOCKS, DISK_BLOCKS, RING_BLOCKS = 3, 5, 2
# For "a" alone. The quota is dealt to the tiers by their size. The age is so high that no engine lives long enough to
# look for old blocks by itself.
TTL_S, QUOTA_BLOCKS, QUOTA_BLOCKS_OF = 6400, 5, {"ram": 1, "disk": 3}
JOB_BLOCKS = 4
# By their share of the configured disk.
PINNABLE_DISK_BLOCKS = 4
FAULTS = [None, errno.ENOSPC, errno.EDQUOT, errno.EIO]
FAILING_CALLS = ["open", "posix_fallocate", "write", "rename", "unlink", "preadv", "fstat", "fsync"]

_names = itertools.count()


class WatchedStore:
    """A store that notes when each range was read last."""

    def __init__(self, store: Any, clock: Any) -> None:
        self._store = store
        self._clock = clock
        self.read_s: dict[tuple[str, str | None, int], float] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def get_range(self, key: str, span: Span, *, version: str | None = None) -> Any:
        self.read_s[key, version, span.offset] = self._clock()
        return await self._store.get_range(key, span, version=version)

    async def get_ranges(self, key: str, spans: Any, *, version: str | None = None) -> Any:
        self.read_s |= {(key, version, span.offset): self._clock() for span in spans}
        return await self._store.get_ranges(key, spans, version=version)


class CacheMachine(RuleBasedStateMachine):
    """See the module's docstring."""

    policies = ("kept", "kept")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.path = Path(tempfile.mkdtemp())
        self.root = f"memory://model-{next(_names)}"
        self.now_s = 1e6
        self.store = WatchedStore(open_store(self.root), lambda: self.now_s)
        # Bytes and end of each pin, by prefix, and whether the directory knows them.
        self.pins: dict[str, tuple[int, float | None]] = {}
        self.pins_survive = True
        # Those that are open, each with the number of places it knows.
        self.plans: list[tuple[int, int]] = []
        # Whether nobody harms the disk and its files; and whether the disk has ever failed.
        self.gentle = True
        self.failed = False
        # Every content that an object ever had, by version; the newest last.
        self.contents: dict[str, dict[str, bytes]] = {key: {} for key in OBJECTS}
        self.fault: int | None = None
        self.failing_call = ""
        self.engine: Engine | None = None
        self.disk_blocks = DISK_BLOCKS

    @initialize(gentle=st.booleans())
    def begin(self, gentle: bool) -> None:
        self.gentle = gentle
        for number, key in enumerate(OBJECTS):
            self.put(key, number)
        self.start()

    @rule(key=st.sampled_from(OBJECTS), seed=st.integers(0, 999))
    def put(self, key: str, seed: int) -> None:
        data = random.Random(seed).randbytes(BLOCK * BLOCKS_PER_OBJECT)
        self.contents[key][self.runner.run(self.store.put(key, data)).version] = data

    @rule(
        wanted=st.lists(
            st.tuples(st.sampled_from(OBJECTS), st.integers(0, BLOCKS_PER_OBJECT - 1), st.integers(0, 2)),
            min_size=1,
            max_size=12,
        ),
        readers=st.integers(1, 3),
        job=st.sampled_from(["", "tune-1", "tune-2"]),
    )
    def get(self, wanted: list[tuple[str, int, int]], readers: int, job: str) -> None:
        refs = []
        for key, number, age in wanted:
            versions = list(self.contents[key])
            version = versions[max(0, len(versions) - 1 - age)]
            refs.append(BlockRef(f"{self.root}/{key}", version, number * BLOCK, BLOCK))
        watched = self.gentle and self.pins
        if watched:
            self.rest()
        protected, pinned = self.protected(), self.pinned()

        async def read_all() -> list[list[bytes | DataError]]:
            return await asyncio.gather(*(read_blocks(self.engine, refs, job=job) for _ in range(readers)))

        for results in self.runner.run(read_all()):
            for ref, result in zip(refs, results, strict=True):
                versions = self.contents[ref.uri.rpartition("/")[2]]
                if isinstance(result, DataError):
                    assert isinstance(result, ChangedError), result
                    assert ref.version != list(versions)[-1], "the newest version can always be had"
                else:
                    assert result == versions[ref.version][ref.offset : ref.offset + ref.length]
                    key = ref.uri.rpartition("/")[2]
                    read_s = self.store.read_s[key, ref.version, ref.offset]
                    assert key != "a" or self.now_s - read_s < TTL_S, "too old to be served"
        if watched:
            self.rest()
            assert protected <= self.protected(), "a pinned block has left"
            self.check_pins(known=pinned)

    @rule()
    def rest(self) -> None:
        """Let the engine come to an end with all that it has begun, also with what nobody waits for."""

        async def come_to_rest() -> None:
            engine = self.engine
            assert engine is not None
            while tasks := [*engine._tasks, *engine._stack._tasks]:
                await asyncio.wait(tasks)
            # A disk that is down keeps nobody waiting for calls that may still do something.
            for level in engine._stack.levels:
                if calls := level.members[0]._calls:
                    # Threads take from it.
                    pending = list(calls._pending)
                    await asyncio.gather(*map(asyncio.wrap_future, pending), return_exceptions=True)

        self.runner.run(come_to_rest())
        self.check_disk()
        assert all(blocks <= QUOTA_BLOCKS_OF[tier] for tier, blocks in self.held("a").items())

    @rule(name=st.sampled_from(["ram", "disk"]), blocks=st.integers(0, 8))
    def resize(self, name: str, blocks: int) -> None:
        protected = self.protected()

        def fits() -> bool:
            return self.engine.stats()["tiers"][("ram", "disk").index(name)]["pinned_bytes"] <= blocks * PAGE

        async def resize() -> None:
            fitted = fits()
            try:
                await self.engine.resize(name, capacity_bytes=blocks * PAGE, capacity_blocks=blocks)
            except BadInputError:
                assert not fitted
            except TransientError:
                # Or what came in at that moment is pinned.
                assert fitted
                assert (name == "disk" and self.failed) or not fits()
            else:
                assert fitted

        self.runner.run(resize())
        assert not self.gentle or protected <= self.protected(), "a pinned block has left"
        # What could not be removed stays within the limit that stays in force.
        self.disk_blocks = self.engine.stats()["tiers"][1]["capacity_blocks"]

    @rule(orderly=st.booleans())
    def restart(self, orderly: bool) -> None:
        protected = {(tier, key) for tier, key in self.protected() if tier == "disk"}
        self.stop(orderly=orderly)
        self.forget_ended_pins()
        lying = sum(f"{self.root}/{key}" in self.pins for key in self.lying())
        self.start()
        found = {pin["prefix"]: (pin["size_bytes"], pin["expires_unix_s"]) for pin in self.pin_stats()}
        assert self.pins_survive or not self.gentle
        assert not self.pins_survive or found == self.pins
        self.pins, self.pins_survive = found, True
        if self.gentle and lying <= PINNABLE_DISK_BLOCKS:
            assert protected <= self.protected(), "a pinned block was not taken over"

    @rule(key=st.sampled_from(OBJECTS), blocks=st.integers(0, 4), lasts_s=st.none() | st.integers(1, 2 * TTL_S))
    def pin(self, key: str, blocks: int, lasts_s: int | None) -> None:
        self.rest()
        prefix, size_bytes = f"{self.root}/{key}", blocks * PAGE
        self.forget_ended_pins()
        others = sum(size for other, (size, _) in self.pins.items() if other != prefix)
        fits = others + size_bytes <= self.engine.stats()["retention"]["pinnable_bytes"]
        work = self.engine.administration.pin(prefix, size_bytes=size_bytes, expires_s=lasts_s, uid=0)
        try:
            self.pins_survive = self.runner.run(work)
        except BadInputError:
            assert not fits
        else:
            assert fits
            self.pins[prefix] = (size_bytes, None if lasts_s is None else self.now_s + lasts_s)
            assert {pin["prefix"] for pin in self.pin_stats()} == set(self.pins)
            self.check_pins()

    @rule(key=st.sampled_from(OBJECTS))
    def unpin(self, key: str) -> None:
        self.rest()
        self.runner.run(self.engine.administration.sweep())
        self.forget_ended_pins()
        try:
            self.pins_survive = self.runner.run(self.engine.administration.unpin(f"{self.root}/{key}"))
        except NotFoundError:
            assert f"{self.root}/{key}" not in self.pins
        else:
            del self.pins[f"{self.root}/{key}"]
            self.check_pins()

    @rule(seconds=st.sampled_from([1, TTL_S // 2, TTL_S - 1, TTL_S]), sweeps=st.booleans())
    def let_time_pass(self, seconds: int, sweeps: bool) -> None:
        # What is asked for as something grows too old may be either.
        self.rest()
        self.now_s += seconds
        if not sweeps:
            return
        self.forget_ended_pins()
        self.runner.run(self.engine.administration.sweep())
        assert {pin["prefix"] for pin in self.pin_stats()} == set(self.pins)
        for tier in self.tiers():
            for key in filter(tier.guard.protects, tier.guard.keys()):
                assert f"{self.root}/{self.object_of(key)}" in self.pins, "an ended pin holds a block"
        assert seconds < TTL_S or not self.held("a"), "what is too old was not removed"

    @rule(key=st.sampled_from(OBJECTS))
    def evict(self, key: str) -> None:
        self.rest()
        # Until then an ended pin may still count.
        self.runner.run(self.engine.administration.sweep())
        protected = self.protected()
        done = self.runner.run(self.engine.administration.evict(f"{self.root}/{key}"))
        assert done.pinned == 0 or f"{self.root}/{key}" in self.pins
        if self.gentle:
            assert done.failed == 0
            assert self.protected() == protected
        assert sum(self.held(key).values()) <= done.pinned + done.failed

    @rule(key=st.sampled_from(OBJECTS), places=st.lists(st.integers(0, BLOCKS_PER_OBJECT - 1), min_size=1, max_size=9))
    def plan(self, key: str, places: list[int]) -> None:
        numbers = np.arange(BLOCKS_PER_OBJECT)
        table = BlockTable.from_columns(
            [f"{self.root}/{key}"],
            [list(self.contents[key])[-1]],
            object_of=numbers * 0,
            offset=numbers * BLOCK,
            length=numbers * 0 + BLOCK,
            crc32c=None,
        )

        async def begin() -> int:
            number = self.engine.prefetcher.open(table.digest, table, job="tune-1")
            self.engine.prefetcher.extend(number, np.array(places, "<i4").tobytes())
            return number

        if not self.plans:
            self.rest()
        before = self.engine.stats()["prefetch"]
        number = self.runner.run(begin())
        if not self.plans:
            after = self.engine.stats()["prefetch"]
            assert after["issued"] + after["resident"] > before["issued"] + before["resident"], "nothing was begun"
        self.plans.append((number, len(places)))

    @precondition(lambda self: self.plans)
    @rule(choice=st.integers(0, 9), position=st.integers(0, 9))
    def advance_a_plan(self, choice: int, position: int) -> None:
        number, end = self.plans[choice % len(self.plans)]

        async def advance() -> None:
            self.engine.prefetcher.advance(number, min(position, end))

        self.runner.run(advance())

    @precondition(lambda self: self.plans)
    @rule(choice=st.integers(0, 9))
    def end_a_plan(self, choice: int) -> None:
        number, _ = self.plans.pop(choice % len(self.plans))

        async def end() -> None:
            self.engine.prefetcher.close(number)
            if not self.plans:
                # Or it guesses.
                self.engine.prefetcher.nobody_reads()

        self.runner.run(end())
        if not self.plans:
            self.rest()
            assert self.engine.stats()["prefetch"]["ahead_bytes"] == 0, "what nobody wants holds its place"

    @precondition(lambda self: not self.gentle)
    @rule(choice=st.integers(0, 99), bit=st.integers(0, 8 * BLOCK))
    def corrupt_file(self, choice: int, bit: int) -> None:
        for file in self.pick(choice):
            content = bytearray(file.read_bytes())
            if content:
                content[bit // 8 % len(content)] ^= 1 << bit % 8
                file.write_bytes(content)

    @precondition(lambda self: not self.gentle)
    @rule(choice=st.integers(0, 99), keep=st.integers(0, BLOCK))
    def truncate_file(self, choice: int, keep: int) -> None:
        for file in self.pick(choice):
            os.truncate(file, keep)

    @precondition(lambda self: not self.gentle)
    @rule(choice=st.integers(0, 99))
    def swap_files(self, choice: int) -> None:
        for left, right in zip(self.pick(choice), self.pick(choice + 1), strict=True):
            content = left.read_bytes()
            left.write_bytes(right.read_bytes())
            right.write_bytes(content)

    @precondition(lambda self: not self.gentle)
    @rule(choice=st.integers(0, 99))
    def delete_file(self, choice: int) -> None:
        for file in self.pick(choice):
            file.unlink()

    @precondition(lambda self: not self.gentle)
    @rule(fault=st.sampled_from(FAULTS), call=st.sampled_from(FAILING_CALLS))
    def break_or_mend_disk(self, fault: int | None, call: str) -> None:
        self.fault, self.failing_call = fault, call
        self.failed |= fault is not None

    @rule(key=st.sampled_from(OBJECTS), number=st.integers(0, BLOCKS_PER_OBJECT - 1))
    def report_a_good_block(self, key: str, number: int) -> None:
        ref = BlockRef(f"{self.root}/{key}", list(self.contents[key])[-1], number * BLOCK, BLOCK)
        self.runner.run(self.engine.report_bad(ref))

    @invariant()
    def no_tier_holds_more_than_it_may(self) -> None:
        if self.engine is not None:
            stats = self.engine.stats()
            check_limits(stats)
            for tier in stats["tiers"]:
                assert all(0 <= quota["used_bytes"] <= quota["limit_bytes"] for quota in tier["quotas"]), tier
                assert 0 <= tier["pinned_bytes"] <= tier["used_bytes"], tier

    def teardown(self) -> None:
        if self.engine is not None:
            self.stop(orderly=True)
        self.runner.close()
        shutil.rmtree(self.path)

    def start(self) -> None:
        ram, disk = self.policies
        tiers = (
            TierConfig("ram", RAM_BLOCKS * PAGE, policy=ram),
            # Here it is files that there are too few of.
            TierConfig("disk", (DISK_BLOCKS + 1) * PAGE, str(self.path), DISK_BLOCKS, "nvme", disk),
        )
        config = CacheConfig(
            tiers,
            RING_BLOCKS * PAGE,
            max_inflight_bytes=5 * BLOCK,
            max_inflight_requests=3,
            prefixes=(PrefixConfig(f"{self.root}/a", TTL_S, QUOTA_BLOCKS * PAGE),),
            jobs=(JobConfig("tune-*", JOB_BLOCKS * PAGE),),
        )
        # However slow this machine is: its disk is not.
        limits = DiskLimits(first_retry_s=1e-4, last_retry_s=1e-3, stuck_s=600)
        system = FaultySystem(self.before)
        self.engine = Engine(
            config, open_store=lambda root: self.store, system=system, disk_limits=limits, clock=lambda: self.now_s
        )
        self.plans = []
        self.runner.run(self.engine.start())
        # What lies there beyond the configured limit goes with the scan.
        self.runner.run(self.engine.scanned())
        self.disk_blocks = DISK_BLOCKS

    def stop(self, *, orderly: bool) -> None:
        assert self.engine is not None
        if not orderly:
            # What was under way is cut off wherever it stands; only the kernel's part of a kill is done by hand.
            for task in self.engine._stack._tasks:
                task.cancel()
        self.runner.run(self.engine.close())
        self.engine = None
        self.check_disk()

    def check_disk(self) -> None:
        blocks = self.disk_blocks
        check_directory(self.path, capacity_bytes=blocks * PAGE, capacity_blocks=blocks, verified=False)
        assert self.failed or self.lying().count("a") <= QUOTA_BLOCKS_OF["disk"]

    def object_of(self, key: bytes) -> str:
        return next(name for name, keys in self.block_keys().items() if key in keys)

    def block_keys(self) -> dict[str, set[bytes]]:
        """Return the keys of all blocks that an object ever had."""
        return {
            name: {
                block_key(BlockRef(f"{self.root}/{name}", version, number * BLOCK, BLOCK))
                for version in versions
                for number in range(BLOCKS_PER_OBJECT)
            }
            for name, versions in self.contents.items()
        }

    def lying(self) -> list[str]:
        """Return whose block each file is."""
        names = [parse_name(file.name) for file in (self.path / "blocks-1").glob("*/*")]
        return [self.object_of(name[0]) for name in names if name is not None]

    def held(self, key: str) -> dict[str, int]:
        """Return how many blocks of an object each tier says that it holds."""
        work = self.engine.administration.usage(f"{self.root}/{key}", depth=0, visible=bool)
        rows, _ = self.runner.run(work)
        return rows[0].blocks if rows else {}

    def tiers(self) -> list[Tier]:
        assert self.engine is not None
        return [level.members[0] for level in self.engine._stack.levels]

    def pinned(self, names: Sequence[str] = OBJECTS) -> set[tuple[Tier, bytes]]:
        """Return what the tiers hold of objects that are pinned now."""
        self.forget_ended_pins()
        keys = self.block_keys()
        chosen = [key for name in names if f"{self.root}/{name}" in self.pins for key in keys[name]]
        return {(tier, key) for tier in self.tiers() for key in chosen if tier.holds(key)}

    def protected(self) -> set[tuple[str, bytes]]:
        """Return tier and key of what pins keep, of objects that do not grow too old."""
        return {(tier.name, key) for tier, key in self.pinned(["b", "c"]) if tier.guard.protects(key)}

    def check_pins(self, *, known: Set[tuple[Tier, bytes]] = frozenset()) -> None:
        """What is pinned is protected as far as pins may, but for what was known before there was room for it."""
        for tier, key in self.pinned() - known:
            full = tier.guard.pinned_bytes + PAGE > tier.guard.max_pinned_bytes
            assert full or tier.guard.protects(key), "a pinned block is not protected"

    def pin_stats(self) -> list[dict[str, Any]]:
        return self.engine.stats()["retention"]["pins"]

    def forget_ended_pins(self) -> None:
        self.pins = {
            prefix: (size_bytes, end_s)
            for prefix, (size_bytes, end_s) in self.pins.items()
            if end_s is None or self.now_s < end_s
        }

    def before(self, name: str) -> None:
        if self.fault is not None and name == self.failing_call:
            raise OSError(self.fault, os.strerror(self.fault))

    def pick(self, choice: int) -> list[Path]:
        """Return one block's file, or none where there is none. No thread is writing meanwhile."""
        self.rest()
        files = sorted((self.path / "blocks-1").glob("*/*"))
        return [files[choice % len(files)]] if files else []


@pytest.mark.parametrize("policies", [("kept", "kept"), ("lru", "lru"), ("lru", "kept")])
def test_the_engine_gives_right_bytes_or_clear_errors_within_its_limits(policies: tuple[str, str]) -> None:
    machine: Any = type("Machine", (CacheMachine,), {"policies": policies})
    run_state_machine_as_test(machine, settings=settings(stateful_step_count=25))
