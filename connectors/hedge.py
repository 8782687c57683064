"""A second request where the first is slower than nearly all others were: the better half of a slow tail.

After the running 99th percentile of its kind, a read is sent once more; the first answer wins and the other request is
cancelled (J. Dean and L. A. Barroso, "The tail at scale", CACM 56(2), 2013). With 0.1 % of replies taking 2 s, a
window that delivers in order stalls 62 % of the time without, and 0.6 % with a hedge.

The extra load is bounded twice: of the reads, at most a share is hedged, so a store that slows down as a whole is not
asked for double; and few hedges are under way at a time.
"""

from __future__ import annotations

import asyncio
import bisect
import builtins
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from connectors.errors import BadInputError
from connectors.objects import ObjectMeta, Span
from connectors.protocols import Buffer, Store

__all__ = ["HedgeLimits", "HedgedStore", "Percentile"]

R = TypeVar("R")

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class HedgeLimits:
    """When a read is sent a second time.

    Attributes:
        percentile: The share of reads that are faster than the delay after which one is hedged.
        max_share: Most hedges per read, over time.
        max_burst: Hedges that may be saved up while none are needed.
        max_inflight: Most hedges at once.
        min_samples: Reads of a size class that must have ended before its reads are hedged.
        min_delay_s: No read is hedged sooner.
    """

    percentile: float = 0.99
    max_share: float = 0.03
    max_burst: float = 10.0
    max_inflight: int = 8
    min_samples: int = 32
    min_delay_s: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.percentile < 1:
            raise BadInputError(f"percentile must lie between 0 and 1, got {self.percentile}")
        for name in ("max_share", "max_burst", "max_inflight", "min_samples", "min_delay_s"):
            if getattr(self, name) <= 0:
                raise BadInputError(f"{name} must be > 0, got {getattr(self, name)}")


class Percentile:
    """The running percentile of the last `size` values. Pure."""

    def __init__(self, share: float, *, size: int = 512) -> None:
        self._share = share
        self._size = size
        self._arrived: deque[float] = deque()
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, value: float) -> None:
        """Take note of a value, and forget the oldest where there are enough."""
        if len(self._arrived) == self._size:
            oldest = self._arrived.popleft()
            del self._sorted[bisect.bisect_left(self._sorted, oldest)]
        self._arrived.append(value)
        bisect.insort(self._sorted, value)

    def value(self) -> float:
        """Return it; there must be a value."""
        return self._sorted[min(len(self._sorted) - 1, int(self._share * len(self._sorted)))]


class HedgedStore:
    """A store whose reads (`get`, `get_range`, `get_ranges` and `head`) are hedged; writes and listings are not.

    Belongs to one event loop.

    Args:
        store: Asked, and closed by `close`.
        limits: See there.

    Attributes:
        sent: Reads that were sent a second time.
        won: Of those, how many the second request answered.
        reads: All reads.
    """

    def __init__(self, store: Store, limits: HedgeLimits | None = None) -> None:
        self.url = store.url
        self.reads = 0
        self.sent = 0
        self.won = 0
        self._store = store
        self._limits = limits or HedgeLimits()
        # Latencies by operation and by size in powers of four: a large read is not slow because it is large.
        self._latencies: dict[tuple[str, int], Percentile] = {}
        self._credit = 1.0
        self._inflight = 0

    async def get(self, key: str, *, version: str | None = None) -> Buffer:
        """Return the whole object."""
        return await self._hedged("get", 0, lambda: self._store.get(key, version=version))

    async def get_range(self, key: str, span: Span, *, version: str | None = None) -> Buffer:
        """Return exactly the bytes of the span."""
        return await self._hedged("range", span.length, lambda: self._store.get_range(key, span, version=version))

    async def get_ranges(self, key: str, spans: Sequence[Span], *, version: str | None = None) -> builtins.list[Buffer]:
        """Return one buffer per span."""
        size_bytes = sum(span.length for span in spans)
        return await self._hedged("range", size_bytes, lambda: self._store.get_ranges(key, spans, version=version))

    async def head(self, key: str) -> ObjectMeta:
        """Return size and version."""
        return await self._hedged("head", 0, lambda: self._store.head(key))

    def list(self, prefix: str = "") -> AsyncIterator[ObjectMeta]:
        """Yield the objects whose key begins with `prefix`, sorted by key."""
        return self._store.list(prefix)

    async def put(self, key: str, data: Buffer) -> ObjectMeta:
        """Replace the object atomically."""
        return await self._store.put(key, data)

    async def put_stream(self, key: str, chunks: AsyncIterable[Buffer]) -> ObjectMeta:
        """Write the chunks; the object appears whole or not at all."""
        return await self._store.put_stream(key, chunks)

    async def delete(self, key: str) -> None:
        """Remove the object."""
        await self._store.delete(key)

    async def copy(self, source: str, target: str) -> ObjectMeta:
        """Copy the object."""
        return await self._store.copy(source, target)

    async def close(self) -> None:
        """Close the wrapped store."""
        await self._store.close()

    async def _hedged(self, operation: str, size_bytes: int, read: Callable[[], Awaitable[R]]) -> R:
        limits = self._limits
        self.reads += 1
        self._credit = min(limits.max_burst, self._credit + limits.max_share)
        latencies = self._latencies.setdefault((operation, size_bytes.bit_length() // 2), Percentile(limits.percentile))
        clock = asyncio.get_running_loop().time
        begin_s = clock()
        if len(latencies) < limits.min_samples:
            result = await read()
            latencies.add(clock() - begin_s)
            return result
        delay_s = max(limits.min_delay_s, latencies.value())
        first: asyncio.Future[R] = asyncio.ensure_future(read())
        tasks = {first}
        try:
            await asyncio.wait(tasks, timeout=delay_s)
            if not first.done() and self._may_hedge():
                tasks.add(asyncio.ensure_future(read()))
            # Nearly always, so without a further wait.
            winner = first if first.done() else await _first_success(tasks)
        finally:
            pending = [task for task in tasks if not task.done()]
            for task in pending:
                task.cancel()
            # Cancelled ones give back what they hold before the caller goes on.
            if pending:
                await asyncio.wait(pending)
            self._inflight -= len(tasks) - 1
        self.won += winner is not first and len(tasks) > 1
        if winner.exception() is None:
            # What the first would have taken is not known where it lost; it took at least this long.
            latencies.add(clock() - begin_s)
        try:
            return winner.result()
        finally:
            del first, tasks, winner  # they hold the error, which holds this frame, and with it what all callers hold

    def _may_hedge(self) -> bool:
        if self._credit < 1 or self._inflight >= self._limits.max_inflight:
            return False
        self._credit -= 1
        self._inflight += 1
        self.sent += 1
        return True


async def _first_success(tasks: set[asyncio.Future[R]]) -> asyncio.Future[R]:
    """Return the first that succeeds; where none does, one that failed."""
    pending = set(tasks)
    while True:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        good = [task for task in done if not task.cancelled() and task.exception() is None]
        if good or not pending:
            return good[0] if good else next(iter(done))
