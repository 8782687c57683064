"""A limit on bytes and requests under way: who is waited for goes first, then first come, first served."""

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


@dataclass(eq=False, slots=True)
class Errand:
    """One piece of work.

    Attributes:
        awaited: Somebody waits for it. Work done ahead of time begins without, and `Budget.hurry` adds it.
        granted_s: When its turn came, by `time.monotonic`; 0 before.
    """

    awaited: bool = True
    granted_s: float = 0.0


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
            self._release(size_bytes)

    def hurry(self, errand: Errand) -> None:
        """Somebody waits for this work now: it goes before all that nobody waits for."""
        if errand.awaited:
            return
        errand.awaited = True
        turns = [turn for turn in self._ahead if turn.errand is errand]
        for turn in turns:
            self._ahead.remove(turn)
        self._awaited.extend(turns)
        self._wake()

    async def _acquire(self, size_bytes: int, errand: Errand) -> None:
        if self._may_go(size_bytes, errand):
            self._take(size_bytes)
            return
        turn = _Turn(size_bytes, errand, asyncio.get_running_loop().create_future())
        (self._awaited if errand.awaited else self._ahead).append(turn)
        try:
            await turn.granted
        except asyncio.CancelledError:
            # Cancelled after its turn came: what it was given goes on to the next.
            if turn.granted.done() and not turn.granted.cancelled():
                self._release(size_bytes)
            else:
                self._wake()
            raise

    def _may_go(self, size_bytes: int, errand: Errand) -> bool:
        if self._awaited or (self._ahead and not errand.awaited):
            return False
        return self._fits(size_bytes, errand)

    def _release(self, size_bytes: int) -> None:
        self._bytes -= size_bytes
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
                    self._take(turn.size_bytes)
                    turn.granted.set_result(None)
                else:
                    return

    def _fits(self, size_bytes: int, errand: Errand) -> bool:
        if self._requests == 0:
            return True
        share = 1.0 if errand.awaited else _AHEAD_SHARE
        return (
            self._requests + 1 <= max(1.0, share * self.max_requests)
            and self._bytes + size_bytes <= share * self._max_bytes
        )

    def _take(self, size_bytes: int) -> None:
        self._bytes += size_bytes
        self._requests += 1
