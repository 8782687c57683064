"""The blocking calls on one disk: their threads, a watch over them, and the probes of a disk that is not well.

Readers never wait for a disk that does not answer: when calls are under way and none has returned for
`DiskLimits.stuck_s`, the disk is down, and whoever waits for a read is told so at once. Writes and removals are waited
for by nobody who reads; theirs go on waiting, because what they may still do to the medium stays charged. Probes have a
thread of their own, since the others may all be stuck.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from cache.disk import DiskHealth, DiskLimits, DiskState

__all__ = ["FULL", "DiskCalls"]

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

FULL = (errno.ENOSPC, errno.EDQUOT)
"""How a disk says that it has no space, no quota or no inode left."""


class DiskCalls:
    """Belongs to the event loop's thread.

    Args:
        name: For threads and log lines.
        threads: Most calls at once.
        limits: When the disk is distrusted.

    Attributes:
        health: The disk's state.
    """

    def __init__(self, name: str, *, threads: int, limits: DiskLimits) -> None:
        self.health = DiskHealth(limits, time.monotonic())
        self._name = name
        self._limits = limits
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=f"cache-{name}")
        self._prober = ThreadPoolExecutor(1, thread_name_prefix=f"cache-{name}-probe")
        self._probe: Callable[[], tuple[bool, bool, str | None]] = lambda: (True, True, None)
        self._on_change: Callable[[], None] = lambda: None
        # Calls queued or running, also those whose caller has given up.
        self._pending: set[Future[Any]] = set()
        self._progress_s = 0.0
        self._readers: set[asyncio.Future[Any]] = set()
        self._watch: asyncio.TimerHandle | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._probing: asyncio.Task[None] | None = None
        self._closed = False

    def attach(self, *, probe: Callable[[], tuple[bool, bool, str | None]], on_change: Callable[[], None]) -> None:
        """Say what to do.

        Args:
            probe: Blocking; tries the disk and returns whether it could read, whether it could write, and why not.
            on_change: Called whenever `health` may answer differently than before.
        """
        self._probe, self._on_change = probe, on_change

    async def call(self, function: Callable[..., _T], *args: Any) -> _T:
        """Run a call in a thread and wait for it, however long it takes."""
        return await self._begin(function, args)

    async def call_for_reader(self, function: Callable[..., _T], *args: Any) -> _T:
        """Run a call in a thread and wait for it while the disk is not down.

        Raises:
            TimeoutError: The disk is down; its calls do not return. What the call may still return is thrown away.
        """
        if not self.health.readable:
            raise TimeoutError(errno.ETIMEDOUT, f"the disk is down: {self.health.reason}")
        future = self._begin(function, args)
        self._readers.add(future)
        try:
            return await future
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise TimeoutError(errno.ETIMEDOUT, f"the disk is down: {self.health.reason}") from None
        finally:
            self._readers.discard(future)

    def progress(self) -> None:
        """Say from within a long call that the disk answers."""
        self._progress_s = time.monotonic()

    def read(self) -> None:
        """Take note of a read that came back well."""
        self.health.read()

    def written(self, *, more: bool) -> None:
        """Take note of a write that came back well; `more` as in `DiskHealth.written`."""
        was_full = self.health.full_since_s is not None
        self.health.written(more=more)
        if was_full and self.health.full_since_s is None:
            _log.info("tier %s: there is space again", self._name)
        if was_full:
            self._changed()

    def failed(self, error: OSError, *, writing: bool, more: bool) -> None:
        """Take note of a call that failed; `more` as in `DiskHealth.written`."""
        before = self._outlook()
        if writing and error.errno in FULL:
            self.health.filled(time.monotonic(), str(error), more=more)
        else:
            self.health.failed(time.monotonic(), str(error), reading=not writing)
        self._changed(before)

    def distrust(self, reason: str) -> None:
        """The disk could not even be opened: it is down until a probe says otherwise."""
        before = self._outlook()
        self.health.stuck(time.monotonic(), reason)
        self._changed(before)

    def stats(self) -> dict[str, Any]:
        """See `DiskHealth.stats`."""
        return self.health.stats(time.monotonic(), time.time())

    async def patient(self, task: asyncio.Task[None]) -> None:
        """Wait for a task, but not longer than it takes to find out that the disk does not answer."""
        await asyncio.wait({task}, timeout=self._limits.stuck_s if self.health.readable else 0)

    async def close(self, timeout_s: float) -> bool:
        """Stop the probes, begin no call any more, and say whether those under way have ended within `timeout_s`."""
        self._closed = True
        for timer in (self._watch, self._retry):
            if timer is not None:
                timer.cancel()
        if self._probing is not None:
            self._probing.cancel()
        for executor in (self._executor, self._prober):
            executor.shutdown(wait=False, cancel_futures=True)
        _, late = await asyncio.to_thread(wait, set(self._pending), timeout_s)
        return not late

    def _begin(self, function: Callable[..., _T], args: tuple[Any, ...]) -> asyncio.Future[_T]:
        loop = asyncio.get_running_loop()
        if self._watch is None:
            self._watch = loop.call_later(self._limits.stuck_s, self._look)
        if not self._pending:
            self.progress()
        return asyncio.wrap_future(self._submit(self._executor, self._run, function, args))

    def _submit(self, executor: ThreadPoolExecutor, function: Callable[..., _T], *args: Any) -> Future[_T]:
        if self._closed:
            raise OSError(errno.ESHUTDOWN, "the cache is closed")
        future = executor.submit(function, *args)
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        return future

    def _run(self, function: Callable[..., _T], args: tuple[Any, ...]) -> _T:
        try:
            return function(*args)
        finally:
            self.progress()

    def _look(self) -> None:
        """See whether anything has come back lately; look again while calls are under way."""
        self._watch = None
        if not self._pending:
            return
        silent_s = time.monotonic() - self._progress_s
        if silent_s >= self._limits.stuck_s:
            self.distrust(f"no call has returned for {self._limits.stuck_s:g} s")
            silent_s = 0.0
        self._watch = asyncio.get_running_loop().call_later(self._limits.stuck_s - silent_s, self._look)

    def _outlook(self) -> tuple[DiskState, bool]:
        return self.health.state, self.health.full_since_s is not None

    def _changed(self, before: tuple[DiskState, bool] | None = None) -> None:
        health = self.health
        if before is not None and before != self._outlook():
            if health.state is not before[0]:
                level = logging.INFO if health.state is DiskState.NORMAL else logging.WARNING
                _log.log(level, "tier %s: the disk is %s: %s", self._name, health.state, health.reason or "probes pass")
            elif health.full_since_s is not None:
                _log.warning("tier %s: the disk is full: %s; reads go on", self._name, health.full_reason)
        if not health.readable:
            # Also those that wait behind stuck calls and have not begun.
            for future in list(self._readers):
                future.cancel()
        self._arm()
        self._on_change()

    def _arm(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        retry_at_s = self.health.retry_at_s
        if retry_at_s is not None and not self._closed:
            delay_s = max(0.0, retry_at_s - time.monotonic())
            self._retry = asyncio.get_running_loop().call_later(delay_s, self._due)

    def _due(self) -> None:
        self._retry = None
        if self.health.retry_at_s is not None and time.monotonic() < self.health.retry_at_s:
            self._arm()
        elif not self.health.probing:
            self._on_change()
        elif self._probing is None:
            # One that is stuck itself stays the only one.
            self._probing = asyncio.create_task(self._try())

    async def _try(self) -> None:
        try:
            readable, writable, reason = await asyncio.wrap_future(self._submit(self._prober, self._probe))
        except Exception as error:  # noqa: BLE001  without a verdict no probe would follow, and the disk never be well
            readable, writable, reason = False, False, f"its probe failed: {error!r}"
            if reason != self.health.reason:
                _log.exception("tier %s: a probe of the disk failed in an unknown way", self._name)
        finally:
            self._probing = None
        before = self._outlook()
        self.health.probed(time.monotonic(), readable=readable, writable=writable, reason=reason)
        self._changed(before)
