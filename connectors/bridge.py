"""The only crossing from synchronous code to the stores' coroutines.

One thread per process runs one event loop, started when first needed. A forked child has neither the thread nor the
state of the loop, so it starts its own. Stores are used from the loop that first used them: whatever goes through
here shares one.

A caller may itself run inside an event loop, as all code in a notebook does: its loop stands still until the result is
there, as in any synchronous call, and ours goes on in its own thread. Only inside our own loop would that be for ever.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import wait
from contextvars import Context
from typing import Any, TypeVar, TypeVarTuple

from connectors.errors import BadInputError

__all__ = ["run_sync"]

R = TypeVar("R")
_Ts = TypeVarTuple("_Ts")

_JOIN_TIMEOUT_S = 5.0
_POLL_S = 0.001
# An interrupt that comes between the interpreter's last look for one and the system call that waits wakes nobody.
_LOOK_S = 1.0


class _Loop(asyncio.SelectorEventLoop):
    """Knows which threads are on their way out of `call_soon_threadsafe`.

    A thread of a native runtime that brings a result lets go of the interpreter in there, while it wakes the loop. With
    the result the main thread may come to its end; and a thread that wants the interpreter back after that is ended by
    it, which a native runtime answers with SIGABRT.
    """

    def __init__(self) -> None:
        self.callers: set[int] = set()
        super().__init__()

    def call_soon_threadsafe(
        self, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.Handle:
        caller = threading.get_ident()
        self.callers.add(caller)
        try:
            return super().call_soon_threadsafe(callback, *args, context=context)
        finally:
            self.callers.discard(caller)


class _LoopThread:
    def __init__(self) -> None:
        self.owner_pid = os.getpid()
        self.loop = _Loop()
        # A daemon: a call that hangs must not keep the interpreter from ending.
        self._thread = threading.Thread(target=self._run, name="connectors-loop", daemon=True)
        self._thread.start()
        atexit.register(self._stop)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.close()

    def _stop(self) -> None:
        if self.owner_pid == os.getpid() and self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(_JOIN_TIMEOUT_S)
            deadline_s = time.monotonic() + _JOIN_TIMEOUT_S
            while self.loop.callers and time.monotonic() < deadline_s:
                time.sleep(_POLL_S)


_current: _LoopThread | None = None
_lock = threading.Lock()


def _forget() -> None:
    """In a forked child: the thread is gone, and another thread of the parent may have held the lock."""
    global _current, _lock
    _current = None
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget)


def run_sync(coroutine: Coroutine[Any, Any, R]) -> R:
    """Run a coroutine on this process's loop thread and wait for its result. Any thread may call, many at once.

    An interrupt (Ctrl-C) while waiting cancels the coroutine.

    Raises:
        BadInputError: The caller is a coroutine on that very thread, which would wait for itself; await instead.
    """
    loop = _loop()
    if loop is _running_loop():
        coroutine.close()
        raise BadInputError("run_sync was called on the thread that runs the coroutines; await the coroutine instead")
    future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    try:
        while not wait([future], _LOOK_S).done:
            pass
        return future.result()
    except BaseException:
        future.cancel()
        raise
    finally:
        del future  # it holds the exception, which holds this frame, and that its callers' with all that they hold


def _loop() -> asyncio.AbstractEventLoop:
    global _current
    with _lock:
        if _current is None or _current.owner_pid != os.getpid():
            _current = _LoopThread()
        return _current.loop


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
