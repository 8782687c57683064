"""Ending a blocking call of a client from another thread.

A thread that waits for its server waits for its interruption too, by a descriptor of its own. The server hears nothing
of that before the thread, awake, hangs up: so a private server need not see its last connection end.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
from collections.abc import Callable
from typing import TypeVar

from cache.handle import Descriptor

__all__ = ["CallInterruptedError", "Interruption", "current_interruption"]

_R = TypeVar("_R")

_current = threading.local()


class CallInterruptedError(Exception):
    """Whoever asked does not want the answer any more. Nobody is left to catch it but clean-up."""


class Interruption:
    """For one call."""

    def __init__(self) -> None:
        self._event = Descriptor(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))

    def run(self, call: Callable[[], _R]) -> _R:
        """Make the call, in this thread; `CallInterruptedError` where `interrupt` came before its end."""
        _current.interruption = self
        try:
            return call()
        finally:
            _current.interruption = None

    def interrupt(self) -> None:
        """End the call, which may not have begun or may be over. From any thread; never waits."""
        os.eventfd_write(self._event.fd, 1)

    def wait(self, waited_on: socket.socket, events: int, timeout_s: float) -> None:
        """Wait in this thread until the socket is ready for `events` of poll.

        Raises:
            CallInterruptedError: `interrupt` was called; once, so that clean-up may use the server again.
            BlockingIOError: Nothing happened for `timeout_s`.
        """
        poll = select.poll()
        poll.register(waited_on, events)
        poll.register(self._event.fd, select.POLLIN)
        ready = [descriptor for descriptor, _ in poll.poll(timeout_s * 1000)]
        if self._event.fd in ready:
            os.eventfd_read(self._event.fd)
            raise CallInterruptedError
        if not ready:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def current_interruption() -> Interruption | None:
    """Return that of the call which this thread is in; None where it cannot be ended."""
    return getattr(_current, "interruption", None)
