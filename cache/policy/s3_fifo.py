"""S3-FIFO: for access where few blocks are asked for again and again.

A newcomer waits in a small queue; only what is hit there comes into the main queue, so blocks that are read once pass
through without displacing what is in demand. A block that left the small queue and comes back within the memory of the
ghost queue goes to the main queue at once (J. Yang et al., "FIFO queues are all you need for cache eviction",
SOSP 2023, algorithm 1).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from itertools import chain

__all__ = ["S3Fifo"]

_SMALL_SHARE = 0.1
_MAX_HITS = 3
# Hits in the small queue that bring a block into the main queue.
_PROMOTING_HITS = 2


class S3Fifo:
    """See `cache.policy.Policy`. O(1) a call, but `admit`, which takes up to four steps for each block held."""

    def __init__(self) -> None:
        self._sizes: dict[bytes, int] = {}
        self._hits: dict[bytes, int] = {}
        self._small: OrderedDict[bytes, None] = OrderedDict()
        self._main: OrderedDict[bytes, None] = OrderedDict()
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()
        self._bytes = 0
        self._small_bytes = 0
        # What the search for victims passed over, and which newcomer it was for: done when that one comes in.
        self._passed: tuple[bytes, list[bytes]] = (b"", [])

    def admit(self, key: bytes, size_bytes: int, *, free_bytes: int, free_blocks: int) -> list[bytes] | None:
        """Displace from the small queue while it has more than its share, else from the main queue."""
        capacity_bytes = self._bytes + free_bytes
        if size_bytes > capacity_bytes:
            return None
        small, small_bytes = iter(self._small), self._small_bytes
        again: deque[tuple[bytes, int]] = deque()
        main = chain(((held, self._hits[held]) for held in self._main), _drain(again))
        victims: list[bytes] = []
        passed: list[bytes] = []
        while size_bytes > free_bytes or free_blocks < 1:
            victim: bytes | None = None
            if small_bytes > _SMALL_SHARE * capacity_bytes and (held := next(small, None)) is not None:
                small_bytes -= self._sizes[held]
                if self._hits[held] >= _PROMOTING_HITS:
                    again.append((held, 0))
                    passed.append(held)
                else:
                    victim = held
            elif (entry := next(main, None)) is not None:
                held, hits = entry
                if hits:
                    again.append((held, hits - 1))
                    passed.append(held)
                else:
                    victim = held
            elif (held := next(small, None)) is not None:
                small_bytes -= self._sizes[held]
                victim = held
            else:
                return None
            if victim is not None:
                victims.append(victim)
                free_bytes += self._sizes[victim]
                free_blocks += 1
        self._passed = (key, passed)
        return victims

    def insert(self, key: bytes, size_bytes: int) -> None:
        """See `Policy.insert`."""
        searched_for, passed = self._passed
        if searched_for == key:
            self._pass_over(passed)
            self._passed = (b"", [])
        self._sizes[key] = size_bytes
        self._hits[key] = 0
        self._bytes += size_bytes
        if key in self._ghosts:
            del self._ghosts[key]
            self._main[key] = None
        else:
            self._small[key] = None
            self._small_bytes += size_bytes

    def touch(self, key: bytes) -> None:
        """Count the hit."""
        if key in self._sizes:
            self._hits[key] = min(_MAX_HITS, self._hits[key] + 1)

    def remove(self, key: bytes) -> None:
        """See `Policy.remove`."""
        size_bytes = self._sizes.pop(key, None)
        if size_bytes is None:
            return
        del self._hits[key]
        self._bytes -= size_bytes
        if key in self._main:
            del self._main[key]
            return
        del self._small[key]
        self._small_bytes -= size_bytes
        self._ghosts[key] = None
        while len(self._ghosts) > len(self._sizes):
            self._ghosts.popitem(last=False)

    def leaving(self) -> Iterator[bytes]:
        """See `Policy.leaving`."""
        return chain(self._small, sorted(self._main, key=self._hits.__getitem__))

    def _pass_over(self, keys: list[bytes]) -> None:
        for key in keys:
            if key in self._main:
                self._hits[key] = max(0, self._hits[key] - 1)
                self._main.move_to_end(key)
            elif key in self._small:
                del self._small[key]
                self._small_bytes -= self._sizes[key]
                self._hits[key] = 0
                self._main[key] = None


def _drain(entries: deque[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    while entries:
        yield entries.popleft()
