"""Blocking calls off the event loop, in a bounded number of threads, with a word about those that hang.

Nothing ends a thread in a system call that does not return: a dead NFS or Lustre mount, a server that has gone silent.
What can be done is done. The log says which call it is, again and again at growing intervals; who waits for a read is
told that it failed after a while; and when every thread hangs in such reads, further calls fail at once, until one
comes back.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from connectors.errors import ErrorKind, TransientError

__all__ = ["BlockingPool", "read_limit_s"]

_log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

_LATE_S = 30.0
_LOOK_S = 10.0
_READ_LIMIT_S = 300.0
# Whatever is slower than this is taken for silent.
_SLOWEST_BYTES_PER_S = 1 << 20


@dataclass(slots=True, eq=False)
class _Call:
    """One call; times are those of `time.monotonic`.

    Attributes:
        name: What is done.
        uri: With what.
        limit_s: How long somebody waits for it.
        asked_s: When it was asked for.
        word_s: After how long the log says the next word about it.
        begun_s: When its thread began with it; None before.
        ended: Its thread is free again.
        given_up: It has taken too long.
        result: Is waited for.
    """

    name: str
    uri: str
    limit_s: float
    asked_s: float
    word_s: float
    begun_s: float | None = None
    ended: bool = False
    given_up: bool = False
    result: asyncio.Future[Any] | None = None


def read_limit_s(size_bytes: int) -> float:
    """Return how long a read of so many bytes is waited for."""
    return _READ_LIMIT_S + size_bytes / _SLOWEST_BYTES_PER_S


class BlockingPool:
    """A pool of threads that is made when first needed, again in a forked child, and again after `close`.

    Threads do not survive a fork, and an executor that was copied by one waits for them forever; so the pool belongs
    to the process that made it.

    Args:
        max_threads: Calls that run at once; more wait for their turn.
    """

    def __init__(self, max_threads: int) -> None:
        self._max_threads = max_threads
        self._executor: ThreadPoolExecutor | None = None
        self._owner_pid = 0
        self._calls: set[_Call] = set()
        # Those that nobody waits for any more, each of which still holds a thread.
        self._lost: set[_Call] = set()
        self._watch: asyncio.AbstractEventLoop | None = None

    async def run(
        self, uri: str, limit_s: float | None, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Call `function` in a thread. A call that has begun runs to its end also when its caller is cancelled.

        Args:
            uri: What it is about, for the log.
            limit_s: How long it is waited for, some seconds more or less, its turn included; None: for ever.
            function: Is called.
            args: Its arguments.
            kwargs: Likewise.

        Raises:
            TransientError: It did not return in time, or no thread is left.
            Exception: Whatever `function` raises.
        """
        executor = self._executor
        if executor is None or self._owner_pid != os.getpid():
            executor = self._executor = ThreadPoolExecutor(self._max_threads, thread_name_prefix="connectors")
            self._owner_pid, self._calls, self._lost, self._watch = os.getpid(), set(), set(), None
        if len(self._lost) >= self._max_threads:
            raise _silent(uri, f"is not asked, because {len(self._lost)} reads from the same place hang")
        name = getattr(function, "__name__", "call").strip("_")
        call = _Call(name, uri, math.inf if limit_s is None else limit_s, time.monotonic(), _LATE_S)
        lost = self._lost

        def body() -> R:
            call.begun_s = time.monotonic()
            try:
                return function(*args, **kwargs)
            finally:
                call.ended = True
                lost.discard(call)

        loop = asyncio.get_running_loop()
        if self._watch is not loop:
            self._watch = loop
            loop.call_later(_LOOK_S, self._look, loop)
        result = loop.run_in_executor(executor, body)
        call.result = result
        self._calls.add(call)
        try:
            return await result
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not call.given_up or task is None or task.cancelling():
                raise
        finally:
            self._calls.discard(call)
            call.result = None
            del result  # it holds the exception, which holds this frame, and with it what all callers hold
        raise _silent(uri, f"did not answer within {limit_s:g} s")

    def later(self, function: Callable[[], object]) -> None:
        """Call `function` as soon as a thread is free, also while calls are refused; nobody hears of what it raises."""
        if self._executor is not None and self._owner_pid == os.getpid():
            self._executor.submit(function)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """Say which calls hang, and give up those that are waited for no longer; look again while there are some."""
        if self._watch is not loop:
            return
        now_s = time.monotonic()
        for call in list(self._calls):
            if now_s - call.asked_s >= call.limit_s:
                self._give_up(call)
            elif call.begun_s is not None and now_s - call.begun_s >= call.word_s:
                call.word_s *= 2
                _log.warning(
                    "%s of %s has not returned for %.0f s; is its file system or server gone?",
                    call.name,
                    call.uri,
                    now_s - call.begun_s,
                )
        self._watch = loop if self._calls else None
        if self._calls:
            loop.call_later(_LOOK_S, self._look, loop)

    def _give_up(self, call: _Call) -> None:
        assert call.result is not None
        call.given_up = True
        if call.begun_s is not None:
            self._lost.add(call)
            if call.ended:  # just now
                self._lost.discard(call)
        call.result.cancel()

    def close(self) -> None:
        """Let the threads end; calls that have begun finish first, without being waited for."""
        if self._executor is not None and self._owner_pid == os.getpid():
            self._executor.shutdown(wait=False)
        self._executor = None


def _silent(uri: str, what: str) -> TransientError:
    message = f"{uri} {what}; see whether its file system or server is gone"
    return TransientError(message, kind=ErrorKind.TIMEOUT, uri=uri)
