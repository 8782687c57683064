"""A limit on bytes and requests under way: who is waited for goes first, then first come, first served.

Requests share the way from the store, so what is begun ahead of time slows what somebody waits for. While enough of
that is under way to fill the way by itself, nothing else is begun. And work ahead of time starts slowly, as TCP does:
with as much, and with every piece that ends by so much more, for the first reader comes a moment after the first plan.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

__all__ = ["Budget", "Errand"]

# Work ahead of time leaves the rest free, so that a reader never waits until some of it has ended.
_AHEAD_SHARE = 0.75
# So much fills a way of 10 Gbit/s for 25 ms.
_ENOUGH_BYTES = 32 << 20


@dataclass(eq=False, slots=True)
class Errand:
    """One piece of work.

    Attributes:
        awaited: Somebody waits for it. Work done ahead of time begins without, and `Budget.hurry` adds it.
        granted_s: When its turn came, by `time.monotonic`; 0 before.
        held_bytes: What it holds of a budget.
    """

    awaited: bool = True
    granted_s: float = 0.0
    held_bytes: int = 0


@dataclass(eq=False, slots=True)
class _Turn:
    size_bytes: int
    errand: Errand
    granted: asyncio.Future[None]


class Budget:
    """Belongs to one event loop. What alone exceeds the limit still goes, by itself.

    Attributes:
        max_requests: May be changed; what is under way is not interrupted.
    """

    def __init__(self, *, max_bytes: int, max_requests: int) -> None:
        self.max_requests = max_requests
        self._max_bytes = max_bytes
        self._bytes = 0
        self._awaited_bytes = 0
        self._max_ahead_bytes = min(_ENOUGH_BYTES, _AHEAD_SHARE * max_bytes)
        self._requests = 0
        self._awaited: deque[_Turn] = deque()
        self._ahead: deque[_Turn] = deque()

    @contextlib.asynccontextmanager
    async def spend(self, size_bytes: int, errand: Errand | None = None) -> AsyncIterator[None]:
        """Hold one request and `size_bytes` for the length of the context, once they are free."""
        errand = errand or Errand()
        await self._acquire(size_bytes, errand)
        errand.granted_s = time.monotonic()
        try:
            yield
        finally:
            self._release(size_bytes, errand)

    def hurry(self, errand: Errand) -> None:
        """Somebody waits for this work now: it goes before all that nobody waits for."""
        if errand.awaited:
            return
        errand.awaited = True
        self._awaited_bytes += errand.held_bytes
        turns = [turn for turn in self._ahead if turn.errand is errand]
        for turn in turns:
            self._ahead.remove(turn)
        self._awaited.extend(turns)
        self._wake()

    async def _acquire(self, size_bytes: int, errand: Errand) -> None:
        if self._may_go(size_bytes, errand):
            self._take(size_bytes, errand)
            return
        turn = _Turn(size_bytes, errand, asyncio.get_running_loop().create_future())
        (self._awaited if errand.awaited else self._ahead).append(turn)
        try:
            await turn.granted
        except asyncio.CancelledError:
            # Cancelled after its turn came: what it was given goes on to the next.
            if turn.granted.done() and not turn.granted.cancelled():
                self._release(size_bytes, errand)
            else:
                self._wake()
            raise

    def _may_go(self, size_bytes: int, errand: Errand) -> bool:
        if self._awaited or (self._ahead and not errand.awaited):
            return False
        return self._fits(size_bytes, errand)

    def _release(self, size_bytes: int, errand: Errand) -> None:
        self._bytes -= size_bytes
        errand.held_bytes -= size_bytes
        if errand.awaited:
            self._awaited_bytes -= size_bytes
        self._max_ahead_bytes = min(self._max_ahead_bytes + size_bytes, _AHEAD_SHARE * self._max_bytes)
        self._requests -= 1
        self._wake()

    def _wake(self) -> None:
        for waiting in (self._awaited, self._ahead):
            while waiting:
                turn = waiting[0]
                if turn.granted.cancelled():
                    waiting.popleft()
                elif self._fits(turn.size_bytes, turn.errand):
                    waiting.popleft()
                    self._take(turn.size_bytes, turn.errand)
                    turn.granted.set_result(None)
                else:
                    return

    def _fits(self, size_bytes: int, errand: Errand) -> bool:
        if self._requests == 0:
            return True
        if errand.awaited:
            return self._requests < self.max_requests and self._bytes + size_bytes <= self._max_bytes
        return (
            self._requests + 1 <= max(1.0, _AHEAD_SHARE * self.max_requests)
            and self._bytes + size_bytes <= self._max_ahead_bytes
            and self._awaited_bytes < _ENOUGH_BYTES
        )

    def _take(self, size_bytes: int, errand: Errand) -> None:
        self._bytes += size_bytes
        errand.held_bytes += size_bytes
        if errand.awaited:
            self._awaited_bytes += size_bytes
        self._requests += 1
