"""Belady's rule: whoever is wanted again last, leaves first.

With the exact next use of every block this is optimal for blocks of one size (L. A. Belady, "A study of replacement
algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966). What nobody has announced is wanted
"never", and among such blocks a second rule decides: the ring is an LRU for them, a tier keeps the lowest keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import takewhile
from typing import Literal, TypeAlias

from sortedcontainers import SortedList

from cache.policy.victims import first_enough

__all__ = ["NextUse"]

_Rank: TypeAlias = tuple[float, int, bytes]


class NextUse:
    """See `cache.policy.Policy`. O(log n) a call, plus one step for each block displaced.

    Args:
        next_use: The moment when a block is wanted next, on any clock; infinity where nobody said. Asked when the block
            comes in or is hit, and for the keys given to `rerank`.
        otherwise: Who stays among blocks that nobody has announced: `recent` or `lowest_key`.
    """

    def __init__(
        self, next_use: Callable[[bytes], float], *, otherwise: Literal["recent", "lowest_key"] = "lowest_key"
    ) -> None:
        self._next_use = next_use
        self._by_recency = otherwise == "recent"
        self._hits = 0
        self._sizes: dict[bytes, int] = {}
        self._ranks: dict[bytes, _Rank] = {}
        # The last one leaves first.
        self._order: SortedList[_Rank] = SortedList()

    def admit(self, key: bytes, size_bytes: int, *, free_bytes: int, free_blocks: int) -> list[bytes] | None:
        """Displace those wanted last, as few as needed, but none that is wanted before `key`."""
        own = self._rank(key)
        later = (rank[2] for rank in takewhile(lambda rank: rank >= own, reversed(self._order)))
        return first_enough(later, self._sizes, size_bytes, free_bytes=free_bytes, free_blocks=free_blocks)

    def insert(self, key: bytes, size_bytes: int) -> None:
        """See `Policy.insert`."""
        self._sizes[key] = size_bytes
        self._hits += 1
        self._place(key)

    def touch(self, key: bytes) -> None:
        """Ask again when the block is wanted; where nobody says, it is now the most recently used."""
        if key in self._sizes:
            self._hits += 1
            self._place(key)

    def remove(self, key: bytes) -> None:
        """See `Policy.remove`."""
        if self._sizes.pop(key, None) is not None:
            self._order.remove(self._ranks.pop(key))

    def leaving(self) -> Iterator[bytes]:
        """See `Policy.leaving`."""
        return (rank[2] for rank in reversed(self._order))

    def rerank(self, keys: Iterable[bytes]) -> None:
        """Ask again when these blocks are wanted, because plans have changed; unknown keys are ignored."""
        for key in keys:
            rank = self._ranks.get(key)
            if rank is not None and rank[0] != (use := self._next_use(key)):
                self._order.remove(rank)
                self._ranks[key] = rank = (use, rank[1], key)
                self._order.add(rank)

    def _rank(self, key: bytes) -> _Rank:
        return (self._next_use(key), -self._hits - 1 if self._by_recency else 0, key)

    def _place(self, key: bytes) -> None:
        before = self._ranks.get(key)
        if before is not None:
            self._order.remove(before)
        use = self._next_use(key)
        self._ranks[key] = rank = (use, -self._hits if self._by_recency else 0, key)
        self._order.add(rank)
