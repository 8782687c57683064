"""A tier charges before it takes, and never lies about what is on the medium."""

import asyncio
import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cache.block import block_path
from cache.directory_shelf import DirectoryShelf
from cache.disk import DiskLimits
from cache.disk_calls import DiskCalls
from cache.handle import Block, Descriptor
from cache.ledger import UNLIMITED_BLOCKS, Reservation
from cache.memory_shelf import MemoryShelf
from cache.policy import KeptSet, Lru, Policy
from cache.testing import FaultySystem, check_directory, make_block, make_key, read_handle, until
from cache.tier import Tier
from connectors.errors import CorruptError

LENGTH = 5000  # 8192 on the medium
SIZE = 8192
# A disk that is never given up: what each call does can be looked at.
PATIENT = DiskLimits(unstable_failures=1000, window=1000, first_retry_s=1e-4, last_retry_s=1e-4)


def a_block(number: int, length: int = LENGTH) -> Block:
    return make_block(number, number.to_bytes(4, "big") * (length // 4))


class WeighedShelf(DirectoryShelf):
    """Knows the most that ever lay in the directory, unfinished files included."""

    def __init__(self, path: str, system: object = os) -> None:
        super().__init__(path, medium="ram", system=system)
        self.bytes = self.blocks = self.most_bytes = self.most_blocks = 0
        self._guard = threading.Lock()

    def write(self, block: Block) -> None:
        self._add(self.cost_bytes(block.length), 1)
        try:
            super().write(block)
        except OSError:
            self._add(-self.cost_bytes(block.length), -1)
            raise

    def remove(self, key: bytes, length: int) -> None:
        super().remove(key, length)
        self._add(-self.cost_bytes(length), -1)

    def _add(self, size_bytes: int, blocks: int) -> None:
        with self._guard:
            self.bytes += size_bytes
            self.blocks += blocks
            self.most_bytes = max(self.most_bytes, self.bytes)
            self.most_blocks = max(self.most_blocks, self.blocks)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as executor:
        yield executor


def directory_tier(
    path: Path,
    threads: ThreadPoolExecutor,
    *,
    capacity_bytes: int = 10 * SIZE,
    capacity_blocks: int = UNLIMITED_BLOCKS,
    policy: Policy | None = None,
    system: object = os,
    medium: str = "nvme",
    max_queued_bytes: int = 1 << 30,
    limits: DiskLimits = PATIENT,
) -> Tier:
    shelf = WeighedShelf(str(path), system)
    threads.submit(shelf.lock).result()
    calls = DiskCalls("disk", threads=16, limits=limits)
    return Tier(
        name="disk",
        medium=medium,
        policy_name="kept",
        policy=policy or KeptSet(),
        shelf=shelf,
        capacity_bytes=capacity_bytes,
        capacity_blocks=capacity_blocks,
        max_queued_bytes=max_queued_bytes,
        calls=calls,
    )


def memory_tier(capacity_bytes: int, policy: Policy | None = None, capacity_blocks: int = 100) -> Tier:
    return Tier(
        name="ram",
        medium="ram",
        policy_name="kept",
        policy=policy or KeptSet(),
        shelf=MemoryShelf(),
        capacity_bytes=capacity_bytes,
        capacity_blocks=capacity_blocks,
        max_queued_bytes=1 << 30,
        calls=None,
    )


async def store(
    tier: Tier, block: Block, *, wanted: bool = False, reservation: Reservation | None = None
) -> list[Block] | None:
    """Reserve and store; None where the block did not come in, else the victims passed on."""
    reservation = reservation or tier.ledger.reserve(block.key, block.length)
    if reservation is None:
        return None
    victims: list[Block] = []
    stored = await tier.store(block, reservation, wanted=lambda key, length: wanted, pass_on=victims.append)
    return victims if stored else None


def held(tier: Tier, numbers: range | list[int]) -> list[int]:
    return [number for number in numbers if tier.ledger.holds(make_key(number))]


@pytest.mark.parametrize("policy", [KeptSet, Lru])
@pytest.mark.parametrize(("capacity_bytes", "capacity_blocks"), [(80 * SIZE, 999), (9999 * SIZE, 40), (90 * SIZE, 50)])
async def test_sixteen_writers_never_exceed_either_limit(
    tmp_path: Path, threads: ThreadPoolExecutor, policy: type, capacity_bytes: int, capacity_blocks: int
) -> None:
    tier = directory_tier(
        tmp_path, threads, capacity_bytes=capacity_bytes, capacity_blocks=capacity_blocks, policy=policy()
    )
    numbers = list(range(300))
    # Blocks of one and of several units, so that one victim may make room for many and many for one.
    lengths = [(1 + number * 7 % 5) * 4000 for number in numbers]
    waiting = list(zip(numbers[::-1], lengths, strict=True))
    written = asyncio.Condition()

    async def write() -> None:
        while waiting:
            number, length = waiting.pop()
            block = a_block(number * 37 % 300, length)
            while await store(tier, block, wanted=number % 3 == 0) is None and tier.ledger.undecided(block.key, length):
                async with written:
                    await written.wait()
            assert tier.ledger.used_bytes <= capacity_bytes
            assert tier.ledger.used_blocks <= capacity_blocks
            async with written:
                written.notify_all()

    await asyncio.gather(*(write() for _ in range(16)))
    shelf = tier.shelf
    assert isinstance(shelf, WeighedShelf)
    assert shelf.most_bytes <= capacity_bytes
    assert shelf.most_blocks <= capacity_blocks
    assert (shelf.bytes, shelf.blocks) == (tier.ledger.used_bytes, tier.ledger.used_blocks)
    assert tier.ledger.counters.evictions > 10
    blocks = check_directory(tmp_path, capacity_bytes=capacity_bytes, capacity_blocks=capacity_blocks)
    assert sorted(blocks) == [make_key(number) for number in held(tier, numbers)]


async def test_hits_and_writes_are_counted(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    tier = directory_tier(tmp_path, threads, capacity_bytes=2 * SIZE)
    for number in (5, 6, 1, 9):
        await store(tier, a_block(number))
    assert held(tier, range(10)) == [1, 5]
    (file,) = await tier.open_many([(make_key(1), LENGTH)])
    assert isinstance(file, Descriptor)
    assert read_handle(make_key(1), tier.handle(make_key(1), file, LENGTH)) == b"\0\0\0\1" * (LENGTH // 4)
    stats = tier.stats()
    expected = {
        "used_bytes": 2 * SIZE,
        "blocks": 2,
        "hits": 1,
        "hit_bytes": LENGTH,
        "insertions": 3,
        "written_bytes": 3 * SIZE,
        "evictions": 1,
        "evicted_bytes": SIZE,
        "refused": 1,
        "corrupt": 0,
        "errors": 0,
    }
    assert {name: stats[name] for name in expected} == expected


async def test_a_victim_somebody_wants_comes_out_whole(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    tier = directory_tier(tmp_path, threads, capacity_bytes=SIZE)
    await store(tier, a_block(5))
    (victim,) = await store(tier, a_block(1), wanted=True) or []
    assert victim.key == make_key(5)
    assert victim.map() == b"\0\0\0\5" * (LENGTH // 4)


@pytest.mark.parametrize("call", ["open", "posix_fallocate", "write", "rename"])
async def test_a_disk_that_cannot_be_written_lets_nothing_in_and_owes_nothing(
    tmp_path: Path, threads: ThreadPoolExecutor, call: str, caplog
) -> None:
    broken = True

    def before(name: str) -> None:
        if broken and name == call:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    tier = directory_tier(tmp_path, threads, system=FaultySystem(before))
    for number in range(3):
        assert await store(tier, a_block(number)) is None
    assert (tier.ledger.used_bytes, tier.ledger.used_blocks, tier.ledger.counters.errors) == (0, 0, 3)
    assert "Input/output" in (tier.fault or "")
    assert len(caplog.records) == 1
    broken = False
    assert await store(tier, a_block(1)) == []
    assert tier.fault is None


async def test_a_victim_that_cannot_be_unlinked_is_held_as_before(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    broken = False

    def before(name: str) -> None:
        if broken and name == "unlink":
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    tier = directory_tier(tmp_path, threads, capacity_bytes=2 * SIZE, system=FaultySystem(before))
    for number in (5, 6):
        await store(tier, a_block(number))
    broken = True
    assert await store(tier, a_block(1)) is None
    assert (tier.ledger.used_bytes, tier.ledger.used_blocks) == (2 * SIZE, 2)
    assert held(tier, range(10)) == [5, 6]
    assert "Input/output" in tier.stats()["fault"]
    assert all(isinstance(file, Descriptor) for file in await tier.open_many([(make_key(6), LENGTH)]))
    broken = False
    assert await store(tier, a_block(2)) == []
    assert await store(tier, a_block(1)) == []
    assert held(tier, range(10)) == [1, 2]
    assert (tier.ledger.used_bytes, tier.ledger.used_blocks) == (2 * SIZE, 2)
    check_directory(tmp_path, capacity_bytes=2 * SIZE)


@pytest.mark.parametrize(("call", "left_bytes"), [("preadv", 0), ("unlink", 0), ("write", SIZE)])
async def test_a_process_without_memory_leaves_no_block_on_its_way(
    tmp_path: Path, threads: ThreadPoolExecutor, call: str, left_bytes: int
) -> None:
    broken = False

    def before(name: str) -> None:
        if broken and name == call:
            raise MemoryError

    system = FaultySystem(before)
    tier = directory_tier(tmp_path, threads, capacity_bytes=3 * SIZE, max_queued_bytes=1, system=system)
    for number in (5, 6, 7):
        await store(tier, a_block(number))
    broken = True
    with pytest.raises(MemoryError):
        await store(tier, a_block(1), wanted=True)
    broken = False
    assert tier.ledger.used_bytes == 3 * SIZE, "what the write has left is charged"
    for number in (2, 3, 4):
        await store(tier, a_block(number))
    assert held(tier, range(10)) == ([2, 3] if left_bytes else [2, 3, 4])


async def test_a_victim_is_found_until_somebody_else_has_it(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    tier = directory_tier(tmp_path, threads, capacity_bytes=SIZE)
    await store(tier, a_block(5))
    reservation = tier.ledger.reserve(make_key(1), LENGTH)
    assert reservation is not None
    found = []
    await tier.store(
        a_block(1),
        reservation,
        wanted=lambda key, length: True,
        pass_on=lambda victim: found.append(tier.ledger.holds(victim.key)),
    )
    assert found == [True]
    assert held(tier, range(10)) == [1]


async def test_a_bad_victim_is_dropped_once(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    tier = directory_tier(tmp_path, threads, capacity_bytes=SIZE)
    await store(tier, a_block(5))
    reservation = tier.ledger.reserve(make_key(1), LENGTH)
    await tier.drop(make_key(5), CorruptError("bad"))
    assert not tier.ledger.holds(make_key(5))
    assert await store(tier, a_block(1), wanted=True, reservation=reservation) == []
    assert (tier.ledger.used_bytes, tier.ledger.used_blocks) == (SIZE, 1)


async def test_a_bad_block_that_cannot_be_unlinked_stays_charged(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    def before(name: str) -> None:
        if name == "unlink":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    tier = directory_tier(tmp_path, threads, system=FaultySystem(before))
    await store(tier, a_block(1))
    await tier.drop(make_key(1), CorruptError("bad"))
    assert held(tier, [1]) == []
    assert (tier.ledger.used_bytes, tier.ledger.used_blocks) == (SIZE, 1)
    check_directory(tmp_path, capacity_bytes=SIZE)


async def test_a_block_that_could_not_be_unlinked_is_charged_once_when_it_comes_again(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    broken = False

    def before(name: str) -> None:
        if broken and name == "unlink":
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    tier = directory_tier(tmp_path, threads, system=FaultySystem(before))
    await store(tier, a_block(1))
    broken = True
    assert not await tier.evict(make_key(1))
    broken = False
    assert await store(tier, a_block(1)) == []
    assert (tier.ledger.used_bytes, tier.ledger.used_blocks) == (SIZE, 1)
    assert await tier.evict(make_key(1))
    assert (tier.ledger.used_bytes, tier.ledger.used_blocks) == (0, 0)


async def test_what_could_not_be_unlinked_is_not_charged_to_another_directory(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    tier = directory_tier(tmp_path, threads)
    await store(tier, a_block(1))
    await store(tier, a_block(2))
    tier.ledger.end_eviction(make_key(1), tier.ledger.begin_eviction(make_key(1)), removed=False)
    tier.ledger.forget()
    assert (tier.ledger.used_bytes, tier.ledger.used_blocks) == (0, 0)


@pytest.mark.parametrize("by", ["evict", "resize"])
async def test_what_a_disk_removes_after_it_hung_is_charged_no_more(
    tmp_path: Path, threads: ThreadPoolExecutor, by: str
) -> None:
    hangs, answers = True, threading.Event()

    def before(name: str) -> None:
        if hangs and name == "unlink":
            answers.wait(30)

    limits = DiskLimits(stuck_s=0.05, first_retry_s=1e-3, last_retry_s=1e-3)
    tier = directory_tier(tmp_path, threads, capacity_bytes=4 * SIZE, system=FaultySystem(before), limits=limits)
    for number in range(4):
        await store(tier, a_block(number))
    try:
        if by == "evict":
            assert not await tier.evict(make_key(3))
            await until(lambda: not tier.holds(make_key(1)))
            assert not await tier.evict(make_key(1)), "nothing is asked of a disk that does not answer"
            assert tier.ledger.holds(make_key(1))
        else:
            nobody = {"wanted": lambda _key, _length: False, "pass_on": lambda _block: None}
            assert not await tier.resize(3 * SIZE, 4, **nobody)
    finally:
        answers.set()
    await until(lambda: tier.well and tier.ledger.used_bytes == 3 * SIZE)
    assert len(check_directory(tmp_path, capacity_bytes=3 * SIZE)) == 3
    hangs = False
    assert not await tier.evict(make_key(3))
    assert await tier.evict(make_key(1))
    assert tier.ledger.used_bytes == 2 * SIZE


async def test_a_victim_that_cannot_be_read_for_want_of_descriptors_leaves_all_the_same(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    def before(name: str) -> None:
        if name == "preadv":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    tier = directory_tier(tmp_path, threads, capacity_bytes=SIZE, system=FaultySystem(before))
    await store(tier, a_block(5))
    assert await store(tier, a_block(1), wanted=True) == []
    assert held(tier, range(10)) == [1]


async def test_a_slow_disk_loses_admissions(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    tier = directory_tier(tmp_path, threads, max_queued_bytes=2 * SIZE)
    first, second = (tier.ledger.reserve(make_key(number), LENGTH) for number in (1, 2))
    assert first is not None
    assert second is not None
    assert tier.ledger.reserve(make_key(3), LENGTH) is None
    await store(tier, a_block(1), reservation=first)
    assert tier.ledger.wants(make_key(3), LENGTH)
    await store(tier, a_block(2), reservation=second)


async def test_a_key_on_its_way_in_or_out_is_not_let_in_twice(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    tier = directory_tier(tmp_path, threads, capacity_bytes=SIZE)
    await store(tier, a_block(5))
    coming = tier.ledger.reserve(make_key(1), LENGTH)
    assert coming is not None
    assert not tier.ledger.wants(make_key(1), LENGTH)
    assert not tier.ledger.wants(make_key(5), LENGTH)
    await store(tier, a_block(1), reservation=coming)
    assert not tier.ledger.wants(make_key(1), LENGTH)


async def test_a_truncated_file_is_a_miss_and_is_removed(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    tier = directory_tier(tmp_path, threads)
    await store(tier, a_block(1))
    file = tmp_path / "blocks-1" / block_path(make_key(1), LENGTH)
    file.write_bytes(file.read_bytes()[:-1])
    assert await tier.open_many([(make_key(1), LENGTH)]) == [None]
    assert (tier.ledger.counters.corrupt, tier.ledger.used_bytes, tier.ledger.used_blocks) == (1, 0, 0)
    assert not file.exists()


async def test_a_file_that_somebody_deleted_is_a_miss(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    tier = directory_tier(tmp_path, threads)
    await store(tier, a_block(1))
    (tmp_path / "blocks-1" / block_path(make_key(1), LENGTH)).unlink()
    assert await tier.open_many([(make_key(1), LENGTH)]) == [None]
    assert (tier.ledger.counters.corrupt, tier.ledger.counters.errors, tier.ledger.used_bytes) == (0, 0, 0)


async def test_no_descriptor_left_is_not_the_blocks_fault(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    out_of_files = False

    def before(name: str) -> None:
        if out_of_files:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    tier = directory_tier(tmp_path, threads, system=FaultySystem(before))
    await store(tier, a_block(1))
    out_of_files = True
    with pytest.raises(OSError, match="Too many open files"):
        await tier.open_many([(make_key(1), LENGTH)])
    assert await tier.read(make_key(1), LENGTH) is None
    assert tier.ledger.holds(make_key(1))


async def test_only_what_this_process_wrote_to_a_ram_directory_is_trusted(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    for medium, trusted in (("ram", True), ("hdd", False)):
        tier = directory_tier(tmp_path / medium, threads, medium=medium)
        await store(tier, a_block(1))
        assert tier.handle(make_key(1), a_block(1).memory, LENGTH).verify is not trusted
        tier.shelf.close()
        again = directory_tier(tmp_path / medium, threads, medium=medium)
        await again.open()
        await again.scanned()
        assert again.ledger.holds(make_key(1))
        assert again.handle(make_key(1), a_block(1).memory, LENGTH).verify


@pytest.mark.parametrize("capacity", [{"capacity_bytes": 4 * SIZE}, {"capacity_blocks": 4}])
async def test_a_smaller_limit_keeps_the_best_of_what_is_there(
    tmp_path: Path, threads: ThreadPoolExecutor, capacity: dict
) -> None:
    tier = directory_tier(tmp_path, threads)
    for number in (3, 1, 4, 5, 9, 2, 6):
        await store(tier, a_block(number))
    tier.shelf.close()
    again = directory_tier(tmp_path, threads, **capacity)
    await again.open()
    assert again.ledger.reserve(make_key(0), LENGTH) is None, "nothing is let in before the directory is known"
    await again.scanned()
    assert held(again, range(10)) == [1, 2, 3, 4]
    assert sorted(check_directory(tmp_path, capacity_bytes=4 * SIZE)) == [make_key(number) for number in (1, 2, 3, 4)]
    assert (again.ledger.used_bytes, again.ledger.used_blocks) == (4 * SIZE, 4)
    assert await store(again, a_block(0)) == []


async def test_a_bad_block_reported_before_the_scan_came_to_it_is_not_adopted(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    tier = directory_tier(tmp_path, threads)
    await store(tier, a_block(1))
    tier.shelf.close()
    again = directory_tier(tmp_path, threads)
    await again.open()
    assert again.may_hold(make_key(1))
    await again.drop(make_key(1), CorruptError("bad"))
    assert not again.may_hold(make_key(1))
    await again.scanned()
    assert not again.ledger.holds(make_key(1))
    assert check_directory(tmp_path, capacity_bytes=0) == {}


async def test_a_disk_that_others_have_filled_goes_on_with_the_room_it_has(
    tmp_path: Path, threads: ThreadPoolExecutor, caplog
) -> None:
    room_bytes = 4 * SIZE

    def fill(name: str) -> None:
        if name == "posix_fallocate" and shelf.bytes > room_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # Tried again so much later each time that blocks are replaced in between.
    limits = DiskLimits(first_retry_s=1e-3, last_retry_s=1e6)
    tier = directory_tier(tmp_path, threads, policy=Lru(), system=FaultySystem(fill), limits=limits)
    shelf = tier.shelf
    assert isinstance(shelf, WeighedShelf)
    numbers = iter(range(1 << 30))
    while tier.ledger.counters.evictions < 20:
        await store(tier, a_block(number := next(numbers)))
        assert tier.ledger.used_bytes <= room_bytes
        await asyncio.sleep(0)
    assert tier.ledger.used_bytes == room_bytes
    assert held(tier, [number]) == [number]
    assert tier.stats()["full"] is not None
    assert os.strerror(errno.ENOSPC) in tier.stats()["fault"]
    assert len(caplog.records) == 1, "that it is full is said once"
    room_bytes = 6 * SIZE
    while tier.ledger.used_bytes < room_bytes:
        await store(tier, a_block(next(numbers)))
        await asyncio.sleep(0)
    room_bytes = 99 * SIZE
    while tier.ledger.used_bytes < 10 * SIZE:
        await store(tier, a_block(next(numbers)))
        await asyncio.sleep(0)
    assert tier.stats()["full"] is None
    check_directory(tmp_path, capacity_bytes=10 * SIZE)


async def test_a_process_without_descriptors_does_not_blame_the_disk(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    scarce = True

    def refuse(name: str) -> None:
        if scarce and name == "open":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    tier = directory_tier(tmp_path, threads, system=FaultySystem(refuse), limits=DiskLimits())
    for number in range(10):
        assert await store(tier, a_block(number)) is None
    assert (tier.well, tier.ledger.admission, tier.ledger.used_bytes) == (True, "open", 0)
    assert tier.stats()["errors"] == 10
    assert os.strerror(errno.EMFILE) in tier.stats()["fault"]
    scarce = False
    assert await store(tier, a_block(1)) == []
    assert tier.stats()["fault"] is None


async def test_a_scan_that_fails_in_an_unknown_way_is_repeated(
    tmp_path: Path, threads: ThreadPoolExecutor, monkeypatch, caplog
) -> None:
    before = directory_tier(tmp_path, threads)
    await store(before, a_block(1))
    await before.close(10)
    limits = DiskLimits(first_retry_s=1e-3, last_retry_s=1e-3)
    again = directory_tier(tmp_path, threads, limits=limits)
    outcomes = iter([RuntimeError("a defect")])
    scan = again.shelf.scan

    def fail_once(folder: str) -> object:
        for error in outcomes:
            raise error
        return scan(folder)

    monkeypatch.setattr(again.shelf, "scan", fail_once)
    await again.open()
    await until(lambda: held(again, [1]) == [1] and not again.scanning)
    assert again.ledger.admission == "open"
    assert "a defect" in caplog.text
    await again.close(10)


async def test_a_directory_that_cannot_be_scanned_takes_nothing_until_it_can(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    tier = directory_tier(tmp_path, threads)
    await store(tier, a_block(1))
    tier.shelf.close()
    again = directory_tier(tmp_path, threads)
    (tmp_path / "blocks-1").rename(tmp_path / "away")
    await again.open()
    await again.scanned()
    assert not again.ledger.wants(make_key(2), LENGTH)
    assert again.stats()["state"] == "down"
    assert "cannot be listed" in again.stats()["state_reason"]
    (tmp_path / "away").rename(tmp_path / "blocks-1")
    await until(lambda: again.ledger.wants(make_key(2), LENGTH))
    assert held(again, range(10)) == [1]


def test_memory_gives_back_its_victims() -> None:
    tier = memory_tier(2 * SIZE)
    assert tier.put(a_block(5)) == []
    assert tier.put(a_block(6)) == []
    assert [victim.key for victim in tier.put(a_block(1)) or []] == [make_key(6)]
    assert tier.put(a_block(7)) is None
    assert tier.put(a_block(1)) is None
    assert (tier.ledger.used_bytes, tier.ledger.used_blocks, tier.ledger.counters.refused) == (2 * SIZE, 2, 1)
    tier.take(a_block(5))
    assert (tier.ledger.used_bytes, tier.ledger.used_blocks) == (SIZE, 1)
    tier.shelf.close()


def test_nothing_fits_into_nothing() -> None:
    assert memory_tier(0).put(a_block(1)) is None
    assert memory_tier(10 * SIZE, capacity_blocks=0).put(a_block(1)) is None
