"""Decoded blocks that a process keeps: a few, so that neighbouring samples do not decode the same block again."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from typing import Any

__all__ = ["BlockBuffer"]


class BlockBuffer:
    """The most recently used blocks, up to a number of bytes. Thread-safe, and empty in a copy made by pickle.

    The newest one stays whatever its size, or each batch of a dataset of huge blocks would decode one anew. A capacity
    of 0 keeps none.

    A forked child goes on with what its parent had (the memory is shared), behind a lock of its own: the parent's might
    have been held by a thread that does not exist in the child.

    Args:
        capacity_bytes: Limit on the sum of the sizes given to `put`; also an attribute.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._blocks: OrderedDict[int, tuple[dict[str, Any], int]] = OrderedDict()
        self._filled_bytes = 0
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockBuffer, (self.capacity_bytes,)

    def find(self, blocks: list[int]) -> dict[int, dict[str, Any]]:
        """Return those of `blocks` that are here."""
        found = {}
        with self._guard():
            for block in blocks:
                entry = self._blocks.get(block)
                if entry is not None:
                    self._blocks.move_to_end(block)
                    found[block] = entry[0]
        return found

    def put(self, block: int, prepared: dict[str, Any], size_bytes: int) -> None:
        """Keep a block; the least recently used make room, all of them for one that is larger than the buffer."""
        if not self.capacity_bytes:
            return
        with self._guard():
            if block in self._blocks:
                return
            self._blocks[block] = (prepared, size_bytes)
            self._filled_bytes += size_bytes
            while self._filled_bytes > self.capacity_bytes and len(self._blocks) > 1:
                _, (_, freed_bytes) = self._blocks.popitem(last=False)
                self._filled_bytes -= freed_bytes

    def _guard(self) -> threading.Lock:
        if self._pid != os.getpid():
            self._lock = threading.Lock()
            self._blocks = OrderedDict(self._blocks)
            self._pid = os.getpid()
        return self._lock
