"""Blocking calls off the event loop, in a bounded number of threads."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

__all__ = ["BlockingPool"]

P = ParamSpec("P")
R = TypeVar("R")


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

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call `function` in a thread. A call that has begun runs to its end also when its caller is cancelled."""
        executor = self._executor
        if executor is None or self._owner_pid != os.getpid():
            executor = self._executor = ThreadPoolExecutor(self._max_threads, thread_name_prefix="connectors")
            self._owner_pid = os.getpid()
        return await asyncio.get_running_loop().run_in_executor(executor, lambda: function(*args, **kwargs))

    def close(self) -> None:
        """Let the threads end; calls that have begun finish first, without being waited for."""
        if self._executor is not None and self._owner_pid == os.getpid():
            self._executor.shutdown(wait=False)
        self._executor = None
