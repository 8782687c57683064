"""The kept set: the blocks with the lowest keys stay.

When every block is read once an epoch in a fresh random order, no policy hits more than capacity / data set, and
filling once and never evicting reaches that. Which blocks stay is therefore free to choose, and choosing by key (a
hash) makes the choice the same on every node, after every restart and for every order of arrival.

A newcomer may displace only higher keys. So the lowest key that fits stays for good, then the lowest that fits beside
it, and so on: whatever the order, offering all blocks again and again ends in this one set, after which nothing is
written.
"""

from __future__ import annotations

from collections.abc import Iterator

from sortedcontainers import SortedDict

__all__ = ["KeptSet"]


class KeptSet:
    """See `cache.policy.Policy`. O(log n) a call, plus one step for each block displaced."""

    def __init__(self) -> None:
        self._sizes: SortedDict[bytes, int] = SortedDict()

    def admit(self, key: bytes, size_bytes: int, *, free_bytes: int, free_blocks: int) -> list[bytes] | None:
        """Displace the highest keys, as few as needed, but none below `key`."""
        if size_bytes <= free_bytes and free_blocks >= 1:
            return []
        victims = []
        # Ends once `size_bytes` are together, so the steps are bounded also where the answer is no.
        for candidate in reversed(self._sizes):
            if candidate < key:
                return None
            victims.append(candidate)
            free_bytes += self._sizes[candidate]
            free_blocks += 1
            if size_bytes <= free_bytes and free_blocks >= 1:
                return victims
        return None

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
