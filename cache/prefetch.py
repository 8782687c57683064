"""Fetching what plans announce, in their order, a window of bytes ahead of the readers.

    plan: | passed | read by workers | on its way or waiting (the window) | known | ...
                                     ^ readers                            ^ cursor

A planned block that no tier holds is fetched when the window has room for it; it is in the window until its reader has
it, or until nobody wants it any more. What no tier keeps waits in the ring, which gives up blocks of the window last
(`Futures.near_use`). What a tier in memory has taken, while it has as much room again, leaves the window at once: it
displaces nothing, and the origin need not idle until its reader comes. What a tier gives up to the ring is in the
window again. Room is used in portions, so that adjacent blocks share a request.

Readers always go first: a fetch ahead of time takes its turn behind all that somebody waits for, and a reader that
comes for a block on its way gives that fetch a reader's turn. When a plan ends or changes, what only it wanted is
cancelled, unless a reader waits for a block of the same request.

Readers that announce nothing are guessed at (`cache.guesses`); a guess is a short plan. What became of prefetching is
counted for each kind of plan.

Everything here is bookkeeping on the event loop, without an await; the engine does the work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from typing import Any, Protocol, get_args

import numpy as np

from cache.block_table import BlockTable
from cache.budget import Errand
from cache.guesses import Guesses
from cache.keys import BlockRef
from cache.origin import Fetch
from cache.plan import Futures, Kind, Planned
from cache.window import Window
from connectors.errors import BadInputError

__all__ = ["MAX_PLANS", "Counts", "Fetcher", "Prefetcher", "Work"]

_log = logging.getLogger(__name__)

MAX_PLANS = 1024
# A quarter of the window at a time: seldom enough that neighbours in the plan go together.
_PORTIONS = 4
# Blocks looked at in one go; the loop has other things to do.
_MAX_LOOKED_AT = 4096
# One guess; all together leave some of the window to what is known.
_GUESS_SHARE = 1 / 8
# What waits in tiers with room, in windows: further ahead than that it only hurries.
_SPARE_WINDOWS = 4


@dataclass(eq=False, slots=True)
class Work:
    """One request ahead of time.

    Attributes:
        fetch: What is asked for.
        errand: Whether somebody waits for it by now.
    """

    fetch: Fetch
    errand: Errand


@dataclass(slots=True)
class Counts:
    """What became of prefetching; in blocks, where the name does not say bytes.

    Attributes:
        issued: Fetched ahead of time.
        issued_bytes: As `issued`.
        useful: There when their reader came.
        late: On their way when their reader came.
        wasted: Given up, passed by or displaced before a reader came.
        failed: Could not be had; their reader asks again, and is told why.
        resident: Planned blocks that needed no fetch: a tier held them, or they were on their way.
    """

    issued: int = 0
    issued_bytes: int = 0
    useful: int = 0
    late: int = 0
    wasted: int = 0
    failed: int = 0
    resident: int = 0


class Fetcher(Protocol):
    """What a prefetcher asks of the engine."""

    def has(self, key: bytes) -> bool:
        """Say whether a tier holds the block or somebody fetches it."""
        ...

    def passes_by(self, key: bytes) -> bool:
        """Say whether only the ring holds the block, so that it stays no longer than the ring has room."""
        ...

    def fetch_ahead(self, wanted: Sequence[tuple[bytes, BlockRef]]) -> list[Work]:
        """Begin to fetch blocks that nobody waits for."""
        ...

    def hurry(self, work: Work) -> None:
        """Somebody waits for it now."""
        ...

    def withdraw(self, work: Work) -> None:
        """Cancel work that nobody waits for."""
        ...

    def rerank(self, keys: Iterable[bytes]) -> None:
        """Plans have changed for these blocks."""
        ...

    def measure(self, uri: str) -> None:
        """Ask the store how long an object is; `Prefetcher.measured` hears the answer, if there is one."""
        ...


class Prefetcher:
    """See the module. Belongs to the event loop's thread.

    Args:
        engine: Does the work.
        futures: The plans; changed through this object only.
        window: How far ahead.
        clock: Seconds that only grow.
        spare_bytes: Gives the room that is left in tiers in memory.
    """

    def __init__(
        self,
        engine: Fetcher,
        *,
        futures: Futures,
        window: Window,
        clock: Callable[[], float],
        spare_bytes: Callable[[], int],
    ) -> None:
        self.counts: dict[Kind, Counts] = {kind: Counts() for kind in get_args(Kind)}
        self._engine = engine
        self._futures = futures
        self._window = window
        self._clock = clock
        self._spare_bytes = spare_bytes
        self._tables: dict[bytes, tuple[BlockTable, int]] = {}
        self._table_of: dict[int, bytes] = {}
        # The window: on their way, there but not read, and in the ring already for another reason or an earlier use.
        self._coming: dict[bytes, tuple[Work, int, Kind]] = {}
        self._ready: dict[bytes, tuple[int, Kind]] = {}
        self._found: dict[bytes, int] = {}
        self._ahead_bytes = 0
        # Blocks of `_ready` that wait in a tier with room, outside the window.
        self._spared: dict[bytes, int] = {}
        self._all_spared_bytes = 0
        self._stopped = False
        self._guesses = Guesses(
            futures,
            has=engine.has,
            measure=engine.measure,
            max_ahead_bytes=int(_GUESS_SHARE * window.max_bytes),
            clock=clock,
        )

    def stop(self) -> None:
        """Begin nothing any more."""
        self._stopped = True

    def table(self, digest: bytes) -> BlockTable | None:
        """Return the table that a plan in use has, so that it need not be sent again."""
        table, _ = self._tables.get(digest, (None, 0))
        return table

    def open(self, digest: bytes, table: BlockTable | None = None, *, job: str = "") -> int:
        """Begin a job's plan over a table, given or known, and return its number. `close` it.

        Raises:
            BadInputError: There are too many plans, or the table is neither given nor known.
        """
        if len(self._table_of) >= MAX_PLANS:
            raise BadInputError(f"there are {MAX_PLANS} plans already")
        known, users = self._tables.get(digest, (table, 0))
        if known is None:
            raise BadInputError("a plan begins with its block table, which nobody has sent yet")
        self._tables[digest] = (known, users + 1)
        number = self._futures.add(known, self._clock(), job)
        self._table_of[number] = digest
        return number

    def extend(self, number: int, blocks: bytes) -> None:
        """Append block numbers (int32, little-endian) to a plan; `BadInputError` as `Futures.extend`."""
        if len(blocks) % 4:
            raise BadInputError(f"block numbers take 4 bytes each, got {len(blocks)} bytes")
        self._engine.rerank(self._futures.extend(number, np.frombuffer(blocks, "<i4")))
        self.pump()

    def advance(self, number: int, position: int) -> None:
        """The reader of a plan has passed all places before `position`; `BadInputError` as `Futures.advance`."""
        passed = self._futures.advance(number, position, self._clock())
        self._engine.rerank(passed)
        self._release(passed)
        self.pump()

    def replace(self, number: int) -> None:
        """Drop what lies ahead in a plan: its reader will do something else."""
        self._drop(self._futures.forget(number))

    def close(self, number: int) -> None:
        """End a plan."""
        self._drop(self._futures.remove(number))
        digest = self._table_of.pop(number)
        table, users = self._tables.pop(digest)
        if users > 1:
            self._tables[digest] = (table, users - 1)

    def demand(self, blocks: Iterable[tuple[bytes, BlockRef]]) -> None:
        """Readers ask for these blocks now. Called before they are looked up."""
        changed: list[bytes] = []
        now_s = self._clock()
        for key, ref in blocks:
            self._meet(key, now_s)
            kind = self._futures.use(key)
            if kind is not None:
                changed.append(key)
                # Wanted again soon, it stays.
                if self._futures.near_use(key) != inf:
                    self._find(key, ref.length)
            if kind != "plan":
                wanted, unwanted = self._guesses.observe(key, ref)
                changed += wanted
                if unwanted:
                    self._let_go(unwanted)
        if changed:
            self._engine.rerank(changed)

    def joined(self, key: bytes) -> None:
        """A reader waits for a block on its way. That may have been begun since its `demand`, and has a reader now."""
        self._meet(key, self._clock())

    def missed(self) -> None:
        """Readers wait for blocks that are not here."""
        self._guesses.missed()

    def nobody_reads(self) -> None:
        """The last reader has gone, so there is nobody to guess for."""
        self._drop(self._guesses.end())

    def measured(self, uri: str, version: str, size_bytes: int) -> None:
        """An object is so long; see `Fetcher.measure`."""
        self._guesses.measured(uri, version, size_bytes)

    def landed(self, work: Work, arrived: Sequence[bool]) -> None:
        """A request has ended; `arrived` says of each of its blocks whether it is there."""
        if all(arrived):
            self._window.fetched(self._clock() - work.errand.granted_s)
        for (key, _), here in zip(work.fetch.blocks, arrived, strict=True):
            if key not in self._coming or self._coming[key][0] is not work:
                continue
            _, size_bytes, kind = self._coming.pop(key)
            if here and self._engine.has(key) and self._futures.near_use(key) != inf:
                self._ready[key] = (size_bytes, kind)
                self._spare(key, size_bytes)
                continue
            self._ahead_bytes -= size_bytes
            if here:
                self.counts[kind].wasted += 1
            else:
                self.counts[kind].failed += 1
        self.pump()

    def passing(self, key: bytes, size_bytes: int) -> None:
        """A block has come into the ring: no tier has taken it, or one has given it up for another."""
        if key in self._spared:
            self._unspare(key)
        elif self._futures.near_use(key) != inf:
            self._take_in(key, size_bytes)

    def pump(self) -> None:
        """Fetch what the window has room for."""
        if self._stopped or not self._futures:
            return
        room_bytes = self._window.size_bytes - self._ahead_bytes
        if room_bytes < self._window.size_bytes // _PORTIONS:
            return
        wanted: dict[bytes, Planned] = {}
        passed: list[bytes] = []
        for _ in range(_MAX_LOOKED_AT):
            planned = self._futures.peek()
            if planned is None:
                break
            key, size_bytes = planned.key, planned.ref.length
            if key in wanted or self._engine.has(key):
                self.counts[planned.kind].resident += 1
                if self._find(key, size_bytes):
                    room_bytes -= size_bytes
            elif size_bytes <= self._window.size_bytes:
                if size_bytes > room_bytes:
                    break
                wanted[key] = planned
                room_bytes -= size_bytes
            self._futures.take()
            passed.append(key)
        # What is held for long already is now held for a use that is near.
        self._engine.rerank(passed)
        if wanted:
            self._begin(wanted)

    def stats(self) -> dict[str, Any]:
        """Return counters, of all kinds together and of each, and the window as plain values."""
        by_kind = {kind: asdict(counts) for kind, counts in self.counts.items()}
        return {
            **{name: sum(counts[name] for counts in by_kind.values()) for name in by_kind["plan"]},
            "plans": len(self._table_of),
            "window_bytes": self._window.size_bytes,
            "ahead_bytes": self._ahead_bytes,
            "rate_bytes_s": round(self._window.rate_bytes_s),
            "latency_s": round(self._window.latency_s, 6),
            "kinds": by_kind,
        }

    def _meet(self, key: bytes, now_s: float) -> None:
        """A reader comes for a block; if it is in the window, it leaves that now."""
        if key in self._ready:
            size_bytes, kind = self._ready.pop(key)
            self._unspare(key)
            if self._engine.has(key):
                self.counts[kind].useful += 1
                self._window.came_in_time(size_bytes)
            else:
                self.counts[kind].wasted += 1
        elif key in self._coming:
            work, size_bytes, kind = self._coming.pop(key)
            self.counts[kind].late += 1
            self._window.came_late(now_s)
            self._engine.hurry(work)
        elif key in self._found:
            size_bytes = self._found.pop(key)
        else:
            return
        self._ahead_bytes -= size_bytes
        self._window.taken(size_bytes, now_s)

    def _find(self, key: bytes, size_bytes: int) -> bool:
        """Take into the window what waits in the ring without having been fetched for that; say whether it did."""
        return self._engine.passes_by(key) and self._take_in(key, size_bytes)

    def _take_in(self, key: bytes, size_bytes: int) -> bool:
        if key in self._coming or key in self._ready or key in self._found:
            return False
        self._found[key] = size_bytes
        self._ahead_bytes += size_bytes
        return True

    def _begin(self, wanted: Mapping[bytes, Planned]) -> None:
        self._guesses.missed()
        for work in self._engine.fetch_ahead([(key, planned.ref) for key, planned in wanted.items()]):
            for key, ref in work.fetch.blocks:
                # It may have been there for another plan, and left before its reader came.
                self._leave(key)
                kind = wanted[key].kind
                self._coming[key] = (work, ref.length, kind)
                self._ahead_bytes += ref.length
                self.counts[kind].issued += 1
                self.counts[kind].issued_bytes += ref.length

    def _drop(self, keys: Sequence[bytes]) -> None:
        """A plan does not want these blocks any more."""
        self._let_go(keys)
        self.pump()

    def _let_go(self, keys: Sequence[bytes]) -> None:
        self._engine.rerank(keys)
        for work in {self._coming[key][0]: None for key in keys if key in self._coming}:
            wanted = any(self._futures.near_use(key) != inf for key, _ in work.fetch.blocks)
            if not wanted and not work.errand.awaited:
                self._withdraw(work)
        self._release(keys)

    def _withdraw(self, work: Work) -> None:
        for key, _ in work.fetch.blocks:
            _, size_bytes, kind = self._coming.pop(key)
            self._ahead_bytes -= size_bytes
            self.counts[kind].wasted += 1
        self._engine.withdraw(work)

    def _release(self, keys: Iterable[bytes]) -> None:
        """Let blocks that nobody wants soon, and that nobody read, out of the window."""
        for key in keys:
            if self._futures.near_use(key) == inf:
                self._leave(key)

    def _spare(self, key: bytes, size_bytes: int) -> None:
        """Let a block that has arrived out of the window, though nobody read it, where a tier has room for it."""
        limit_bytes = min(self._spare_bytes(), _SPARE_WINDOWS * self._window.size_bytes)
        if self._all_spared_bytes + size_bytes <= limit_bytes and not self._engine.passes_by(key):
            self._spared[key] = size_bytes
            self._all_spared_bytes += size_bytes
            self._ahead_bytes -= size_bytes

    def _unspare(self, key: bytes) -> None:
        """Count a block in the window again, as all others are that leave it."""
        size_bytes = self._spared.pop(key, 0)
        self._all_spared_bytes -= size_bytes
        self._ahead_bytes += size_bytes

    def _leave(self, key: bytes) -> None:
        """Let a block that nobody read out of the window, if it is there."""
        if key in self._ready:
            size_bytes, kind = self._ready.pop(key)
            self._unspare(key)
            self._ahead_bytes -= size_bytes
            self.counts[kind].wasted += 1
        elif key in self._found:
            self._ahead_bytes -= self._found.pop(key)
