"""One connection of a client to its server: blocking, one request at a time, with a limit on every wait.

The limits are the kernel's (SO_RCVTIMEO, SO_SNDTIMEO), which costs no system call per message. The server shows every
few seconds that it lives, however slow the origin is, so silence means that it is stopped or stuck.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Iterator

from cache.address import peer, socket_address
from cache.frames import (
    MAX_DESCRIPTORS,
    MAX_JOB_LENGTH,
    PROTOCOL_VERSION,
    Blocks,
    Failed,
    Hello,
    Object,
    Passed,
    Reply,
    Request,
    Waiting,
    Welcome,
    encode,
    error_of,
    replies,
)
from cache.handle import Descriptor
from cache.interruption import Interruption, current_interruption
from cache.trust import trusts
from connectors.errors import DataError, ErrorKind, PermissionDeniedError, TransientError

__all__ = ["JOB_VARIABLE", "Connection", "ServerGoneError"]

JOB_VARIABLE = "DATAFLOW_JOB"
"""Environment variable with the name under which a job's quota is kept; without it a job has none."""

_RECEIVE_BYTES = 256 * 1024
_ANCILLARY_BYTES = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)


class ServerGoneError(TransientError):
    """Nobody answers at the address, or who answered went away or has no room for one more connection (`TRANSIENT`).

    What was asked can be asked again elsewhere.
    """

    default_kind = ErrorKind.UNREACHABLE


class Connection:
    """Owned by one thread at a time.

    Args:
        address: The server's.
        timeout_s: Longest silence, also while connecting.

    Raises:
        ServerGoneError: Nobody listens, or nobody answers in time.
        PermissionDeniedError: A server that is not to be trusted has the address, or the server refuses this user.
        DataError: This process has no descriptor left.
    """

    def __init__(self, address: str, *, timeout_s: float) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._frames = replies()
        self._buffer = bytearray(_RECEIVE_BYTES)
        self._arrived: deque[Reply] = deque()
        self._descriptors: deque[Descriptor] = deque()
        self._interruption: Interruption | None = None
        try:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            raise DataError(
                f"this process cannot connect to the cache server at {address}: {error}; raise its limit (ulimit -n)"
            ) from error
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def _connect(self) -> None:
        limit = struct.pack("@ll", int(self._timeout_s), int(self._timeout_s % 1 * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, option, limit)
        try:
            self._socket.connect(socket_address(self.address))
        except PermissionError as error:
            raise PermissionDeniedError(f"not allowed to connect to the cache server at {self.address}") from error
        except OSError as error:
            raise ServerGoneError(f"no cache server answers at {self.address}: {error.strerror}") from error
        pid, uid = peer(self._socket)
        if not trusts(self.address, uid):
            raise PermissionDeniedError(
                f"process {pid} of user {uid} has {self.address} and may have put itself there; a server of another "
                "user is trusted in a folder that root has given it, such as /run/dataflow, where nobody else may write"
            )
        welcome, _ = self.ask_once(Hello(PROTOCOL_VERSION, os.environ.get(JOB_VARIABLE, "")[:MAX_JOB_LENGTH]))
        if isinstance(welcome, Failed):
            refusal = error_of(welcome)
            raise ServerGoneError(str(refusal), kind=refusal.kind) if isinstance(refusal, TransientError) else refusal
        if not isinstance(welcome, Welcome) or welcome.version != PROTOCOL_VERSION:
            raise DataError(
                f"the cache server at {self.address} speaks another protocol than version {PROTOCOL_VERSION}; "
                "run the same release on both sides",
                kind=ErrorKind.PROTOCOL,
            )

    def ask(self, request: Request) -> Iterator[tuple[Reply, list[Descriptor]]]:
        """Send a request and yield the messages of its answer, each with its descriptors.

        Raises:
            ServerGoneError: The server ended, or was silent for too long.
            DataError: Kind `PROTOCOL`: it sent what nobody understands. After an error the connection is of no use.
        """
        frame = encode(request)
        interruption = self._interruption = current_interruption()
        try:
            if interruption is not None:
                interruption.wait(self._socket, select.POLLOUT, self._timeout_s)
            self._socket.sendall(frame)
        except (BrokenPipeError, ConnectionResetError):
            pass  # a server that hangs up says why first: reading finds that, or the end
        except OSError as error:
            raise self._gone(error) from error
        last = False
        while not last:
            reply = self._next()
            if isinstance(reply, Waiting):
                continue
            last = bool(getattr(reply, "last", True))
            yield reply, [self._descriptor() for _ in range(_num_descriptors(reply))]

    def ask_once(self, request: Request) -> tuple[Reply, list[Descriptor]]:
        """Send a request that is answered by one message; errors as `ask`."""
        reply, descriptors = next(self.ask(request))
        if not getattr(reply, "last", True):
            raise DataError(
                f"the cache server at {self.address} has more to say to {type(request).__name__} than fits",
                kind=ErrorKind.PROTOCOL,
            )
        return reply, descriptors

    def close(self) -> None:
        """Hang up. Descriptors that nobody took are closed."""
        self._descriptors.clear()
        self._socket.close()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # there was no descriptor for the socket
            self.close()

    def _next(self) -> Reply:
        interruption = self._interruption
        while not self._arrived:
            try:
                if interruption is not None:
                    interruption.wait(self._socket, select.POLLIN, self._timeout_s)
                size, ancillary, flags, _ = self._socket.recvmsg_into(
                    [self._buffer], _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
                )
            except OSError as error:
                raise self._gone(error) from error
            for level, kind, data in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    numbers = array.array("i")
                    numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
                    self._descriptors.extend(map(Descriptor, numbers))
            if flags & socket.MSG_CTRUNC:
                self._descriptors.clear()  # room for another connection
                raise DataError("this process has too many open files to take more blocks; raise its limit (ulimit -n)")
            if not size:
                raise ServerGoneError(f"the cache server at {self.address} ended the connection")
            with memoryview(self._buffer) as view:
                self._arrived.extend(self._frames.feed(view[:size]))
        return self._arrived.popleft()

    def _descriptor(self) -> Descriptor:
        try:
            return self._descriptors.popleft()
        except IndexError:
            raise DataError(
                f"the cache server at {self.address} announced a descriptor that did not come", kind=ErrorKind.PROTOCOL
            ) from None

    def _gone(self, error: OSError) -> ServerGoneError:
        if isinstance(error, BlockingIOError):
            return ServerGoneError(
                f"the cache server at {self.address} was silent for {self._timeout_s:g} s; it is stopped or stuck",
                kind=ErrorKind.TIMEOUT,
            )
        return ServerGoneError(f"the cache server at {self.address} ended the connection: {error.strerror}")


def _num_descriptors(reply: Reply) -> int:
    if isinstance(reply, Blocks):
        return sum(isinstance(item, Passed) for item in reply.items)
    return int(isinstance(reply, Object) and reply.data is None)
