"""An order that comes again, epoch by epoch, found in a stream of reads alone. Pure.

Of every block it is known at which place of the stream it was read last. In a repeated order the block that is read
next was read last a little behind the one before it; "a little", because several readers overtake each other. How often
that was so, lately, is the trust in the order: it has to be earned, and reads in random order do not.
"""

from __future__ import annotations

import sys

from cache.keys import BlockRef

__all__ = ["Laps"]

_MAX_BLOCKS = 1 << 16
_SLACK = 32
_MEMORY = 1 / 32
_TRUSTED = 0.8
_DISTRUSTED = 0.5


class Laps:
    """The last reads, up to `max_blocks` of them; datasets of more blocks are not followed.

    A block takes some 350 bytes the first time, and next to nothing each further time.

    Attributes:
        trusted: Whether what comes is what came the last time.
        front: The place, in the lap before, of the read that goes farthest.
    """

    def __init__(self, *, max_blocks: int = _MAX_BLOCKS) -> None:
        self.trusted = False
        self.front = 0
        self._max_blocks = max_blocks
        # By place modulo `max_blocks`.
        self._reads: list[tuple[bytes, BlockRef]] = []
        self._end = 0
        self._place: dict[bytes, int] = {}
        self._trust = 0.0

    def __len__(self) -> int:
        """Blocks whose last read is known."""
        return len(self._place)

    def observe(self, key: bytes, ref: BlockRef) -> None:
        """Take note of a read."""
        before = self._place.get(key)
        # In a small dataset a little behind must not be half of it.
        slack = min(_SLACK, len(self._place) // 16)
        fits = before is not None and self.front - slack <= before <= self.front + slack + 1
        self._trust += _MEMORY * (fits - self._trust)
        self.trusted = self._trust > (_DISTRUSTED if self.trusted else _TRUSTED)
        if before is not None and not (fits and before < self.front):
            # Where there is no order to follow yet, any place may be its beginning.
            self.front = before if fits or not self.trusted else self.front
        place, self._end = self._end, self._end + 1
        # Each reader has strings of its own for the same names, which must not all be held.
        read = (key, _share_names(ref)) if before is None else self._reads[before % self._max_blocks]
        if place < self._max_blocks:
            self._reads.append(read)
        else:
            oldest, _ = self._reads[place % self._max_blocks]
            if self._place[oldest] == place - self._max_blocks:
                del self._place[oldest]
            self._reads[place % self._max_blocks] = read
        self._place[read[0]] = place

    def after(self, place: int, count: int) -> list[tuple[int, bytes, BlockRef]]:
        """Return at most `count` of the blocks that were read behind a place and not since then, with their places."""
        found: list[tuple[int, bytes, BlockRef]] = []
        for later in range(max(self._end - self._max_blocks, place + 1), min(self._end, place + 1 + count)):
            key, ref = self._reads[later % self._max_blocks]
            if self._place[key] == later:
                found.append((later, key, ref))
        return found


def _share_names(ref: BlockRef) -> BlockRef:
    return BlockRef(sys.intern(ref.uri), sys.intern(ref.version), ref.offset, ref.length, ref.crc32c)
