"""A block is kept as high as it may, what leaves goes down, what is found below comes up where it is wanted."""

import errno
import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cache.block import block_path
from cache.directory_shelf import DirectoryShelf
from cache.disk import DiskLimits
from cache.disk_calls import DiskCalls
from cache.handle import Handle
from cache.ledger import UNLIMITED_BLOCKS
from cache.level import Level
from cache.memory_shelf import MemoryShelf
from cache.policy import KeptSet, Lru, Policy
from cache.stack import Stack, Stored
from cache.testing import FaultySystem, check_limits, make_block, make_key, read_handle
from cache.tier import Tier

LENGTH = 4000
SIZE = 4096  # with its trailer too
PATIENT = DiskLimits(unstable_failures=1000, window=1000)

Build = Callable[..., Tier]


def data(number: int) -> bytes:
    return number.to_bytes(4, "big") * (LENGTH // 4)


@pytest.fixture
async def build(tmp_path: Path) -> AsyncIterator[Build]:
    """Make a tier for so many blocks."""
    with ThreadPoolExecutor(4) as threads:

        def make(name: str, blocks: int, policy: Policy, *, disk: bool = False, system: object = os) -> Tier:
            if disk:
                shelf = DirectoryShelf(str(tmp_path / name), medium="ram", system=system)
                threads.submit(shelf.lock).result()
            return Tier(
                name=name,
                medium="nvme" if disk else "ram",
                policy_name="any",
                policy=policy,
                shelf=shelf if disk else MemoryShelf(),
                capacity_bytes=blocks * SIZE,
                capacity_blocks=blocks if disk else UNLIMITED_BLOCKS,
                max_queued_bytes=1 << 30,
                calls=DiskCalls(name, threads=4, limits=PATIENT) if disk else None,
            )

        yield make


@pytest.fixture
async def stacked(build: Build) -> AsyncIterator[Callable[..., Stack]]:
    stacks = []

    def make(tiers: Sequence[Tier], ring_blocks: int = 0) -> Stack:
        levels = [Level([(tier, tier.name, 1.0)]) for tier in (*tiers, build("ring", ring_blocks, Lru()))]
        stacks.append(Stack(levels[:-1], levels[-1], max_promoting_bytes=1 << 20))
        return stacks[-1]

    yield make
    for stack in stacks:
        assert await stack.close(10)


def place(stack: Stack, *numbers: int) -> None:
    for number in numbers:
        stack.place(make_block(number, data(number)))


async def get(stack: Stack, number: int) -> str | None:
    """Return where a block was found, after its bytes were found right."""
    found = stack.find(make_key(number), LENGTH, set())
    if isinstance(found, Stored):
        (found,) = await stack.open(found.tier, [found])
    if found is None:
        return None
    assert read_handle(make_key(number), found) == data(number)
    return found.source


def held(tier: Tier) -> list[int]:
    return [number for number in range(50) if tier.ledger.holds(make_key(number))]


async def test_kept_sets_share_out_the_lowest_keys_and_the_ring_takes_the_rest(build: Build, stacked) -> None:
    ram, disk = build("ram", 2, KeptSet()), build("disk", 3, KeptSet(), disk=True)
    stack = stacked([ram, disk], ring_blocks=2)
    for number in (9, 4, 7, 1, 8, 2, 6, 3, 5, 11, 12, 10):
        place(stack, number)
        await stack.settle()
    assert (held(ram), held(disk), held(stack.ring.members[0])) == ([1, 2], [3, 4, 5], [10, 12])
    sources = [await get(stack, number) for number in (1, 3, 10)]
    assert sources == ["ram", "disk", "ring"]


@pytest.mark.parametrize("ring_blocks", [0, 4])
async def test_a_block_that_finds_a_directory_full_of_unwritten_ones_is_offered_again(
    build: Build, stacked, ring_blocks: int
) -> None:
    ram, disk = build("ram", 1, KeptSet()), build("disk", 3, KeptSet(), disk=True)
    stack = stacked([ram, disk], ring_blocks=ring_blocks)
    place(stack, 0)
    place(stack, 9, 8, 7, 3, 6, 1, 2, 5)  # none of them is written before all of them were offered
    assert await get(stack, 1) == "ring"  # found meanwhile
    await stack.settle()
    assert (held(ram), held(disk)) == ([0], [1, 2, 3])
    assert sum(stack.holds(make_key(number)) for number in range(10)) == 4 + ring_blocks


async def test_a_block_counts_once_as_let_in_or_refused_however_often_it_was_offered(build: Build, stacked) -> None:
    disk = build("disk", 3, KeptSet(), disk=True)
    stack = stacked([disk])
    place(stack, *range(100, 0, -1))  # more than may wait
    await stack.settle()
    counters = disk.ledger.counters
    assert counters.insertions + counters.refused == 100


async def test_a_settled_kept_set_writes_nothing_more(build: Build, stacked) -> None:
    ram, disk = build("ram", 2, KeptSet()), build("disk", 3, KeptSet(), disk=True)
    stack = stacked([ram, disk], ring_blocks=1)
    numbers = [9, 4, 7, 1, 8, 2, 6, 3, 5]
    for epoch in range(4):
        before = [tier.ledger.counters.written_bytes for tier in (ram, disk)]
        for number in numbers[epoch:] + numbers[:epoch]:
            if await get(stack, number) is None:
                place(stack, number)
            await stack.settle()
    assert [tier.ledger.counters.written_bytes for tier in (ram, disk)] == before


async def test_what_lru_evicts_goes_down_and_comes_back_up_when_it_is_read(build: Build, stacked) -> None:
    ram, disk = build("ram", 2, Lru()), build("disk", 3, Lru(), disk=True)
    stack = stacked([ram, disk])
    for number in (1, 2, 3):
        place(stack, number)
        await stack.settle()
    assert (held(ram), held(disk)) == ([2, 3], [1])
    assert await get(stack, 1) == "disk"
    await stack.settle()
    assert (held(ram), held(disk)) == ([1, 3], [1, 2])
    assert await get(stack, 1) == "ram"
    # The copy below stayed, so going down once more costs no write.
    written = disk.ledger.counters.written_bytes
    place(stack, 4)
    await stack.settle()
    place(stack, 5)
    await stack.settle()
    assert held(ram) == [4, 5]
    assert disk.ledger.counters.written_bytes == written + SIZE
    assert await get(stack, 1) == "disk"
    await stack.settle()
    assert held(ram) == [1, 5]


async def test_a_full_kept_set_does_not_call_blocks_up(build: Build, stacked) -> None:
    ram, disk = build("ram", 1, KeptSet()), build("disk", 3, KeptSet(), disk=True)
    stack = stacked([ram, disk])
    place(stack, 1, 2, 3)
    await stack.settle()
    for _ in range(3):
        assert await get(stack, 3) == "disk"
        await stack.settle()
    assert held(ram) == [1]
    assert ram.ledger.counters.insertions == 1


async def test_a_block_found_in_the_ring_moves_up(build: Build, stacked) -> None:
    ram = build("ram", 1, Lru())
    stack = stacked([ram], ring_blocks=2)
    place(stack, 1, 2)
    assert (held(ram), held(stack.ring.members[0])) == ([2], [1])
    assert await get(stack, 1) == "ring"
    assert (held(ram), held(stack.ring.members[0])) == ([1], [2])


async def test_a_block_on_its_way_to_a_directory_is_found(build: Build, stacked) -> None:
    disk = build("disk", 3, KeptSet(), disk=True)
    stack = stacked([disk])
    place(stack, 1)
    assert not disk.ledger.holds(make_key(1))
    assert await get(stack, 1) == "ring"
    await stack.settle()
    assert await get(stack, 1) == "disk"


async def test_what_a_broken_disk_does_not_take_goes_on(build: Build, stacked) -> None:
    def before(name: str) -> None:
        if name == "write":
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    broken = build("broken", 3, KeptSet(), disk=True, system=FaultySystem(before))
    disk = build("disk", 1, KeptSet(), disk=True)
    stack = stacked([broken, disk], ring_blocks=1)
    for number in (1, 2):
        place(stack, number)
        await stack.settle()
    assert (held(broken), held(disk), held(stack.ring.members[0])) == ([], [1], [2])


async def test_a_block_whose_write_ends_in_an_unknown_way_goes_on_and_the_log_says_so(
    build: Build, stacked, caplog
) -> None:
    def before(name: str) -> None:
        if name == "write":
            raise MemoryError("none left")

    stack = stacked([build("disk", 3, KeptSet(), disk=True, system=FaultySystem(before))], ring_blocks=1)
    place(stack, 1)
    await stack.settle()
    assert held(stack.ring.members[0]) == [1]
    assert "a placement failed" in caplog.text
    assert "none left" in caplog.text
    caplog.clear()  # its traceback holds the block


async def test_a_directorys_victim_goes_down_and_in_the_end_to_the_ring(build: Build, stacked) -> None:
    fast, slow = build("fast", 1, KeptSet(), disk=True), build("slow", 1, KeptSet(), disk=True)
    stack = stacked([fast, slow], ring_blocks=4)
    for number in (9, 5, 1):
        place(stack, number)
        await stack.settle()
    assert (held(fast), held(slow), held(stack.ring.members[0])) == ([1], [5], [9])


async def test_a_reported_block_is_looked_at_and_goes_only_where_it_is_wrong(
    build: Build, stacked, tmp_path: Path
) -> None:
    ram, disk = build("ram", 1, Lru()), build("disk", 3, Lru(), disk=True)
    stack = stacked([ram, disk])
    place(stack, 1, 2)
    await stack.settle()
    assert await get(stack, 1) == "disk"
    await stack.settle()
    assert (held(ram), held(disk)) == ([1], [1, 2])
    await stack.check(make_key(1), LENGTH)
    assert (held(ram), held(disk)) == ([1], [1, 2])
    file = tmp_path / "disk" / "blocks-1" / block_path(make_key(1), LENGTH)
    damaged = bytearray(file.read_bytes())
    damaged[7] ^= 1
    file.write_bytes(damaged)
    for _ in range(2):
        await stack.check(make_key(1), LENGTH)
        assert (held(ram), held(disk)) == ([1], [2])
        assert (ram.ledger.counters.corrupt, disk.ledger.counters.corrupt) == (0, 1)
        assert not file.exists()


async def test_a_damaged_file_is_not_carried_to_another_tier(build: Build, stacked, tmp_path: Path, caplog) -> None:
    ram, disk = build("ram", 1, Lru()), build("disk", 3, Lru(), disk=True)
    stack = stacked([ram, disk])
    place(stack, 1, 2)
    await stack.settle()
    file = tmp_path / "disk" / "blocks-1" / block_path(make_key(1), LENGTH)
    content = file.read_bytes()
    file.write_bytes(b"\xff" + content[1:])
    found = stack.find(make_key(1), LENGTH, set())
    assert isinstance(found, Stored)
    (handle,) = await stack.open(found.tier, [found])
    assert isinstance(handle, Handle)
    assert handle.verify
    handle.close()
    await stack.settle()
    assert (held(ram), held(disk)) == ([2], [])
    assert disk.ledger.counters.corrupt == 1
    assert "failed" not in caplog.text


async def test_a_ring_without_memory_keeps_nothing(build: Build, stacked) -> None:
    stack = stacked([build("ram", 0, Lru()), build("disk", 0, KeptSet(), disk=True)])
    place(stack, 1)
    await stack.settle()
    assert await get(stack, 1) is None
    check_limits({"tiers": [level.stats() for level in stack.levels], "ring": stack.ring.stats()})


async def test_close_does_not_wait_for_a_directory_that_does_not_answer(build: Build, caplog) -> None:
    answers = threading.Event()

    def before(name: str) -> None:
        if name == "posix_fallocate":
            answers.wait(60)

    disk = build("disk", 3, KeptSet(), disk=True, system=FaultySystem(before))
    levels = [Level([(tier, tier.name, 1.0)]) for tier in (disk, build("ring", 1, Lru()))]
    stack = Stack(levels[:1], levels[1], max_promoting_bytes=1)
    place(stack, 1)
    assert not await stack.close(0.01)
    answers.set()
    assert "dropped" in caplog.text
