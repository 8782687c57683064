"""Drop behind: what has been read leaves first, for data that is walked through once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain

from cache.policy.victims import first_enough

__all__ = ["DropBehind"]


class DropBehind:
    """See `cache.policy.Policy`. O(1) a call, plus one step for each block displaced."""

    def __init__(self) -> None:
        self._sizes: dict[bytes, int] = {}
        self._read: OrderedDict[bytes, None] = OrderedDict()

    def admit(self, key: bytes, size_bytes: int, *, free_bytes: int, free_blocks: int) -> list[bytes] | None:
        """Displace what was hit, the first one first, and nothing that still waits for its reader."""
        return first_enough(self._read, self._sizes, size_bytes, free_bytes=free_bytes, free_blocks=free_blocks)

    def insert(self, key: bytes, size_bytes: int) -> None:
        """See `Policy.insert`."""
        self._sizes[key] = size_bytes

    def touch(self, key: bytes) -> None:
        """It has been read."""
        if key in self._sizes:
            self._read[key] = None

    def remove(self, key: bytes) -> None:
        """See `Policy.remove`."""
        self._sizes.pop(key, None)
        self._read.pop(key, None)

    def leaving(self) -> Iterator[bytes]:
        """See `Policy.leaving`."""
        return chain(self._read, (key for key in self._sizes if key not in self._read))
