"""What arrives on a socket, for the one task that waits for it.

The event loop watches the socket for as long as its task comes back for more, rather than anew for each wait: a small
request then costs two system calls less. What arrives while the task is busy stays in the socket, unwatched.
"""

from __future__ import annotations

import asyncio
import socket

__all__ = ["Incoming"]

_RECEIVE_BYTES = 64 * 1024


class Incoming:
    """Belongs to the running event loop.

    Args:
        connection: Non-blocking; stays the caller's, who calls `close` before closing it.

    Attributes:
        watching: Whether the event loop looks whether something arrives.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._descriptor = connection.fileno()
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self.watching = False

    async def receive(self) -> bytes:
        """Wait for bytes and return them; none at the end of the stream.

        Raises:
            ConnectionError: The other side is gone.
        """
        while True:
            waiter = self._waiter = self._loop.create_future()
            if not self.watching:
                self._loop.add_reader(self._descriptor, self._readable)
                self.watching = True
            try:
                await waiter
            finally:
                self._waiter = None
            try:
                return self._socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                continue

    def close(self) -> None:
        """Watch no more."""
        if self.watching:
            self._loop.remove_reader(self._descriptor)
            self.watching = False

    def _readable(self) -> None:
        if self._waiter is None:
            # The task is busy with what came before.
            self.close()
        elif not self._waiter.done():
            self._waiter.set_result(None)
