"""How far ahead of its readers a cache fetches: additive decrease, multiplicative increase. Pure.

A block that comes too late is a stall, so the window doubles at once; it becomes smaller by a sixteenth for every
whole window that came in time. So it settles a little above what the origin's latency and the readers' pace need, and
memory that is not needed for prefetching serves blocks that nobody announced.
"""

from __future__ import annotations

__all__ = ["Window"]

_DECREASE = 16


class Window:
    """A number of bytes between two limits; begins at the upper one.

    Args:
        min_bytes: Lower limit.
        max_bytes: Upper limit.

    Attributes:
        size_bytes: What may be on its way or wait for its reader.
    """

    def __init__(self, *, min_bytes: int, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._min_bytes = min(min_bytes, max_bytes)
        self.size_bytes = max_bytes
        self._in_time_bytes = 0

    def came_late(self) -> None:
        """A reader had to wait for a block that was on its way."""
        self.size_bytes = min(self._max_bytes, 2 * self.size_bytes)
        self._in_time_bytes = 0

    def came_in_time(self, size_bytes: int) -> None:
        """A reader found a block that was fetched for it."""
        self._in_time_bytes += size_bytes
        if self._in_time_bytes >= self.size_bytes:
            self._in_time_bytes = 0
            self.size_bytes = max(self._min_bytes, self.size_bytes - self.size_bytes // _DECREASE)
