"""A limit on bytes and requests under way, first come, first served."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

__all__ = ["Budget"]


class Budget:
    """Belongs to one event loop. What alone exceeds the limit still goes, by itself."""

    def __init__(self, *, max_bytes: int, max_requests: int) -> None:
        self._max_bytes = max_bytes
        self._max_requests = max_requests
        self._bytes = 0
        self._requests = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def spend(self, size_bytes: int) -> AsyncIterator[None]:
        """Hold one request and `size_bytes` for the length of the context, once they are free."""
        await self._acquire(size_bytes)
        try:
            yield
        finally:
            self._release(size_bytes)

    async def _acquire(self, size_bytes: int) -> None:
        if not self._waiting and self._fits(size_bytes):
            self._take(size_bytes)
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((size_bytes, turn))
        try:
            await turn
        except asyncio.CancelledError:
            # Cancelled after its turn came: what it was given goes on to the next.
            if turn.done() and not turn.cancelled():
                self._release(size_bytes)
            else:
                self._wake()
            raise

    def _release(self, size_bytes: int) -> None:
        self._bytes -= size_bytes
        self._requests -= 1
        self._wake()

    def _wake(self) -> None:
        while self._waiting:
            size_bytes, turn = self._waiting[0]
            if turn.cancelled():
                self._waiting.popleft()
            elif self._fits(size_bytes):
                self._waiting.popleft()
                self._take(size_bytes)
                turn.set_result(None)
            else:
                return

    def _fits(self, size_bytes: int) -> bool:
        if self._requests == 0:
            return True
        return self._requests < self._max_requests and self._bytes + size_bytes <= self._max_bytes

    def _take(self, size_bytes: int) -> None:
        self._bytes += size_bytes
        self._requests += 1
