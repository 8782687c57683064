"""How far ahead of its readers a cache fetches: what they take while the origin answers, times a margin. Pure.

What lies ahead of a reader has to last as long as it takes to fetch more. So the window is rate x latency: the most
that readers took within one latency, at their fastest lately, so that a batch that is taken at once counts whole. The
latency is the 99.9th percentile of those of fetches ahead of time, from when the origin was asked. On that comes a
margin: a block that comes too late is a stall, so the margin doubles at once, and again only after another latency; it
becomes smaller by a sixteenth for every whole window that came in time. Memory that is not needed for this serves
blocks that nobody announced.
"""

from __future__ import annotations

from connectors.hedge import Percentile

__all__ = ["Window"]

_MIN_LATENCIES = 16
_LATENCIES = 1024
_LATENCY_PERCENTILE = 0.999
_MIN_MARGIN = 2.0
_MAX_MARGIN = 256.0
_DECREASE = 1 / 16
# How fast the fastest readers are forgotten: by this share of the difference with every latency that passes.
_FORGET = 1 / 64


class Window:
    """A number of bytes between two limits; the upper one until enough is measured.

    Args:
        min_bytes: Lower limit.
        max_bytes: Upper limit.

    Attributes:
        max_bytes: As given.
        size_bytes: What may be on its way or wait for its reader.
        latency_s: How long a slow fetch takes; 0 until enough is measured.
    """

    def __init__(self, *, min_bytes: int, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._min_bytes = min(min_bytes, max_bytes)
        self.size_bytes = max_bytes
        self.latency_s = 0.0
        self._latencies = Percentile(_LATENCY_PERCENTILE, size=_LATENCIES)
        self._margin = _MIN_MARGIN
        # Bytes taken since `_since_s`, for at most one latency; and the most of them, slowly forgotten.
        self._since_s = float("-inf")
        self._taken_bytes = 0
        self._most_bytes = 0.0
        self._in_time_bytes = 0
        self._late_s = float("-inf")

    @property
    def rate_bytes_s(self) -> float:
        """How fast readers take what was fetched ahead; 0 until enough is measured."""
        return self._most_bytes / self.latency_s if self.latency_s else 0.0

    def fetched(self, latency_s: float) -> None:
        """The origin took so long for one request."""
        self._latencies.add(latency_s)
        if len(self._latencies) >= _MIN_LATENCIES:
            self.latency_s = self._latencies.value()
            self._resize()

    def taken(self, size_bytes: int, now_s: float) -> None:
        """A reader takes a block that came ahead of time, or should have."""
        if now_s - self._since_s > self.latency_s:
            # Pauses of the readers do not count, only what they take when they do.
            self._most_bytes -= _FORGET * self._most_bytes
            self._since_s, self._taken_bytes = now_s, 0
        self._taken_bytes += size_bytes
        self._most_bytes = max(self._most_bytes, self._taken_bytes)
        self._resize()

    def came_late(self, now_s: float) -> None:
        """A reader has to wait for a block that is on its way."""
        if now_s - self._late_s <= self.latency_s:
            return  # one stall makes several blocks late
        self._late_s = now_s
        self._margin = min(_MAX_MARGIN, 2 * self._margin)
        self._in_time_bytes = 0
        self._resize()

    def came_in_time(self, size_bytes: int) -> None:
        """A reader found a block that was fetched for it."""
        self._in_time_bytes += size_bytes
        if self._in_time_bytes >= self.size_bytes:
            self._in_time_bytes = 0
            self._margin = max(_MIN_MARGIN, self._margin - _DECREASE * self._margin)
            self._resize()

    def _resize(self) -> None:
        if self.latency_s:
            self.size_bytes = int(min(self.max_bytes, max(self._min_bytes, self._margin * self._most_bytes)))
