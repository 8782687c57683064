"""A tier: accounting and policy over a shelf.

Everything that decides runs on the event loop without an await in between; only the blocking calls on a directory run
in threads. The order is what keeps the limits, also for a moment and with many writers at once:

    reserve   the policy names victims, which are not chosen again; space is charged for the newcomer as far as the
              victims do not make room for it
    settle    the victims are gone from the medium; what they freed beyond the newcomer is given back
    commit    the newcomer is written and from now on found; or `abandon`: it is not, its space is given back

So what lies on the medium never exceeds `used_bytes`, and `used_bytes` never exceeds the capacity. A victim or a
temporary file that cannot be unlinked stays charged. A kill at any point leaves at most what was charged.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar

from cache.config import Medium
from cache.directory_shelf import DirectoryShelf, LeftBehindError
from cache.handle import Block, Descriptor, Handle
from cache.policy import Policy
from cache.shelf import Shelf
from connectors.errors import CorruptError

__all__ = ["UNLIMITED_BLOCKS", "Counters", "Reservation", "Tier"]

_log = logging.getLogger(__name__)

UNLIMITED_BLOCKS = sys.maxsize

_T = TypeVar("_T")

_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)


@dataclass(slots=True)
class Counters:
    """What happened in a tier since it was opened. `hit_bytes` counts blocks' own bytes, the others the medium's."""

    hits: int = 0
    hit_bytes: int = 0
    insertions: int = 0
    written_bytes: int = 0
    evictions: int = 0
    evicted_bytes: int = 0
    refused: int = 0
    corrupt: int = 0
    errors: int = 0


@dataclass(frozen=True, slots=True)
class Reservation:
    """Space for one block that is about to be written, and the blocks that leave for it."""

    key: bytes
    size_bytes: int
    victims: list[tuple[bytes, int]]
    victim_bytes: int


class Tier:
    """One level of the cache. Belongs to the event loop's thread.

    Args:
        name: As in the configuration.
        medium: As in the configuration.
        policy_name: What statistics say.
        policy: Chooses what stays; owned.
        shelf: Holds the blocks; owned.
        capacity_bytes: Most bytes on the medium.
        capacity_blocks: Most blocks.
        max_queued_bytes: Most bytes waiting to be written; past it a slow disk loses admissions, and no reader waits.
        executor: Threads for the shelf's calls; None where they never block.
    """

    def __init__(
        self,
        *,
        name: str,
        medium: Medium,
        policy_name: str,
        policy: Policy,
        shelf: Shelf,
        capacity_bytes: int,
        capacity_blocks: int,
        max_queued_bytes: int,
        executor: Executor | None,
    ) -> None:
        self.name = name
        self.medium = medium
        self.policy_name = policy_name
        self.shelf = shelf
        self.capacity_bytes = capacity_bytes
        self.capacity_blocks = capacity_blocks
        self.used_bytes = 0
        self.used_blocks = 0
        self.counters = Counters()
        self.scanning = False
        self.fault: str | None = None
        self._policy = policy
        self._max_queued_bytes = max_queued_bytes
        self._queued_bytes = 0
        self._executor = executor
        self._lengths: dict[bytes, int] = {}
        self._busy: set[bytes] = set()
        # Blocks of a RAM directory that this process wrote itself need no second look.
        self._written_here: set[bytes] = set()
        # Dropped before the scan came to them; they are removed when it does.
        self._unwanted: set[bytes] = set()

    @property
    def in_memory(self) -> bool:
        """Whether the shelf's calls are immediate."""
        return self._executor is None

    # Finding.

    def holds(self, key: bytes) -> bool:
        """Say whether the block is known to be here."""
        return key in self._lengths

    def may_hold(self, key: bytes) -> bool:
        """Say whether a scan under way may still come to the block."""
        return self.scanning and key not in self._unwanted

    def handle(self, key: bytes, descriptor: Descriptor, length: int) -> Handle:
        """Count a hit and wrap the open file of a block that was found here."""
        counters = self.counters
        counters.hits += 1
        counters.hit_bytes += length
        self._policy.touch(key)
        verify = self._executor is not None and (self.medium != "ram" or key not in self._written_here)
        return Handle(descriptor, length, self.name, verify=verify)

    async def open_many(self, wanted: Sequence[tuple[bytes, int]]) -> list[Descriptor | None]:
        """Open blocks of a directory, in one go. None: it is not there (any more), and a broken one is dropped.

        Raises:
            OSError: This process has no descriptor left.
        """
        found = await self._call(_open_each, self.shelf, wanted)
        results: list[Descriptor | None] = []
        for (key, _), file in zip(wanted, found, strict=True):
            if isinstance(file, Descriptor):
                results.append(file)
                continue
            if isinstance(file, OSError) and file.errno in _NO_DESCRIPTORS:
                raise file
            await self.drop(key, file)
            results.append(None)
        return results

    async def read(self, key: bytes, length: int) -> Block | None:
        """Return a block as memory; None where it cannot be had, and a broken one is dropped."""
        try:
            return await self._call(self.shelf.read, key, length)
        except (OSError, CorruptError) as error:
            if not (isinstance(error, OSError) and error.errno in _NO_DESCRIPTORS):
                await self.drop(key, error)
            return None

    # Letting in.

    def wants(self, key: bytes, length: int) -> bool:
        """Say whether the block would be let in. Changes nothing."""
        return self._choose(key, self.shelf.cost_bytes(length)) is not None

    def reserve(self, key: bytes, length: int) -> Reservation | None:
        """Charge space for a block and take its victims out; None where the block is not let in."""
        size_bytes = self.shelf.cost_bytes(length)
        chosen = self._choose(key, size_bytes)
        if chosen is None:
            self.counters.refused += key not in self._lengths
            return None
        victims = [(victim, self._lengths[victim]) for victim in chosen]
        victim_bytes = sum(self.shelf.cost_bytes(length) for _, length in victims)
        self.used_bytes += max(0, size_bytes - victim_bytes)
        self.used_blocks += not victims
        self._queued_bytes += size_bytes
        for victim in chosen:
            self._policy.remove(victim)
        self._busy.update(chosen, (key,))
        return Reservation(key, size_bytes, victims, victim_bytes)

    def settle(self, reservation: Reservation) -> None:
        """Give back what the victims, all of them off the medium, took beyond the newcomer."""
        self.used_bytes -= max(0, reservation.victim_bytes - reservation.size_bytes)
        self.used_blocks -= max(0, len(reservation.victims) - 1)
        self.counters.evictions += len(reservation.victims)
        self.counters.evicted_bytes += reservation.victim_bytes
        self._busy.difference_update(key for key, _ in reservation.victims)

    def commit(self, reservation: Reservation, length: int) -> None:
        """Make the written block known."""
        self._end(reservation)
        self.counters.insertions += 1
        self.counters.written_bytes += reservation.size_bytes
        self._know(reservation.key, length)
        if self._executor is not None and self.medium == "ram":
            self._written_here.add(reservation.key)

    def abandon(self, reservation: Reservation) -> None:
        """Give back the space of a settled reservation whose block was not written."""
        self._end(reservation)
        self.used_bytes -= reservation.size_bytes
        self.used_blocks -= 1

    def put(self, block: Block) -> list[Block] | None:
        """Let a block into memory: None where it is not let in, else the blocks that left for it."""
        reservation = self.reserve(block.key, block.length)
        if reservation is None:
            return None
        evicted = [self.shelf.read(key, length) for key, length in reservation.victims]
        for victim in evicted:
            self._hide(victim.key)
            self.shelf.remove(victim.key, victim.length)
        self.settle(reservation)
        self.shelf.write(block)
        self.commit(reservation, block.length)
        return evicted

    async def store(
        self,
        block: Block,
        reservation: Reservation,
        *,
        wanted: Callable[[bytes, int], bool],
        pass_on: Callable[[Block], None],
    ) -> bool:
        """Write a block into a directory under its reservation.

        Args:
            block: What to write.
            reservation: Made for it by `reserve`.
            wanted: Whether somebody would have a victim.
            pass_on: Gets each victim that is wanted, before it goes, so that it is found all the time.

        Returns:
            Whether the block is here now.
        """
        removed: list[tuple[bytes, int]] = []
        try:
            for key, length in reservation.victims:
                if key in self._lengths and wanted(key, length):
                    victim = await self.read(key, length)
                    # Meanwhile a reader may have found it to be wrong.
                    if victim is not None and key in self._lengths:
                        pass_on(victim)
                self._hide(key)
                await self._call(self.shelf.remove, key, length)
                removed.append((key, length))
            self.settle(reservation)
        except OSError as error:
            self._note_fault(error)
            self._give_up(reservation, removed)
            return False
        try:
            await self._call(self.shelf.write, block)
        except OSError as error:
            self._note_fault(error)
            if isinstance(error, LeftBehindError):
                self._end(reservation)
            else:
                self.abandon(reservation)
            return False
        self.commit(reservation, block.length)
        self.fault = None
        return True

    # Letting go.

    async def drop(self, key: bytes, reason: Exception) -> None:
        """Remove a block that is wrong or cannot be read; the next reader fetches it again."""
        known = key in self._lengths
        if self.scanning:
            self._unwanted.add(key)
        elif not known:
            return
        if isinstance(reason, CorruptError):
            self.counters.corrupt += 1
            _log.warning("tier %s drops a bad block: %s", self.name, str(reason))
        elif not isinstance(reason, FileNotFoundError):
            self._note_fault(reason)
        if key in self._busy:
            # It is leaving: its space is the reservation's affair.
            self._hide(key)
        elif known:
            length = self._detach(key)
            try:
                await self._call(self.shelf.remove, key, length)
            except OSError as error:
                self._note_fault(error)
            else:
                self._release(length)
            self._busy.discard(key)

    def take(self, block: Block) -> None:
        """Remove a block from memory because it moves to another tier."""
        self._detach(block.key)
        self.shelf.remove(block.key, block.length)
        self._release(block.length)
        self._busy.discard(block.key)

    # Finding again after a restart.

    async def adopt(self, shelf: DirectoryShelf) -> None:
        """Scan the directory and take over the blocks in it, the best by the policy where they exceed the limits.

        Nothing is let in before the end: until then what lies on the medium is not known. Blocks are served meanwhile,
        opened by name.
        """
        foreign = 0
        try:
            for folder in await self._call(shelf.folders):
                blocks, others = await self._call(shelf.scan, folder)
                foreign += others
                for key, length in self._take_over(blocks):
                    try:
                        await self._call(shelf.remove, key, length)
                    except OSError as error:
                        self._note_fault(error)
                        self._charge(length)
        except OSError as error:
            # What lies there is not known, so nothing may come to it.
            self._note_fault(error)
            self.capacity_bytes = 0
        self.scanning = False
        self._unwanted.clear()
        if foreign:
            _log.warning("tier %s: %d files in %s are not blocks and are left alone", self.name, foreign, shelf.path)
        _log.info("tier %s: %d blocks found in %s", self.name, len(self._lengths), shelf.path)

    def _take_over(self, blocks: Iterable[tuple[bytes, int]]) -> list[tuple[bytes, int]]:
        """Charge for the blocks that fit; return those to remove."""
        surplus = []
        for key, length in blocks:
            if key in self._lengths:
                continue
            chosen = None if key in self._unwanted else self._admit(key, self.shelf.cost_bytes(length))
            if chosen is None:
                surplus.append((key, length))
                continue
            for victim in chosen:
                victim_length = self._detach(victim)
                self._busy.discard(victim)
                self._release(victim_length)
                surplus.append((victim, victim_length))
            self._charge(length)
            self._know(key, length)
        return surplus

    # Inside.

    def stats(self) -> dict[str, Any]:
        """Return settings, fill, counters and the last fault as plain values."""
        return {
            "name": self.name,
            "medium": self.medium,
            "policy": self.policy_name,
            "capacity_bytes": self.capacity_bytes,
            "used_bytes": self.used_bytes,
            "capacity_blocks": None if self.capacity_blocks == UNLIMITED_BLOCKS else self.capacity_blocks,
            "blocks": self.used_blocks,
            **{name: getattr(self.counters, name) for name in Counters.__slots__},
            "scanning": self.scanning,
            "fault": self.fault,
        }

    async def _call(self, function: Callable[..., _T], *args: Any) -> _T:
        if self._executor is None:
            return function(*args)
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    def _choose(self, key: bytes, size_bytes: int) -> list[bytes] | None:
        if self.scanning or key in self._lengths or key in self._busy:
            return None
        if self._queued_bytes and self._queued_bytes + size_bytes > self._max_queued_bytes:
            return None
        return self._admit(key, size_bytes)

    def _admit(self, key: bytes, size_bytes: int) -> list[bytes] | None:
        return self._policy.admit(
            key,
            size_bytes,
            free_bytes=self.capacity_bytes - self.used_bytes,
            free_blocks=self.capacity_blocks - self.used_blocks,
        )

    def _charge(self, length: int) -> None:
        self.used_bytes += self.shelf.cost_bytes(length)
        self.used_blocks += 1

    def _release(self, length: int) -> None:
        self.used_bytes -= self.shelf.cost_bytes(length)
        self.used_blocks -= 1

    def _know(self, key: bytes, length: int) -> None:
        self._lengths[key] = length
        self._policy.insert(key, self.shelf.cost_bytes(length))

    def _hide(self, key: bytes) -> None:
        """From now on a block is not found, while its space is still charged."""
        self._lengths.pop(key, None)
        self._written_here.discard(key)

    def _detach(self, key: bytes) -> int:
        """Take a block out that nobody reserved its space for; return its length."""
        length = self._lengths[key]
        self._policy.remove(key)
        self._hide(key)
        self._busy.add(key)
        return length

    def _end(self, reservation: Reservation) -> None:
        self._queued_bytes -= reservation.size_bytes
        self._busy.discard(reservation.key)

    def _give_up(self, reservation: Reservation, removed: list[tuple[bytes, int]]) -> None:
        """Undo a reservation after only some victims could be removed; the others stay charged."""
        self._end(reservation)
        for key, _ in reservation.victims:
            self._hide(key)
            self._busy.discard(key)
        removed_bytes = sum(self.shelf.cost_bytes(length) for _, length in removed)
        self.used_bytes -= max(0, reservation.size_bytes - reservation.victim_bytes) + removed_bytes
        self.used_blocks -= (not reservation.victims) + len(removed)
        self.counters.evictions += len(removed)
        self.counters.evicted_bytes += removed_bytes

    def _note_fault(self, error: Exception) -> None:
        self.counters.errors += 1
        # As text: a kept error would keep its frames, and with them the block's memory.
        text = str(error)
        if self.fault is None:
            _log.warning("tier %s: %s; reads go on without it", self.name, text)
        self.fault = text


def _open_each(shelf: Shelf, wanted: Sequence[tuple[bytes, int]]) -> list[Descriptor | OSError | CorruptError]:
    found: list[Descriptor | OSError | CorruptError] = []
    for key, length in wanted:
        try:
            found.append(shelf.open(key, length))
        except (OSError, CorruptError) as error:
            found.append(error)
    return found
