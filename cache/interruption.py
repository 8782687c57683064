"""Ending a blocking call of a client from another thread.

A thread waits for its server in the kernel, where nothing but the socket can wake it. So a call that may be ended says,
while it waits, on which socket; whoever ends it shuts that down. The thread then finds out why it was woken.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["CallInterruptedError", "Interruption", "current_interruption"]

_R = TypeVar("_R")

_current = threading.local()


class CallInterruptedError(Exception):
    """Whoever asked does not want the answer any more. Nobody is left to catch it but clean-up."""


class Interruption:
    """For one call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted = False
        self._socket: socket.socket | None = None

    def run(self, call: Callable[[], _R]) -> _R:
        """Make the call, in this thread; `CallInterruptedError` where `interrupt` came before its end."""
        _current.interruption = self
        try:
            return call()
        finally:
            _current.interruption = None

    def interrupt(self) -> None:
        """End the call, which may not have begun or may be over. From any thread; never waits."""
        with self._lock:
            self._wanted = True
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def begin(self, waited_on: socket.socket) -> None:
        """This thread is about to wait."""
        with self._lock:
            self._raise_if_wanted()
            self._socket = waited_on

    def end(self) -> None:
        """It has stopped to wait. Whatever the socket said of its sudden end, this raises then."""
        with self._lock:
            self._socket = None
            self._raise_if_wanted()

    def _raise_if_wanted(self) -> None:
        if self._wanted:
            self._wanted = False  # once: clean-up may use the server again
            raise CallInterruptedError


def current_interruption() -> Interruption | None:
    """Return that of the call which this thread is in; None where it cannot be ended."""
    return getattr(_current, "interruption", None)
