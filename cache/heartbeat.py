"""Signs of life for a client that waits for an answer.

One timer runs on from request to request, and stops when it finds that nobody waits: starting one for each would cost
more than much of what a small request needs. So the first sign may come at once, the others an interval apart.
"""

from __future__ import annotations

import asyncio
import socket
from types import TracebackType

from cache.frames import Waiting, encode

__all__ = ["Heartbeat"]

_WAITING_FRAME = encode(Waiting())


class Heartbeat:
    """A context that lasts while the client waits and nothing else is being sent to it.

    Belongs to the running event loop. The task whose context it is gets cancelled when the client turns out to be gone.

    Args:
        connection: To the client; non-blocking. Stays the caller's, who calls `close` before closing it.
        interval_s: From one sign to the next.
    """

    def __init__(self, connection: socket.socket, interval_s: float) -> None:
        self._socket = connection
        self._interval_s = interval_s
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> None:
        self._waiting = asyncio.current_task()
        if self._timer is None:
            self._timer = self._loop.call_later(self._interval_s, self.beat)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._waiting = None

    def close(self) -> None:
        """Give no more signs."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def running(self) -> bool:
        """Whether the timer runs."""
        return self._timer is not None

    def beat(self) -> None:
        """Give a sign, if anybody waits; the timer calls this."""
        self._timer = None
        if self._waiting is None:
            return
        try:
            self._socket.send(_WAITING_FRAME)
        except BlockingIOError:
            pass
        except OSError:
            self._waiting.cancel()
            return
        self._timer = self._loop.call_later(self._interval_s, self.beat)
