"""A tier: a ledger over a shelf.

The ledger decides, on the event loop and without an await in between; only the blocking calls on a directory run in
threads. A kill at any point leaves on the medium at most what the ledger had charged.

A disk that fails takes nothing from its readers: what it cannot give they find elsewhere, what it cannot take goes on
to the next tier, and when it fails often it is left alone (`cache.disk`). What it held is held again once it is back.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from cache.catalogue import Catalogue
from cache.config import Medium
from cache.directory_shelf import DirectoryShelf, LeftBehindError
from cache.disk import DiskState
from cache.disk_calls import FULL, DiskCalls
from cache.handle import Block, Descriptor, Handle
from cache.ledger import UNLIMITED_BLOCKS, Counters, Entry, Ledger, Reservation
from cache.pins import PinSet
from cache.policy import Guarded, Policy
from cache.shelf import Shelf, open_each
from connectors.errors import BadInputError, CorruptError, PermissionDeniedError

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
        calls: Threads for the shelf's calls, owned; None where they never block.
        catalogue: Takes what a directory knows of its blocks, and its pins.

    Attributes:
        guard: The policy, where pins and quotas are around it.
        ledger: What the tier holds.
        scanning: A directory is not yet known: blocks are looked for by name, and none is let in.
        fault: The last failure of the medium, None once a write succeeds, or probes made an ill disk normal.
        start: Runs what goes on when nobody waits for it.
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
        calls: DiskCalls | None,
        catalogue: Catalogue | None = None,
    ) -> None:
        self.name = name
        self.medium = medium
        self.policy_name = policy_name
        self.shelf = shelf
        self.guard = policy if isinstance(policy, Guarded) else None
        self.ledger = Ledger(
            policy=policy,
            cost_bytes=shelf.cost_bytes,
            capacity_bytes=capacity_bytes,
            capacity_blocks=capacity_blocks,
            max_queued_bytes=max_queued_bytes,
            accounts_of=(lambda _key: ()) if self.guard is None else self.guard.accounts,
        )
        self.in_memory = calls is None
        self.scanning = False
        self.fault: str | None = None
        self.start: Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]] = asyncio.create_task
        self._calls = calls
        self._catalogue = catalogue
        self._rewriting = False
        self._adopting: asyncio.Task[None] | None = None
        # Whether all that lies on the medium is known, so that something may come to it.
        self._known = True
        # Blocks of a RAM directory that this process wrote itself need no second look.
        self._written_here: set[bytes] = set()
        # Dropped before the scan came to them; they are removed when it does.
        self._unwanted: set[bytes] = set()
        # As of the shelf, when its directory was scanned.
        self._changes = 0
        self._was_well = True
        if calls is not None and isinstance(shelf, DirectoryShelf):
            calls.attach(probe=shelf.probe, on_change=self._follow)

    async def open(self) -> None:
        """Take a directory; it is scanned behind. Where the disk gives it later, or never, the tier does without.

        Raises:
            BadInputError: The path is no directory, or another process serves it.
            PermissionDeniedError: It cannot be written.
        """
        shelf, calls = self.shelf, self._calls
        if calls is None or not isinstance(shelf, DirectoryShelf):
            return
        self._known, self.ledger.admission = False, "closed"
        try:
            await calls.call_for_reader(shelf.lock)
        except PermissionError as error:
            raise PermissionDeniedError(f"tier {self.name}: cannot write {shelf.path}: {error}") from error
        except (FileExistsError, NotADirectoryError) as error:
            raise BadInputError(f"tier {self.name}: {shelf.path} is not a directory: {error}") from error
        except OSError as error:
            self.fault = str(error)
            calls.distrust(f"{shelf.path} cannot be opened: {error}")
        else:
            self._scan()

    async def scanned(self) -> None:
        """Wait until a scan that has begun has ended, or the disk is found not to answer."""
        calls = self._calls
        while self.scanning and self._adopting is not None and calls is not None and calls.health.readable:
            await calls.patient(self._adopting)

    async def close(self, timeout_s: float) -> bool:
        """Let go of the shelf; False where a thread may still write there, so that its lock stays ours."""
        if self._calls is not None and not await self._calls.close(timeout_s):
            return False
        self.shelf.close()
        return True

    @property
    def well(self) -> bool:
        """Whether nothing ails the disk, other than being full or slow."""
        return self._calls is None or self._calls.health.state is DiskState.NORMAL

    def holds(self, key: bytes) -> bool:
        """Say whether the block is here and can be read."""
        return self.ledger.holds(key) and (self._calls is None or self._calls.health.readable)

    def may_hold(self, key: bytes) -> bool:
        """Say whether a scan under way may still come to the block."""
        return self.scanning and key not in self._unwanted and (self._calls is None or self._calls.health.readable)

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
        assert self._calls is not None
        try:
            found = await self._calls.call_for_reader(open_each, self.shelf, wanted, self._calls.progress)
        except TimeoutError:
            return [None] * len(wanted)
        results: list[Descriptor | None] = []
        for (key, _), file in zip(wanted, found, strict=True):
            if isinstance(file, Descriptor):
                self._calls.read()
                results.append(file)
            elif isinstance(file, OSError) and file.errno in _NO_DESCRIPTORS:
                raise file
            else:
                await self.drop(key, file)
                results.append(None)
        return results

    async def read(self, key: bytes, length: int) -> Block | None:
        """Return a block as memory; None where it cannot be had, and a broken one is dropped."""
        if self._calls is None:
            return self.shelf.read(key, length)
        try:
            return await self._calls.call_for_reader(self.shelf.read, key, length)
        except TimeoutError:
            return None
        except (OSError, CorruptError) as error:
            if not (isinstance(error, OSError) and error.errno in _NO_DESCRIPTORS):
                await self.drop(key, error)
            return None

    async def check(self, key: bytes, length: int) -> None:
        """Read a block that somebody found to be wrong: `read` drops it if so. Nobody's word alone removes anything."""
        # Memory is sealed, and nothing came into it unchecked.
        if not self.in_memory and (self.holds(key) or self.may_hold(key)):
            await self.read(key, length)

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
                await self._remove(key, length)
                self.ledger.hide(key)
                removed.append((key, length))
        except OSError as error:
            self._note_fault(error, writing=True)
            self.ledger.give_up(reservation, removed)
            return False
        except BaseException:
            self.ledger.give_up(reservation, removed)
            raise
        self.ledger.settle(reservation)
        try:
            await self._call(self.shelf.write, block)
        except OSError as error:
            self._note_fault(error, writing=True)
            self.ledger.abandon(reservation, left_behind=isinstance(error, LeftBehindError))
            if error.errno in FULL:
                self.ledger.squeeze()
            return False
        except BaseException:
            # What that has left there nobody knows.
            self.ledger.abandon(reservation, left_behind=True)
            raise
        self.ledger.commit(reservation)
        if self.medium == "ram":
            self._written_here.add(block.key)
        self.fault = None
        if self._calls is not None:
            self._calls.written(more=self.ledger.stretched)
        self._tend_journal()
        return True

    async def resize(
        self,
        capacity_bytes: int,
        capacity_blocks: int,
        *,
        wanted: Callable[[bytes, int], bool],
        pass_on: Callable[[Block], None],
    ) -> bool:
        """Set new limits and evict what exceeds them, as the policy likes; `wanted` and `pass_on` as for `store`.

        The old limits sink with what is evicted, so what is held never exceeds those in force.

        Returns:
            Whether the new ones are in force. If not, a block is coming in or cannot be removed, or the disk is ill.
        """
        ledger = self.ledger
        ledger.resize(capacity_bytes, capacity_blocks)
        while self.well and (victims := ledger.surplus()):
            for key, length in victims:
                if self.well and ledger.begin_eviction(key) is not None:
                    await self._patiently(self._evict(key, length, wanted, pass_on))
        return ledger.resized

    async def evict(self, key: bytes) -> bool:
        """Remove a block that is not to be kept any more; False where there is none, or it stays on the medium."""
        if self.scanning:
            self._unwanted.add(key)
        # What a disk that is left alone holds stays held, and can be removed when it is back.
        length = self.ledger.begin_eviction(key) if self.holds(key) else None
        if length is None:
            return False
        return await self._patiently(self._evict(key, length, lambda _key, _length: False, lambda _block: None))

    async def keep_pins(self, pins: PinSet) -> bool:
        """Write the pins down, so that the next server finds them; False where that cannot be."""
        shelf = self.shelf
        # What nobody has read yet would be overruled by what is written behind it.
        if self._calls is None or not isinstance(shelf, DirectoryShelf) or not self._known:
            return False
        try:
            await self._calls.call_for_reader(shelf.keep_pins, pins)
        except OSError as error:
            self._note_fault(error, writing=True)
            return False
        self._tend_journal()
        return True

    async def _evict(
        self, key: bytes, length: int, wanted: Callable[[bytes, int], bool], pass_on: Callable[[Block], None]
    ) -> bool:
        removed = False
        try:
            if wanted(key, length):
                victim = await self.read(key, length)
                if victim is not None and self.ledger.holds(key):
                    pass_on(victim)
            # From here on it is found where it went.
            self.ledger.hide(key)
            await self._remove(key, length)
            removed = True
        except OSError as error:
            self._note_fault(error, writing=True)
        finally:
            self.ledger.end_eviction(key, length, removed=removed)
        return removed

    async def _patiently(self, removal: Coroutine[Any, Any, bool]) -> bool:
        """Wait for a removal, which goes on without who asked, but not for a disk that does not answer."""
        if self._calls is None:
            return await removal
        await self._calls.patient(task := self.start(removal))
        return task.done() and task.result()

    async def drop(self, key: bytes, reason: Exception) -> None:
        """Remove a block that is wrong or cannot be read; the next reader fetches it again."""
        if self.scanning:
            self._unwanted.add(key)
        elif not self.ledger.holds(key):
            return
        if isinstance(reason, CorruptError):
            self.ledger.counters.corrupt += 1
            _log.warning("tier %s drops a bad block: %s", self.name, str(reason))
        elif isinstance(reason, OSError) and not isinstance(reason, FileNotFoundError):
            self._note_fault(reason, writing=False)
        length = self.ledger.detach(key)
        if length is not None:
            # A reader may be waiting here.
            await self._patiently(self._finish_removal(key, length))

    async def _finish_removal(self, key: bytes, length: int) -> bool:
        removed = False
        try:
            await self._remove(key, length)
            removed = True
        except OSError as error:
            self._note_fault(error, writing=True)
        finally:
            self.ledger.end_removal(key, length, removed=removed)
        return removed

    def _scan(self) -> None:
        assert isinstance(self.shelf, DirectoryShelf)
        self.scanning = True
        self._adopting = self.start(self._adopt(self.shelf))

    async def _adopt(self, shelf: DirectoryShelf) -> None:
        """Scan the directory and take over the blocks in it, the best by the policy where they exceed the limits."""
        foreign = 0
        try:
            labels, pins = await self._call(shelf.journal.load)
            if self._catalogue is not None:
                self._catalogue.restore(pins)
            for folder in await self._call(shelf.folders):
                blocks, others = await self._call(shelf.scan, folder)
                foreign += others
                if self._catalogue is not None:
                    self._catalogue.adopt(labels, [key for key, _ in blocks])
                for key, length in self.ledger.take_over(blocks, unwanted=self._unwanted):
                    try:
                        await self._remove(key, length)
                    except OSError as error:
                        self._note_fault(error, writing=True)
                        self.ledger.cannot_remove(key, length)
            self._known = True
            if self._catalogue is not None and self._catalogue.pins.current.generation > pins.generation:
                await self.keep_pins(self._catalogue.pins.current)
            _log.info("tier %s: %d blocks found in %s", self.name, len(self.ledger), shelf.path)
        except Exception as error:  # noqa: BLE001  a scan that ended without a word would close the tier for good
            # What lies there is not known, so nothing may come to it; it is scanned again when the disk is well.
            if isinstance(error, OSError):
                self._note_fault(error, writing=False)
            else:
                _log.exception("tier %s: the scan of %s failed in an unknown way", self.name, shelf.path)
            if self._calls is not None:
                self._calls.distrust(f"{shelf.path} cannot be listed: {error}")
        self.scanning = False
        self._unwanted.clear()
        self._follow()
        if foreign:
            _log.warning("tier %s: %d files in %s are not blocks and are left alone", self.name, foreign, shelf.path)
        self._tend_journal()

    def _tend_journal(self) -> None:
        """Have the journal written anew where most of it is about blocks that are gone."""
        shelf = self.shelf
        if not isinstance(shelf, DirectoryShelf) or self._rewriting or not self._known:
            return
        if shelf.journal.overgrown(len(self.ledger)):
            self._rewriting = True
            self.start(self._rewrite_journal(shelf))

    async def _rewrite_journal(self, shelf: DirectoryShelf) -> None:
        try:
            # What is still on its way has its label in there already, and is known.
            await self._call(shelf.journal.rewrite, self.ledger.knows)
        except OSError as error:
            self._note_fault(error, writing=True)
        finally:
            self._rewriting = False

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
            "fault": self.fault or (None if self._calls is None else self._calls.health.ailment),
            **({} if self._calls is None else self._calls.stats()),
            **({} if self.guard is None else self.guard.stats()),
            **({"path": self.shelf.path} if isinstance(self.shelf, DirectoryShelf) else {}),
        }

    def _follow(self) -> None:
        """Do what the state of the disk says."""
        assert self._calls is not None
        assert isinstance(self.shelf, DirectoryShelf)
        if self._changes != self.shelf.changes and not self.scanning:
            # Another directory has the name, or this one was away; what was held went with it.
            self._changes = self.shelf.changes
            self._known, self.ledger.admission = False, "closed"
            self._written_here.clear()
            self.ledger.forget()
        if self.well and not self._was_well:
            self.fault = None
        self._was_well = self.well
        if self._known:
            self.ledger.admission = self._calls.health.admission(time.monotonic())
        elif not self.scanning and self.shelf.locked and self.well:
            self._scan()

    async def _remove(self, key: bytes, length: int) -> None:
        self._written_here.discard(key)
        await self._call(self.shelf.remove, key, length)

    async def _call(self, function: Callable[..., _T], *args: Any) -> _T:
        return function(*args) if self._calls is None else await self._calls.call(function, *args)

    def _note_fault(self, error: OSError, *, writing: bool) -> None:
        self.ledger.counters.errors += 1
        # What this process lacks is no fault of the disk.
        if self._calls is not None and error.errno not in _NO_DESCRIPTORS:
            self._calls.failed(error, writing=writing, more=self.ledger.stretched)
        # As text: a kept error would keep its frames, and with them the block's memory.
        text = str(error)
        # That a disk is full is said once, not after each block that came in the place of another.
        if self.fault is None and not (writing and error.errno in FULL):
            _log.warning("tier %s: %s; reads go on without it", self.name, text)
        self.fault = text
