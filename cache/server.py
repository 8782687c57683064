"""The cache server: an engine behind a unix socket. A daemon and a private server differ only in when they end.

A connection is served one request at a time, so its further requests wait in its own socket buffer. A large request is
worked on in slices: a client which does not read holds at most `slice_bytes` of blocks, waits alone, and is hung up on
after `write_timeout_s`. Descriptors that were sent belong to the kernel and then to the client: whoever is killed, they
are closed.

Shutdown, in this order: stop accepting; hang up on idle clients; let the others have the answer they wait for, until
`drain_s`; hang up on the rest; close the engine; give up the address. The address comes last because it stands for the
cache directories: who can bind it can lock them. Clients see a closed connection and ask again elsewhere.

A private server ends the same way when its last connection has closed, or when none came during its first `grace_s`. A
client that connects in just that moment finds the connection closed, and starts a new server.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from cache.address import peer, remove_socket
from cache.config import CacheConfig
from cache.engine import Engine
from cache.frames import (
    INLINE_BYTES,
    MAX_DESCRIPTORS,
    PROTOCOL_VERSION,
    Blocks,
    Done,
    Failed,
    Head,
    Hello,
    Inline,
    Listing,
    ListObjects,
    Meta,
    Object,
    Passed,
    ReadBlocks,
    ReadObject,
    Reply,
    ReportBad,
    Request,
    Statistics,
    Stats,
    Waiting,
    Welcome,
    encode,
    failure_of,
    requests,
)
from cache.handle import Handle, seal_block
from cache.keys import BlockRef
from connectors.errors import BadInputError, DataError, ErrorKind, PermissionDeniedError, TransientError
from connectors.registry import open_store

__all__ = ["CacheServer", "ServerLimits", "run_server"]

_log = logging.getLogger(__name__)

_RECEIVE_BYTES = 64 * 1024
_MESSAGE_INLINE_BYTES = 1024 * 1024
_LISTING_PAGE = 1000
_WAITING_FRAME = encode(Waiting())


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What one client may take and how long the server waits for it.

    Attributes:
        max_connections: More are refused.
        slice_blocks: Blocks of one request held at once.
        slice_bytes: Bytes of one request held at once, at least one block.
        write_timeout_s: Longest time for a client to take what it asked for.
        heartbeat_s: A client that waits hears this often that the server lives.
        drain_s: Time for running requests at shutdown.
    """

    max_connections: int = 1024
    slice_blocks: int = 256
    slice_bytes: int = 64 * 1024 * 1024
    write_timeout_s: float = 30.0
    heartbeat_s: float = 5.0
    drain_s: float = 10.0

    def __post_init__(self) -> None:
        for name in ("max_connections", "slice_blocks", "slice_bytes", "write_timeout_s", "heartbeat_s"):
            if getattr(self, name) <= 0:
                raise BadInputError(f"{name} must be > 0, got {getattr(self, name)}")


