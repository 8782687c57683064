"""Whole messages and file descriptors between a trainer and one of its workers, over a socket pair.

The trainer never blocks on a worker: what the socket does not take now waits in an outbox and leaves with the next
`flush`. A worker may block on the trainer, because the trainer reads whenever it waits. So the two can never block on
each other, however large a message is. A half-written message of a killed worker stays in the buffer, never seen.

Only the worker may hold its end, and only the trainer its own: every process that the trainer forks closes the
trainer's ends first thing, so that a dead trainer is an end of file for its workers.
"""

from __future__ import annotations

import array
import os
import socket
import struct
import weakref
from collections import deque
from collections.abc import Sequence

__all__ = ["MAX_FDS", "Channel", "channel_pair"]

# Of one message; the 253 that Linux allows are more than a batch needs, which goes on without.
MAX_FDS = 64

_LENGTH = struct.Struct("<Q")
_CHUNK_BYTES = 1 << 18
_ANCILLARY_BYTES = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)


class Channel:
    """One end of the pair. Not thread-safe.

    Attributes:
        sock: For `poll`, and to pass the end to a child process.
        closed: The other end is gone and everything it sent has been received.
        fds: Descriptors received and not yet taken, in the order they were sent. Who takes one closes it.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.closed = False
        self.fds: deque[int] = deque()
        self._inbox = bytearray()
        self._outbox: deque[memoryview] = deque()

    @property
    def pending(self) -> bool:
        """Whether something waits for room in the socket."""
        return bool(self._outbox)

    def post(self, message: bytes) -> None:
        """Send as much as the socket takes without blocking and keep the rest."""
        self._outbox.append(memoryview(_LENGTH.pack(len(message)) + message))
        self.flush()

    def flush(self) -> None:
        """Send what waits, as far as the socket takes it. A closed other end swallows everything."""
        outbox = self._outbox
        while outbox:
            try:
                sent = self.sock.send(outbox[0], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except (BrokenPipeError, ConnectionResetError):
                outbox.clear()
                return
            if sent == len(outbox[0]):
                outbox.popleft()
            else:
                outbox[0] = outbox[0][sent:]

    def send(self, message: bytes, fds: Sequence[int] = ()) -> None:
        """Send a message and up to `MAX_FDS` descriptors, blocking until the socket has taken them.

        Raises:
            OSError: The other end is gone.
        """
        frame = memoryview(_LENGTH.pack(len(message)) + message)
        if fds:
            frame = frame[socket.send_fds(self.sock, [frame], list(fds), socket.MSG_NOSIGNAL) :]
        self.sock.sendall(frame, socket.MSG_NOSIGNAL)

    def receive(self, *, block: bool) -> list[bytes]:
        """Return the whole messages that are there; with `block`, wait for at least one.

        Returns nothing at the end of the stream, and then sets `closed`.

        Raises:
            RuntimeError: Descriptors were lost because this process may open no more files.
        """
        found: list[bytes] = []
        while True:
            wait = 0 if block and not found else socket.MSG_DONTWAIT
            try:
                data, ancillary, flags, _ = self.sock.recvmsg(_CHUNK_BYTES, _ANCILLARY_BYTES, wait)
            except BlockingIOError:
                return found
            except ConnectionResetError:
                data, ancillary, flags = b"", [], 0
            if not data:
                self.closed = True
                return found
            for _, _, payload in ancillary:
                self.fds.extend(array.array("i", payload[: len(payload) - len(payload) % 4]))
            if flags & socket.MSG_CTRUNC:
                raise RuntimeError(
                    "Too many open files. Communication with the workers is no longer possible. Please increase the "
                    "limit using `ulimit -n` in the shell"
                )
            self._inbox += data
            found += self._take_whole()
            if found and len(data) < _CHUNK_BYTES:  # a full chunk means that more is there
                return found

    def close(self) -> None:
        """Close this end; the other end sees an end of file."""
        while self.fds:
            os.close(self.fds.popleft())
        self.sock.close()

    def _take_whole(self) -> list[bytes]:
        inbox, start, messages = self._inbox, 0, []
        while len(inbox) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(inbox, start)
            end = start + _LENGTH.size + length
            if end > len(inbox):
                break
            messages.append(bytes(memoryview(inbox)[start + _LENGTH.size : end]))
            start = end
        del inbox[:start]
        return messages


def channel_pair() -> tuple[Channel, socket.socket]:
    """Return the trainer's channel and the socket that a worker builds its own on."""
    trainer_end, worker_end = socket.socketpair()
    _trainer_ends.add(trainer_end)
    return Channel(trainer_end), worker_end


_trainer_ends: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_trainer_ends() -> None:
    for sock in list(_trainer_ends):
        sock.close()


os.register_at_fork(after_in_child=_close_trainer_ends)
