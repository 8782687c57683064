"""The tiers one below the other, and the ring under them.

A block is offered from the first tier to the last; the first that lets it in keeps it, what leaves for it is offered
to the tiers below, and what no tier keeps passes through the ring, a small memory: an LRU, but for what plans announce.
A block found below is offered to the tiers above it: LRU takes it, a full kept set of lower keys does not. The copy in
a directory stays where it is, so that its later return from above costs no write; from memory the block moves.

Placing in memory happens at once. Placing in a directory is a task; until it ends, the block is found in `_moving`, so
nobody fetches it a second time. What waits to be written to one directory is bounded by its tier, which refuses more.
What is being written cannot leave yet, so a block that it keeps out is offered again when some of it is written.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from cache.handle import Block, Handle
from cache.ledger import Reservation
from cache.level import Level
from cache.tier import Tier

__all__ = ["Stack", "Stored"]

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

_MAX_WAITING_BLOCKS = 64


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a block may lie in a directory; whether it still does, opening it will tell."""

    tier: Tier
    key: bytes
    length: int


class Stack:
    """Belongs to the event loop's thread.

    Args:
        levels: The tiers, from the first one asked to the last; owned.
        ring: A tier in memory for what no other keeps; owned.
        max_promoting_bytes: Most bytes being read from directories for the tiers above; past it a hit promotes nothing.

    Attributes:
        on_passing: Called with key and length of each block that comes into the ring.
    """

    def __init__(self, levels: Sequence[Level], ring: Level, *, max_promoting_bytes: int) -> None:
        self.levels = tuple(levels)
        self.ring = ring
        self.on_passing: Callable[[bytes, int], None] = lambda _key, _length: None
        self._levels = (*self.levels, ring)
        self._level_of = {tier: number for number, level in enumerate(self._levels) for tier in level.members}
        self._max_promoting_bytes = max_promoting_bytes
        self._promoting: set[bytes] = set()
        self._promoting_bytes = 0
        self._moving: dict[bytes, Block] = {}
        # Those of them that are offered again to a directory, when a write there ends.
        self._waiting: dict[Tier, list[Block]] = {tier: [] for tier in self._level_of}
        self._tasks: set[asyncio.Task[Any]] = set()
        for tier in self._level_of:
            tier.start = self.begin

    def find(self, key: bytes, length: int, missed: set[tuple[Tier, bytes]]) -> Handle | Stored | None:
        """Look a block up, first tier first.

        Args:
            key: The block.
            length: Its bytes.
            missed: Directories where this caller looked for the block in vain.

        Returns:
            The block, where it is in memory; the directory to `open` it in; None where nobody has it.
        """
        for number, level in enumerate(self._levels):
            tier = level.find(key, missed)
            if tier is None:
                continue
            if not tier.in_memory:
                return Stored(tier, key, length)
            block = tier.shelf.read(key, length)
            handle = tier.handle(key, block.memory, length)
            if number:
                self._raise(block, number, tier)
            return handle
        moving = self._moving.get(key)
        return None if moving is None else self.ring.members[0].handle(key, moving.memory, length)

    def holds(self, key: bytes) -> bool:
        """Say whether the block is here, or may be in a directory that is still being scanned. Counts nothing."""
        return key in self._moving or any(level.find(key, ()) is not None for level in self._levels)

    def passes_by(self, key: bytes) -> bool:
        """Say whether the ring holds the block and no tier does."""
        return self.ring.holds(key) and not any(level.holds(key) for level in self.levels)

    def spare_bytes(self) -> int:
        """Return how much room is left in tiers in memory."""
        ledgers = [tier.ledger for level in self.levels if level.in_memory for tier in level.members]
        return sum(max(0, ledger.capacity_bytes - ledger.used_bytes) for ledger in ledgers)

    async def open(self, tier: Tier, stored: Sequence[Stored]) -> list[Handle | None]:
        """Open blocks that `find` placed in `tier`; None: it is not there, look again below.

        Raises:
            OSError: This process has no descriptor left.
        """
        files = await tier.open_many([(entry.key, entry.length) for entry in stored])
        handles: list[Handle | None] = []
        for entry, file in zip(stored, files, strict=True):
            if file is None:
                handles.append(None)
                continue
            handles.append(tier.handle(entry.key, file, entry.length))
            self._promote(entry)
        return handles

    def place(self, block: Block) -> None:
        """Offer a fetched block to the tiers, else to the ring. Returns at once; directories are written behind."""
        self._offer(block, 0, len(self._levels))

    async def check(self, key: bytes, length: int) -> None:
        """Look at every copy of a block that a reader found to be wrong, and remove those that are."""
        for tier in self._level_of:
            await tier.check(key, length)

    async def resize(self, name: str, limits: Sequence[tuple[int, int]]) -> bool:
        """Give each place of a tier new limits, in bytes and blocks; what leaves is offered below."""
        number = next(number for number, level in enumerate(self.levels) if level.name == name)
        wanted, pass_on = partial(self._wanted_below, number), partial(self._pass_on, number)
        done = True
        for tier, (capacity_bytes, capacity_blocks) in zip(self.levels[number].members, limits, strict=True):
            await tier.scanned()
            done &= await tier.resize(capacity_bytes, capacity_blocks, wanted=wanted, pass_on=pass_on)
        return done

    async def settle(self) -> None:
        """Wait until nothing is on its way between tiers."""
        # A placement may begin another one, for its victims.
        while self._tasks:
            await asyncio.wait(list(self._tasks))

    async def close(self, timeout_s: float) -> bool:
        """Finish what is being placed and let go of the shelves; False where `timeout_s` did not suffice.

        The lock of a directory where a thread may still write stays ours until the process ends.
        """
        try:
            await asyncio.wait_for(self.settle(), timeout_s)
        except TimeoutError:
            _log.warning("%d placements are dropped: a directory did not answer in %g s", len(self._tasks), timeout_s)
            for task in self._tasks:
                task.cancel()
            timeout_s = 0
        return all(await asyncio.gather(*(tier.close(timeout_s) for tier in self._level_of)))

    def _offer(self, block: Block, first: int, end: int) -> None:
        """Offer a block to the levels `[first, end)`; its victims go on below."""
        for level in range(first, end):
            if self._levels[level].holds(block.key):
                return
            tier = self._levels[level].member_for(block.key)
            if tier.in_memory:
                evicted = tier.put(block)
                if evicted is None:
                    continue
                for victim in evicted:
                    self._pass_on(level, victim)
                if level == len(self.levels):
                    self.on_passing(block.key, block.length)
                return
            reservation = tier.ledger.reserve(block.key, block.length)
            if reservation is not None:
                self._moving[block.key] = block
                self.begin(self._store(block, level, tier, reservation))
                return
            if tier.ledger.undecided(block.key, block.length):
                if len(self._waiting[tier]) < _MAX_WAITING_BLOCKS:
                    self._moving[block.key] = block
                    self._waiting[tier].append(block)
                    return
                tier.ledger.counters.refused += 1

    def _wanted_below(self, level: int, key: bytes, length: int) -> bool:
        return any(lower.wants(key, length) for lower in self._levels[level + 1 :])

    def _pass_on(self, level: int, victim: Block) -> None:
        """Offer what leaves a level to those below it."""
        self._offer(victim, level + 1, len(self._levels))

    async def _store(self, block: Block, level: int, tier: Tier, reservation: Reservation) -> None:
        wanted, pass_on = partial(self._wanted_below, level), partial(self._pass_on, level)
        stored = False
        try:
            stored = await tier.store(block, reservation, wanted=wanted, pass_on=pass_on)
        finally:
            self._stopped_moving(block)
            if not stored:
                pass_on(block)
            waiting, self._waiting[tier] = self._waiting[tier], []
            for other in waiting:
                self._stopped_moving(other)
                self._offer(other, level, len(self._levels))

    def _stopped_moving(self, block: Block) -> None:
        if self._moving.get(block.key) is block:
            del self._moving[block.key]

    def _raise(self, block: Block, level: int, tier: Tier) -> None:
        """Move a block found in memory to a tier above that wants it."""
        if any(upper.wants(block.key, block.length) for upper in self._levels[:level]):
            tier.take(block)
            self._offer(block, 0, level)

    def _promote(self, stored: Stored) -> None:
        """Copy a block found in a directory to a tier above that wants it."""
        key, length = stored.key, stored.length
        level = self._level_of[stored.tier]
        if key in self._promoting or key in self._moving:
            return
        if self._promoting and self._promoting_bytes + length > self._max_promoting_bytes:
            return
        if any(upper.wants(key, length) for upper in self.levels[:level]):
            self._promoting.add(key)
            self._promoting_bytes += length
            self.begin(self._copy_up(stored, level))

    async def _copy_up(self, stored: Stored, level: int) -> None:
        try:
            block = await stored.tier.read(stored.key, stored.length)
        finally:
            self._promoting.remove(stored.key)
            self._promoting_bytes -= stored.length
        # Meanwhile it may have come up another way.
        if block is not None and not any(upper.holds(stored.key) for upper in self.levels[:level]):
            self._offer(block, 0, level)

    def begin(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Run work on the tiers behind; `close` waits for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a placement failed", exc_info=error)
