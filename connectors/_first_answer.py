"""A store that has not answered once, and is out of reach: most likely a mistake in its settings.

Clients ask again and again, which is right in the middle of a job, whose store will come back, and wrong at its begin:
whoever mistyped an endpoint wants to hear of it. What the client does meanwhile cannot be seen. So where the first
request of a store takes longer than a moment, the store is asked something beside it, without retries: is it out of
reach, the request is given up. Whatever else comes of that, the request goes on under its own limits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from connectors.errors import DataError, ErrorKind, TransientError
from connectors.limits import FIRST_ANSWER_VARIABLE

__all__ = ["FirstAnswer"]

R = TypeVar("R")

_NO_ANSWER = (ErrorKind.UNREACHABLE, ErrorKind.TIMEOUT)


class FirstAnswer:
    """What is known of one store. Belongs to one event loop.

    Args:
        wait_s: How long a request is left alone.
        probe: Asks the store for anything, once; raises our errors.

    Attributes:
        has_come: Whether the store has answered anything, be it a refusal.
    """

    def __init__(self, wait_s: float, probe: Callable[[], Coroutine[Any, Any, object]]) -> None:
        self.has_come = False
        self._wait_s = wait_s
        self._probe = probe

    async def await_with(self, request: Coroutine[Any, Any, R], uri: str) -> R:
        """Return what the request for `uri` gives.

        Raises:
            TransientError: It was given up, because the store is out of reach.
            DataError: As the request fails.
        """
        task = asyncio.ensure_future(request)
        try:
            await asyncio.wait({task}, timeout=self._wait_s)
            if not (task.done() or self.has_come) and await self._is_out_of_reach(task):
                raise TransientError(
                    f"no connection to the store of {uri}; check its endpoint, or set {FIRST_ANSWER_VARIABLE} to the "
                    "seconds that the store may need to come up",
                    kind=ErrorKind.UNREACHABLE,
                    uri=uri,
                )
            result = await task
        except DataError as error:
            self.has_come |= error.kind not in _NO_ANSWER
            raise
        finally:
            await _end(task)
            del task  # it holds the error, which holds this frame, and with it what all callers hold
        self.has_come = True
        return result

    async def _is_out_of_reach(self, task: asyncio.Task[Any]) -> bool:
        """Ask the store, unless the task ends before it answers."""
        probe = asyncio.ensure_future(self._probe())
        try:
            await asyncio.wait({task, probe}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return False
            error = probe.exception()
            return isinstance(error, DataError) and error.kind is ErrorKind.UNREACHABLE
        finally:
            await _end(probe)


async def _end(task: asyncio.Task[Any]) -> None:
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # known, whether or not anybody has asked: asyncio would log it otherwise
