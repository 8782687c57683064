"""The engine beside a dict: whatever happens to objects, files, disk and process, right bytes or a clear error.

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
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from cache.config import CacheConfig, TierConfig
from cache.disk import DiskLimits
from cache.engine import Engine
from cache.keys import BlockRef
from cache.testing import FaultySystem, check_directory, check_limits, read_blocks
from connectors.errors import ChangedError, DataError, TransientError
from connectors.registry import open_store

BLOCK = 1000
PAGE = 4096
OBJECTS = ["a", "b", "c"]
BLOCKS_PER_OBJECT = 6
RAM_BLOCKS, DISK_BLOCKS, RING_BLOCKS = 3, 5, 2
FAULTS = [None, errno.ENOSPC, errno.EDQUOT, errno.EIO]
FAILING_CALLS = ["open", "posix_fallocate", "write", "rename", "unlink", "preadv", "fstat", "fsync"]

_names = itertools.count()


class CacheMachine(RuleBasedStateMachine):
    """See the module's docstring."""

    policies = ("kept", "kept")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.path = Path(tempfile.mkdtemp())
        self.root = f"memory://model-{next(_names)}"
        self.store = open_store(self.root)
        # Every content that an object ever had, by version; the newest last.
        self.contents: dict[str, dict[str, bytes]] = {key: {} for key in OBJECTS}
        self.fault: int | None = None
        self.failing_call = ""
        self.engine: Engine | None = None
        self.disk_blocks = DISK_BLOCKS

    @initialize()
    def begin(self) -> None:
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
    )
    def get(self, wanted: list[tuple[str, int, int]], readers: int) -> None:
        refs = []
        for key, number, age in wanted:
            versions = list(self.contents[key])
            version = versions[max(0, len(versions) - 1 - age)]
            refs.append(BlockRef(f"{self.root}/{key}", version, number * BLOCK, BLOCK))

        async def read_all() -> list[list[bytes | DataError]]:
            return await asyncio.gather(*(read_blocks(self.engine, refs) for _ in range(readers)))

        for results in self.runner.run(read_all()):
            for ref, result in zip(refs, results, strict=True):
                versions = self.contents[ref.uri.rpartition("/")[2]]
                if isinstance(result, DataError):
                    assert isinstance(result, ChangedError), result
                    assert ref.version != list(versions)[-1], "the newest version can always be had"
                else:
                    assert result == versions[ref.version][ref.offset : ref.offset + ref.length]

    @rule()
    def settle(self) -> None:
        assert self.engine is not None
        self.runner.run(self.engine.settle())
        self.check_disk()

    @rule(name=st.sampled_from(["ram", "disk"]), blocks=st.integers(0, 8))
    def resize(self, name: str, blocks: int) -> None:
        assert self.engine is not None
        try:
            self.runner.run(self.engine.resize(name, capacity_bytes=blocks * PAGE, capacity_blocks=blocks))
        except TransientError:
            assert name == "disk"
            assert self.fault is not None or self.engine.stats()["tiers"][1]["state"] != "normal"
        # What could not be removed stays within the limit that stays in force.
        self.disk_blocks = self.engine.stats()["tiers"][1]["capacity_blocks"]

    @rule(orderly=st.booleans())
    def restart(self, orderly: bool) -> None:
        self.stop(orderly=orderly)
        self.start()

    @rule(choice=st.integers(0, 99), bit=st.integers(0, 8 * BLOCK))
    def corrupt_file(self, choice: int, bit: int) -> None:
        for file in self.pick(choice):
            content = bytearray(file.read_bytes())
            if content:
                content[bit // 8 % len(content)] ^= 1 << bit % 8
                file.write_bytes(content)

    @rule(choice=st.integers(0, 99), keep=st.integers(0, BLOCK))
    def truncate_file(self, choice: int, keep: int) -> None:
        for file in self.pick(choice):
            os.truncate(file, keep)

    @rule(choice=st.integers(0, 99))
    def swap_files(self, choice: int) -> None:
        for left, right in zip(self.pick(choice), self.pick(choice + 1), strict=True):
            content = left.read_bytes()
            left.write_bytes(right.read_bytes())
            right.write_bytes(content)

    @rule(choice=st.integers(0, 99))
    def delete_file(self, choice: int) -> None:
        for file in self.pick(choice):
            file.unlink()

    @rule(fault=st.sampled_from(FAULTS), call=st.sampled_from(FAILING_CALLS))
    def break_or_mend_disk(self, fault: int | None, call: str) -> None:
        self.fault, self.failing_call = fault, call

    @rule(key=st.sampled_from(OBJECTS), number=st.integers(0, BLOCKS_PER_OBJECT - 1))
    def report_a_good_block(self, key: str, number: int) -> None:
        ref = BlockRef(f"{self.root}/{key}", list(self.contents[key])[-1], number * BLOCK, BLOCK)
        self.runner.run(self.engine.report_bad(ref))

    @invariant()
    def no_tier_holds_more_than_it_may(self) -> None:
        if self.engine is not None:
            check_limits(self.engine.stats())

    def teardown(self) -> None:
        if self.engine is not None:
            self.stop(orderly=True)
        self.runner.close()
        shutil.rmtree(self.path)

    def start(self) -> None:
        ram, disk = self.policies
        tiers = (
            TierConfig("ram", RAM_BLOCKS * PAGE, policy=ram),
            TierConfig("disk", DISK_BLOCKS * PAGE, str(self.path), DISK_BLOCKS, "nvme", disk),
        )
        config = CacheConfig(tiers, RING_BLOCKS * PAGE, max_inflight_bytes=5 * BLOCK, max_inflight_requests=3)
        limits = DiskLimits(first_retry_s=1e-4, last_retry_s=1e-3)
        system = FaultySystem(self.before)
        self.engine = Engine(config, open_store=lambda root: self.store, system=system, disk_limits=limits)
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

    def before(self, name: str) -> None:
        if self.fault is not None and name == self.failing_call:
            raise OSError(self.fault, os.strerror(self.fault))

    def pick(self, choice: int) -> list[Path]:
        """Return one block's file, or none where there is none. No thread is writing meanwhile."""
        self.settle()
        files = sorted((self.path / "blocks-1").glob("*/*"))
        return [files[choice % len(files)]] if files else []


@pytest.mark.parametrize("policies", [("kept", "kept"), ("lru", "lru"), ("lru", "kept")])
def test_the_engine_gives_right_bytes_or_clear_errors_within_its_limits(policies: tuple[str, str]) -> None:
    machine: Any = type("Machine", (CacheMachine,), {"policies": policies})
    run_state_machine_as_test(machine, settings=settings(stateful_step_count=30))
