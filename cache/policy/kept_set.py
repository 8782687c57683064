"""The kept set: the blocks with the lowest keys stay.

When every block is read once an epoch in a fresh random order, no policy hits more than capacity / dataset, and
filling once and never evicting reaches that. Which blocks stay is therefore free to choose, and choosing by key (a
hash) makes the choice the same on every node, after every restart and for every order of arrival.

A newcomer may displace only higher keys. So the lowest key that fits stays for good, then the lowest that fits beside
it, and so on: whatever the order, offering all blocks again and again ends in this one set, after which nothing is
written.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile

from sortedcontainers import SortedDict

from cache.policy.victims import first_enough

__all__ = ["KeptSet"]


class KeptSet:
    """See `cache.policy.Policy`. O(log n) a call, plus one step for each block displaced."""

    def __init__(self) -> None:
        self._sizes: SortedDict[bytes, int] = SortedDict()

    def admit(self, key: bytes, size_bytes: int, *, free_bytes: int, free_blocks: int) -> list[bytes] | None:
        """Displace the highest keys, as few as needed, but none below `key`."""
        # Ends once `size_bytes` are together, so the steps are bounded also where the answer is no.
        higher = takewhile(lambda candidate: candidate >= key, reversed(self._sizes))
        return first_enough(higher, self._sizes, size_bytes, free_bytes=free_bytes, free_blocks=free_blocks)

    def insert(self, key: bytes, size_bytes: int) -> None:
        """See `Policy.insert`."""
        self._sizes[key] = size_bytes

    def touch(self, key: bytes) -> None:
        """Hits change nothing."""

    def remove(self, key: bytes) -> None:
        """See `Policy.remove`."""
        self._sizes.pop(key, None)

    def leaving(self) -> Iterator[bytes]:
        """See `Policy.leaving`."""
        highest_first: Iterator[bytes] = reversed(self._sizes)
        return highest_first