class CacheServer:
    """Serves an engine on a listening socket. Belongs to one event loop.

    Args:
        engine: Started by the caller, closed by the caller after `serve`.
        listener: From `cache.address.listen`; the caller gives it up at the very end.
        limits: See there.
        allowed_uids: Users who may ask, beside this server's own and root.
        grace_s: None for a daemon; a private server ends with its last connection, or after this time without any.
    """

    def __init__(
        self,
        engine: Engine,
        listener: socket.socket,
        *,
        limits: ServerLimits,
        allowed_uids: Collection[int] = (),
        grace_s: float | None = None,
    ) -> None:
        self.engine = engine
        self.limits = limits
        self.requests = 0
        self._listener = listener
        self._uids = frozenset({os.geteuid(), 0, *allowed_uids})
        self._grace_s = grace_s
        self._started_s = time.monotonic()
        self._stop = asyncio.Event()
        self._clients: dict[asyncio.Task[None], _Client] = {}

    def stop(self) -> None:
        """Begin the shutdown; `serve` returns when it is done."""
        self._stop.set()

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stop.is_set()

    async def serve(self) -> None:
        """Serve until stopped, then drain. The engine is still open when this returns."""
        self._listener.setblocking(False)
        accepting = asyncio.create_task(self._accept())
        if self._grace_s is not None:
            asyncio.get_running_loop().call_later(self._grace_s, self._end_if_unused)
        await self._stop.wait()
        accepting.cancel()
        await asyncio.wait([accepting])
        for task, client in self._clients.items():
            if not client.busy:
                task.cancel()
        if self._clients:
            await asyncio.wait(list(self._clients), timeout=self.limits.drain_s)
        for task in self._clients:
            task.cancel()
        if self._clients:
            await asyncio.wait(list(self._clients))

    def stats(self) -> dict[str, Any]:
        """Return the engine's numbers and the server's own."""
        server = {
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - self._started_s, 3),
            "connections": len(self._clients),
            "requests": self.requests,
        }
        return {**self.engine.stats(), "server": server}

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError as error:  # out of descriptors or memory: those who wait, wait on
                _log.warning("cannot accept a connection: %s", error)
                await asyncio.sleep(0.1)
                continue
            connection.setblocking(False)
            refusal = self._refusal(connection)
            client = _Client(self, connection)
            task = asyncio.create_task(client.serve() if refusal is None else client.refuse(refusal))
            self._clients[task] = client
            task.add_done_callback(self._gone)

    def _refusal(self, connection: socket.socket) -> DataError | None:
        pid, uid = peer(connection)
        if uid not in self._uids:
            _log.warning("refused process %d of user %d", pid, uid)
            return PermissionDeniedError(f"user {uid} may not use this cache server; its owner has to allow it")
        if len(self._clients) >= self.limits.max_connections:
            return TransientError(f"the cache server has its {self.limits.max_connections} connections already")
        return None

    def _gone(self, task: asyncio.Task[None]) -> None:
        del self._clients[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("serving a client failed", exc_info=error)
        if self._grace_s is not None:
            self._end_if_unused()

    def _end_if_unused(self) -> None:
        if not self._clients:
            self.stop()


class _Client:
    """One connection, served by one task."""

    def __init__(self, server: CacheServer, connection: socket.socket) -> None:
        self.busy = False
        self._server = server
        self._engine = server.engine
        self._limits = server.limits
        self._socket = connection
        self._loop = asyncio.get_running_loop()

    async def serve(self) -> None:
        """Answer requests until either side has enough."""
        try:
            async for request in self._requests():
                self.busy = True
                self._server.requests += 1
                await self._answer(request)
                self.busy = False
                if self._server.stopping:
                    break
        except DataError as error:
            await self._hang_up(error)
        except (ConnectionError, TimeoutError):
            pass  # gone, or asleep for too long: both are the client's own affair
        finally:
            self._socket.close()

    async def refuse(self, error: DataError) -> None:
        """Say why and hang up."""
        await self._hang_up(error)
        self._socket.close()

    async def _hang_up(self, error: DataError) -> None:
        with contextlib.suppress(OSError):
            await self._send(failure_of(error))

    async def _requests(self) -> AsyncIterator[Request]:
        """Yield what the client asks, after the greeting."""
        frames, greeted = requests(), False
        while data := await self._loop.sock_recv(self._socket, _RECEIVE_BYTES):
            for request in frames.feed(data):
                if greeted != (not isinstance(request, Hello)):
                    raise DataError("a connection begins with one greeting", kind=ErrorKind.PROTOCOL)
                if isinstance(request, Hello):
                    if request.version != PROTOCOL_VERSION:
                        raise DataError(
                            f"this cache server speaks protocol {PROTOCOL_VERSION}, the client {request.version}; "
                            "run the same release on both sides",
                            kind=ErrorKind.PROTOCOL,
                        )
                    greeted = True
                    await self._send(Welcome(PROTOCOL_VERSION, os.getpid()))
                else:
                    yield request

    async def _answer(self, request: Request) -> None:
        try:
            if isinstance(request, ReadBlocks):
                await self._send_blocks(request.refs)
                return
            with self._sign_of_life():
                reply = await self._reply(request)
        except DataError as error:
            reply = failure_of(error)
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001  a client waits, and others need the server
            _log.exception("a request failed in an unknown way")
            reply = failure_of(DataError(f"the cache server failed: {error!r}; its log says more"))
        if isinstance(reply, Object) and reply.data is not None and reply.size_bytes > INLINE_BYTES:
            await self._send_object(reply)
        elif isinstance(reply, Listing):
            await self._send_listing(reply)
        else:
            await self._send(reply)

    async def _reply(self, request: Request) -> Reply:
        match request:
            case ReadObject():
                data, version = await self._engine.get_object(request.uri)
                return Object(version, len(data), data)
            case ListObjects():
                return Listing(await self._engine.list_objects(request.url), last=True)
            case Head():
                return Meta(await self._engine.head(request.uri))
            case ReportBad():
                for key in request.keys:
                    await self._engine.report_bad(key)
                return Done()
            case Stats():
                return Statistics(self._server.stats())
            case _:
                raise DataError(f"{type(request).__name__} is not a request", kind=ErrorKind.PROTOCOL)

    async def _send_blocks(self, refs: Sequence[BlockRef]) -> None:
        slices = list(_slices(refs, max_blocks=self._limits.slice_blocks, max_bytes=self._limits.slice_bytes))
        if not slices:
            await self._send(Blocks([], last=True))
        for number, part in enumerate(slices, 1):
            with self._sign_of_life():
                found = await self._engine.get_many(part)
            with contextlib.ExitStack() as handles:
                for result in found:
                    if isinstance(result, Handle):
                        handles.enter_context(result)
                messages = list(_messages(found))
                for place, (items, fds) in enumerate(messages, 1):
                    last = number == len(slices) and place == len(messages)
                    await self._send(Blocks(items, last), fds)

    async def _send_object(self, reply: Object) -> None:
        assert reply.data is not None
        memory = (await asyncio.to_thread(seal_block, b"", reply.data)).memory
        await self._send(Object(reply.version, reply.size_bytes, None), [memory.fd])

    async def _send_listing(self, reply: Listing) -> None:
        objects = reply.objects
        for begin in range(0, max(len(objects), 1), _LISTING_PAGE):
            page = objects[begin : begin + _LISTING_PAGE]
            await self._send(Listing(page, last=begin + _LISTING_PAGE >= len(objects)))

    async def _send(self, reply: Reply, fds: Sequence[int] = ()) -> None:
        """Write one message. A client that does not take it in time is `TimeoutError`."""
        left = memoryview(encode(reply))
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        deadline_s: float | None = None
        while left:
            try:
                sent = self._socket.sendmsg([left], ancillary)
            except BlockingIOError:
                deadline_s = deadline_s or self._loop.time() + self._limits.write_timeout_s
                async with asyncio.timeout_at(deadline_s):
                    await self._writable()
                continue
            except OSError as error:
                if error.errno != errno.ETOOMANYREFS:
                    raise
                # Too many descriptors of this user are on their way to clients that do not take them.
                deadline_s = deadline_s or self._loop.time() + self._limits.write_timeout_s
                async with asyncio.timeout_at(deadline_s):
                    await asyncio.sleep(0.01)
                continue
            left, ancillary = left[sent:], []

    async def _writable(self) -> None:
        ready = asyncio.Event()
        descriptor = self._socket.fileno()
        self._loop.add_writer(descriptor, ready.set)
        try:
            await ready.wait()
        finally:
            self._loop.remove_writer(descriptor)

    @contextlib.contextmanager
    def _sign_of_life(self) -> Iterator[None]:
        """While the engine works, tell the client that it is at it; find out when the client has died."""
        task = asyncio.current_task()
        assert task is not None
        timer: asyncio.TimerHandle

        def beat() -> None:
            nonlocal timer
            try:
                self._socket.send(_WAITING_FRAME)
            except BlockingIOError:
                pass
            except OSError:
                task.cancel()
                return
            timer = self._loop.call_later(self._limits.heartbeat_s, beat)

        timer = self._loop.call_later(self._limits.heartbeat_s, beat)
        try:
            yield
        finally:
            timer.cancel()


def _slices(refs: Sequence[BlockRef], *, max_blocks: int, max_bytes: int) -> Iterator[Sequence[BlockRef]]:
    """Cut a request into parts within the limits; a block that is too large by itself is a part of its own. Pure."""
    begin, size_bytes = 0, 0
    for place, ref in enumerate(refs):
        if place > begin and (place - begin == max_blocks or size_bytes + ref.length > max_bytes):
            yield refs[begin:place]
            begin, size_bytes = place, 0
        size_bytes += ref.length
    if begin < len(refs):
        yield refs[begin:]


def _messages(found: Sequence[Handle | DataError]) -> Iterator[tuple[list[Inline | Passed | Failed], list[int]]]:
    """Pack results into messages: each has few enough descriptors and inline bytes."""
    items: list[Inline | Passed | Failed] = []
    fds: list[int] = []
    inline_bytes = 0
    for result in found:
        if len(fds) == MAX_DESCRIPTORS or inline_bytes > _MESSAGE_INLINE_BYTES:
            yield items, fds
            items, fds, inline_bytes = [], [], 0
        if isinstance(result, DataError):
            items.append(failure_of(result))
        elif result.length <= INLINE_BYTES and not result.verify:
            items.append(Inline(result.source, os.pread(result.fd, result.length, 0)))
            inline_bytes += result.length
        else:
            items.append(Passed(result.source, result.length, result.verify))
            fds.append(result.fd)
    if items:
        yield items, fds


def run_server(
    config: CacheConfig,
    listener: socket.socket,
    *,
    limits: ServerLimits | None = None,
    allowed_uids: Collection[int] = (),
    grace_s: float | None = None,
    on_ready: Callable[[], None],
    on_stop: Callable[[], None] = lambda: None,
) -> None:
    """Run a whole server in the main thread until SIGTERM, SIGINT or, for a private one, the end of its last user.

    A second signal ends the process at once; whatever is on disk then is whole, as after any kill.

    Args:
        config: Of its engine.
        listener: From `cache.address.listen`; given up at the end.
        limits: Of each client.
        allowed_uids: See `CacheServer`.
        grace_s: See `CacheServer`.
        on_ready: Called when clients are answered.
        on_stop: Called when a signal has begun the shutdown.

    Raises:
        DataError: The engine cannot start.
    """
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_run(config, listener, limits or ServerLimits(), allowed_uids, grace_s, on_ready, on_stop))
    finally:
        remove_socket(listener)


async def _run(
    config: CacheConfig,
    listener: socket.socket,
    limits: ServerLimits,
    allowed_uids: Collection[int],
    grace_s: float | None,
    on_ready: Callable[[], None],
    on_stop: Callable[[], None],
) -> None:
    engine = Engine(config, open_store=open_store)
    await engine.start()
    try:
        server = CacheServer(engine, listener, limits=limits, allowed_uids=allowed_uids, grace_s=grace_s)

        def on_signal(number: int) -> None:
            if server.stopping:
                remove_socket(listener)
                os._exit(128 + number)
            _log.info("signal %d: shutting down", number)
            server.stop()
            on_stop()

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
        on_ready()
        await server.serve()
    finally:
        await engine.close()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        from uvloop import new_event_loop
    except ImportError:
        return asyncio.new_event_loop
    return cast("Callable[[], asyncio.AbstractEventLoop]", new_event_loop)
