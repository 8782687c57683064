"""A server's distance, on loopback: requests arrive later, and a connection, and the link, carry so much a second.

An object store answers after some tens of milliseconds and gives one connection a part of what it gives many: AWS says
85 to 90 MB/s for S3 (https://docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance-guidelines.html).
Every client meets the same, whatever library it uses, because this is a relay between the two ends of its connections.

The bytes of answers pass from socket to socket inside the kernel. A relay takes CPU all the same, which nobody takes
where the distance is real; `Distance.pid` says whose it is.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import select
import socket
import threading
import time
from multiprocessing.connection import Connection
from types import TracebackType

__all__ = ["Distance"]

_PIPE_BYTES = 1 << 20
_REQUEST_BYTES = 64 * 1024
_START_TIMEOUT_S = 60


class Distance:
    """A relay in a process of its own, which ends with the context.

    Args:
        port: Of the server, on loopback.
        latency_s: So much later does a request arrive. Requests are small and come one after the other.
        connection_bytes_s: So much of the answers passes on one connection.
        link_bytes_s: So much of them passes on all connections together.

    Attributes:
        url: What clients are told, `http://127.0.0.1:port`.
        pid: The relay's process.
    """

    def __init__(self, port: int, *, latency_s: float, connection_bytes_s: float, link_bytes_s: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._near, far = context.Pipe()
        arguments = (far, port, latency_s, connection_bytes_s, link_bytes_s)
        self._process = context.Process(target=_relay, args=arguments, daemon=True)
        self.url = ""
        self.pid = 0

    def __enter__(self) -> Distance:
        self._process.start()
        if not self._near.poll(_START_TIMEOUT_S):
            raise TimeoutError("the relay did not start")
        self.url, self.pid = f"http://127.0.0.1:{self._near.recv()}", self._process.pid or 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.join()


class _Pace:
    """So many bytes a second, for all who ask."""

    def __init__(self, bytes_s: float) -> None:
        self._bytes_s = bytes_s
        self._free_s = 0.0
        self._lock = threading.Lock()

    def pass_s(self, size_bytes: int) -> float:
        """When these bytes have passed, on the monotonic clock."""
        with self._lock:
            self._free_s = max(self._free_s, time.monotonic()) + size_bytes / self._bytes_s
            return self._free_s


def _relay(answer: Connection, port: int, latency_s: float, connection_bytes_s: float, link_bytes_s: float) -> None:
    link = _Pace(link_bytes_s)
    with socket.create_server(("127.0.0.1", 0), backlog=socket.SOMAXCONN) as listener:
        answer.send(listener.getsockname()[1])
        while True:
            near, _ = listener.accept()
            arguments = (near, port, latency_s, [link, _Pace(connection_bytes_s)])
            threading.Thread(target=_carry, args=arguments, daemon=True).start()


def _carry(near: socket.socket, port: int, latency_s: float, paces: list[_Pace]) -> None:
    """Serve one connection until either end hangs up."""
    with near, socket.create_connection(("127.0.0.1", port)) as far, contextlib.suppress(ConnectionError):
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        reading, writing = os.pipe()
        try:
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            poll = select.poll()
            poll.register(near, select.POLLIN)
            poll.register(far, select.POLLIN)
            while True:
                ready = {fd for fd, _ in poll.poll()}
                if near.fileno() in ready:
                    request = near.recv(_REQUEST_BYTES)
                    if not request:
                        return
                    time.sleep(latency_s)
                    far.sendall(request)
                if far.fileno() in ready:
                    left = size_bytes = os.splice(far.fileno(), writing, _PIPE_BYTES)
                    if not size_bytes:
                        return
                    while left:
                        left -= os.splice(reading, near.fileno(), left)
                    passed_s = max(pace.pass_s(size_bytes) for pace in paces)
                    time.sleep(max(0, passed_s - time.monotonic()))
        finally:
            os.close(reading)
            os.close(writing)
