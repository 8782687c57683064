"""Least recently used, for access that returns to the same blocks; poor for epochs (see `kept_set`)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from cache.policy.victims import first_enough

__all__ = ["Lru"]


class Lru:
    """See `cache.policy.Policy`. O(1) a call, plus one step for each block displaced."""

    def __init__(self) -> None:
        self._sizes: OrderedDict[bytes, int] = OrderedDict()

    def admit(self, key: bytes, size_bytes: int, *, free_bytes: int, free_blocks: int) -> list[bytes] | None:
        """Displace the blocks not used for longest; only what could never fit is turned away."""
        return first_enough(self._sizes, self._sizes, size_bytes, free_bytes=free_bytes, free_blocks=free_blocks)

    def insert(self, key: bytes, size_bytes: int) -> None:
        """See `Policy.insert`."""
        self._sizes[key] = size_bytes

    def touch(self, key: bytes) -> None:
        """Make it the most recently used."""
        if key in self._sizes:
            self._sizes.move_to_end(key)

    def remove(self, key: bytes) -> None:
        """See `Policy.remove`."""
        self._sizes.pop(key, None)

    def leaving(self) -> Iterator[bytes]:
        """See `Policy.leaving`."""
        return iter(self._sizes)
