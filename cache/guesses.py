"""Plans for readers that announce nothing: what they will read, guessed from what they have read.

Three kinds: a walk through an object goes on (`sequential`, `strided`; `cache.walks`), and an order comes again
(`repeated`; `cache.laps`). Each guess is a plan like any other, only short: it grows with the steps that it was right,
and ends when its reader goes another way. Reads in random order give none.

A walk can be followed only where the store's version names the object, since the checksums of blocks that nobody has
asked for are not known; how long the object is, the store is asked once, when a block of the walk is not here: where
all of them are, nothing is to be fetched, and the store is left alone.

Where a whole lap found all of its blocks here, there is nothing to guess for, and looking for patterns would be half of
what a warm read costs the server. So guesses rest, and go on from what they remember when a block is missed.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from cache.keys import BlockRef, block_key
from cache.laps import Laps
from cache.plan import Futures, Planned
from cache.walks import Walk, Walks

__all__ = ["Guesses"]

# Walks followed at a time, and how far ahead of its reader a guess goes.
_MAX_FOLLOWED = 4
_MAX_AHEAD = 64
_MAX_SIZES = 256
# Reads without a miss after which guesses rest, where a lap is not longer.
_PEACE_READS = 1024


@dataclass(slots=True)
class _Followed:
    """The plan of a walk: its number, the steps it has passed, and the last offset in it."""

    number: int
    position: int
    until: int


class Guesses:
    """Belongs to the event loop's thread.

    Args:
        futures: Where the plans stand.
        has: Says whether a block is here or on its way.
        measure: Asks how long an object is; `measured` is called with the answer.
        max_ahead_bytes: How far ahead of its reader one guess goes at most.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        futures: Futures,
        *,
        has: Callable[[bytes], bool],
        measure: Callable[[str], None],
        max_ahead_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        self._futures = futures
        self._has = has
        self._measure = measure
        self._max_ahead_bytes = max_ahead_bytes
        self._clock = clock
        self._walks = Walks()
        self._followed: dict[Walk, _Followed] = {}
        # Version and size by URI; None while the answer is not there.
        self._sizes: OrderedDict[str, tuple[str, int] | None] = OrderedDict()
        self._laps = Laps()
        self._last: bytes | None = None
        self._reads_in_peace = 0
        # The plan of the repeated order, and the place in the lap before of each of its blocks to come.
        self._lap: int | None = None
        self._lap_places: deque[int] = deque()
        self._lap_position = 0
        self._lap_end = 0

    def observe(self, key: bytes, ref: BlockRef) -> tuple[list[bytes], list[bytes]]:
        """Take note of a read that nobody announced.

        Returns:
            The blocks that are guessed from now on, and those that are not any more.
        """
        wanted: list[bytes] = []
        unwanted: list[bytes] = []
        if self._reads_in_peace > max(_PEACE_READS, len(self._laps)):
            return wanted, self.end()
        self._reads_in_peace += 1
        # Another sample of the block that was read last says nothing of the way.
        if not self._max_ahead_bytes or key == self._last:
            return wanted, unwanted
        self._last = key
        if ref.crc32c is None:
            walk = self._walks.observe(ref)
            for gone in self._walks.ended:
                unwanted += self._leave(gone)
            self._walks.ended.clear()
            if walk is not None:
                self._follow(walk, key, wanted, unwanted)
        self._laps.observe(key, ref)
        self._go_round(ref.length, wanted, unwanted)
        return wanted, unwanted

    def missed(self) -> None:
        """A block was not here when its reader came, or was not before it was guessed."""
        self._reads_in_peace = 0

    def measured(self, uri: str, version: str, size_bytes: int) -> None:
        """An object is so long."""
        if uri in self._sizes:  # else so many were asked for meanwhile that it is forgotten
            self._sizes[uri] = (version, size_bytes)

    def end(self) -> list[bytes]:
        """Nobody reads now. Returns the blocks that are not guessed any more; what was seen is remembered."""
        unwanted = [key for walk in list(self._followed) for key in self._leave(walk)]
        if self._lap is not None:
            unwanted += self._futures.remove(self._lap)
            self._lap = None
        return unwanted

    def _follow(self, walk: Walk, key: bytes, wanted: list[bytes], unwanted: list[bytes]) -> None:
        ref = walk.ref
        size_bytes = self._size_of(ref, key)
        ahead = min(walk.seen, self._most_blocks(ref.length))
        if size_bytes is None or not ahead:
            return
        followed = self._followed.get(walk)
        if followed is None:
            if len(self._followed) == _MAX_FOLLOWED:
                return
            followed = _Followed(self._futures.guess(walk.kind, self._clock()), 0, ref.offset)
            self._followed[walk] = followed
        elif ref.offset > followed.until:
            unwanted += self._leave(walk)
            return
        else:
            followed.position += 1
            unwanted += self._futures.advance(followed.number, followed.position, self._clock())
        coming = [other for other in walk.ahead(ahead, size_bytes) if other.offset > followed.until]
        if coming:
            followed.until = coming[-1].offset
            blocks = [Planned(block_key(other), other, walk.kind) for other in coming]
            wanted += self._futures.append(followed.number, blocks)
        elif followed.until == ref.offset:
            unwanted += self._leave(walk)  # at its end

    def _leave(self, walk: Walk) -> list[bytes]:
        followed = self._followed.pop(walk, None)
        return [] if followed is None else self._futures.remove(followed.number)

    def _size_of(self, ref: BlockRef, key: bytes) -> int | None:
        if ref.uri not in self._sizes:
            if self._has(key):
                return None
            self._sizes[ref.uri] = None
            if len(self._sizes) > _MAX_SIZES:
                self._sizes.popitem(last=False)
            self._measure(ref.uri)
        known = self._sizes[ref.uri]
        if known is None:
            return None
        if known[0] != ref.version:
            del self._sizes[ref.uri]  # replaced meanwhile; the next read asks again
            return None
        return known[1]

    def _go_round(self, length: int, wanted: list[bytes], unwanted: list[bytes]) -> None:
        laps = self._laps
        if not laps.trusted:
            if self._lap is not None:
                unwanted += self._futures.remove(self._lap)
                self._lap = None
            return
        if self._lap is None:
            self._lap = self._futures.guess("repeated", self._clock())
            self._lap_places.clear()
            self._lap_position, self._lap_end = 0, laps.front
        # Readers overtake each other, so a block is passed only when it lies well behind.
        while self._lap_places and self._lap_places[0] < laps.front - _MAX_AHEAD:
            self._lap_places.popleft()
            self._lap_position += 1
        unwanted += self._futures.advance(self._lap, self._lap_position, self._clock())
        self._lap_end = max(self._lap_end, laps.front)
        coming = laps.after(self._lap_end, laps.front + self._most_blocks(length) - self._lap_end)
        if coming:
            self._lap_end = coming[-1][0]
            self._lap_places += [place for place, _, _ in coming]
            wanted += self._futures.append(self._lap, [Planned(key, ref, "repeated") for _, key, ref in coming])

    def _most_blocks(self, length: int) -> int:
        return min(_MAX_AHEAD, self._max_ahead_bytes // max(1, length))
