"""A tier: a ledger over a shelf.

The ledger decides, on the event loop and without an await in between; only the blocking calls on a directory run in
threads. A kill at any point leaves on the medium at most what the ledger had charged.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar

from cache.config import Medium
from cache.directory_shelf import DirectoryShelf, LeftBehindError
from cache.handle import Block, Descriptor, Handle
from cache.ledger import UNLIMITED_BLOCKS, Counters, Entry, Ledger, Reservation
from cache.policy import Policy
from cache.shelf import Shelf
from connectors.errors import CorruptError

__all__ = ["Tier"]

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)


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

    Attributes:
        ledger: What the tier holds.
        scanning: A directory is not yet known: blocks are looked for by name, and none is let in.
        fault: The last failure of the medium, None once a write succeeds.
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
        self.ledger = Ledger(
            policy=policy,
            cost_bytes=shelf.cost_bytes,
            capacity_bytes=capacity_bytes,
            capacity_blocks=capacity_blocks,
            max_queued_bytes=max_queued_bytes,
        )
        self.in_memory = executor is None
        self.scanning = False
        self.fault: str | None = None
        self._executor = executor
        # Blocks of a RAM directory that this process wrote itself need no second look.
        self._written_here: set[bytes] = set()
        # Dropped before the scan came to them; they are removed when it does.
        self._unwanted: set[bytes] = set()

    def may_hold(self, key: bytes) -> bool:
        """Say whether a scan under way may still come to the block."""
        return self.scanning and key not in self._unwanted

    def handle(self, key: bytes, descriptor: Descriptor, length: int) -> Handle:
        """Count a hit and wrap the open file of a block that was found here."""
        self.ledger.count_hit(key, length)
        verify = not self.in_memory and (self.medium != "ram" or key not in self._written_here)
        return Handle(descriptor, length, self.name, verify=verify)

    async def open_many(self, wanted: Sequence[Entry]) -> list[Descriptor | None]:
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

    def put(self, block: Block) -> list[Block] | None:
        """Let a block into memory: None where it is not let in, else the blocks that left for it."""
        reservation = self.ledger.reserve(block.key, block.length)
        if reservation is None:
            return None
        evicted = [self.shelf.read(key, length) for key, length in reservation.victims]
        for victim in evicted:
            self.ledger.hide(victim.key)
            self.shelf.remove(victim.key, victim.length)
        self.ledger.settle(reservation)
        self.shelf.write(block)
        self.ledger.commit(reservation)
        return evicted

    def take(self, block: Block) -> None:
        """Remove a block from memory because it moves to another tier."""
        self.ledger.detach(block.key)
        self.shelf.remove(block.key, block.length)
        self.ledger.end_removal(block.key, block.length, removed=True)

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
            reservation: Made for it by the ledger.
            wanted: Whether somebody would have a victim.
            pass_on: Gets each victim that is wanted, before it goes, so that it is found all the time.

        Returns:
            Whether the block is here now.
        """
        removed: list[Entry] = []
        try:
            for key, length in reservation.victims:
                if self.ledger.holds(key) and wanted(key, length):
                    victim = await self.read(key, length)
                    # Meanwhile a reader may have found it to be wrong.
                    if victim is not None and self.ledger.holds(key):
                        pass_on(victim)
                self.ledger.hide(key)
                await self._remove(key, length)
                removed.append((key, length))
        except OSError as error:
            self._note_fault(error)
            self.ledger.give_up(reservation, removed)
            return False
        self.ledger.settle(reservation)
        try:
            await self._call(self.shelf.write, block)
        except OSError as error:
            self._note_fault(error)
            self.ledger.abandon(reservation, left_behind=isinstance(error, LeftBehindError))
            return False
        self.ledger.commit(reservation)
        if self.medium == "ram":
            self._written_here.add(block.key)
        self.fault = None
        return True

    async def drop(self, key: bytes, reason: Exception) -> None:
        """Remove a block that is wrong or cannot be read; the next reader fetches it again."""
        if self.scanning:
            self._unwanted.add(key)
        elif not self.ledger.holds(key):
            return
        if isinstance(reason, CorruptError):
            self.ledger.counters.corrupt += 1
            _log.warning("tier %s drops a bad block: %s", self.name, str(reason))
        elif not isinstance(reason, FileNotFoundError):
            self._note_fault(reason)
        length = self.ledger.detach(key)
        if length is None:
            return
        removed = False
        try:
            await self._remove(key, length)
            removed = True
        except OSError as error:
            self._note_fault(error)
        finally:
            self.ledger.end_removal(key, length, removed=removed)

    async def adopt(self, shelf: DirectoryShelf) -> None:
        """Scan the directory and take over the blocks in it, the best by the policy where they exceed the limits."""
        foreign = 0
        try:
            for folder in await self._call(shelf.folders):
                blocks, others = await self._call(shelf.scan, folder)
                foreign += others
                for key, length in self.ledger.take_over(blocks, unwanted=self._unwanted):
                    try:
                        await self._remove(key, length)
                    except OSError as error:
                        self._note_fault(error)
                        self.ledger.charge(length)
            self.ledger.admitting = True
        except OSError as error:
            # What lies there is not known, so nothing may come to it.
            self._note_fault(error)
        self.scanning = False
        self._unwanted.clear()
        if foreign:
            _log.warning("tier %s: %d files in %s are not blocks and are left alone", self.name, foreign, shelf.path)
        _log.info("tier %s: %d blocks found in %s", self.name, len(self.ledger), shelf.path)

    def begin_scan(self) -> None:
        """Let nothing in until `adopt` has ended."""
        self.scanning = True
        self.ledger.admitting = False

    def stats(self) -> dict[str, Any]:
        """Return settings, fill, counters and the last fault as plain values."""
        ledger = self.ledger
        return {
            "name": self.name,
            "medium": self.medium,
            "policy": self.policy_name,
            "capacity_bytes": ledger.capacity_bytes,
            "used_bytes": ledger.used_bytes,
            "capacity_blocks": None if ledger.capacity_blocks == UNLIMITED_BLOCKS else ledger.capacity_blocks,
            "blocks": ledger.used_blocks,
            **{name: getattr(ledger.counters, name) for name in Counters.__slots__},
            "scanning": self.scanning,
            "fault": self.fault,
        }

    async def _remove(self, key: bytes, length: int) -> None:
        self._written_here.discard(key)
        await self._call(self.shelf.remove, key, length)

    async def _call(self, function: Callable[..., _T], *args: Any) -> _T:
        if self._executor is None:
            return function(*args)
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    def _note_fault(self, error: Exception) -> None:
        self.ledger.counters.errors += 1
        # As text: a kept error would keep its frames, and with them the block's memory.
        text = str(error)
        if self.fault is None:
            _log.warning("tier %s: %s; reads go on without it", self.name, text)
        self.fault = text


def _open_each(shelf: Shelf, wanted: Sequence[Entry]) -> list[Descriptor | OSError | CorruptError]:
    found: list[Descriptor | OSError | CorruptError] = []
    for key, length in wanted:
        try:
            found.append(shelf.open(key, length))
        except (OSError, CorruptError) as error:
            found.append(error)
    return found
