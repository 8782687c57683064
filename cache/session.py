"""One client of a cache server: its connection, its requests one after the other, its share of the server's time.

A client's further requests wait in its own socket buffer. A large request is worked on in slices: a client which does
not read holds at most `slice_bytes` of blocks, waits alone, and is hung up on after `write_timeout_s`. Descriptors that
were sent belong to the kernel and then to the client: whoever is killed, they are closed.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
    Welcome,
    encode,
    failure_of,
    requests,
)
from cache.handle import Handle, seal_block
from cache.heartbeat import Heartbeat
from cache.incoming import Incoming
from cache.keys import BlockRef
from cache.operation import Operation
from cache.orders import Order
from cache.reader_plan import ReaderPlan
from cache.rights import Rights
from cache.share import UserShare
from connectors.errors import BadInputError, DataError, ErrorKind, TransientError

__all__ = ["MAX_BLOCK_BYTES", "ServerLimits", "Session", "check_sizes", "pack_messages", "slice_refs"]

_log = logging.getLogger(__name__)

MAX_BLOCK_BYTES = 1 << 31
"""Largest block that a server fetches."""

_MESSAGE_INLINE_BYTES = 1024 * 1024
_LISTING_PAGE = 1000


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What one client may take and how long the server waits for it.

    Attributes:
        max_connections: More are refused.
        max_user_connections: More of one user are refused, so that others find room.
        slice_blocks: Blocks of one request held at once.
        slice_bytes: Bytes of one request held at once, at least one block.
        write_timeout_s: Longest time for a client to take what it asked for.
        heartbeat_s: A client that waits hears this often that the server lives.
        drain_s: Time for running requests at shutdown.
    """

    max_connections: int = 1024
    max_user_connections: int = 896
    slice_blocks: int = 256
    slice_bytes: int = 64 * 1024 * 1024
    write_timeout_s: float = 30.0
    heartbeat_s: float = 5.0
    drain_s: float = 10.0

    def __post_init__(self) -> None:
        for name in (
            "max_connections",
            "max_user_connections",
            "slice_blocks",
            "slice_bytes",
            "write_timeout_s",
            "heartbeat_s",
        ):
            if getattr(self, name) <= 0:
                raise BadInputError(f"{name} must be > 0, got {getattr(self, name)}")


class Session:
    """One connection, served by one task.

    Args:
        connection: Owned from here on.
        engine: Answers.
        limits: See there.
        stats: Gives the server's numbers.
        rights: What the user at the other end may read.
        share: What that user takes.

    Attributes:
        busy: Whether a request is being answered.
        requests: How many were, this one included.
        last: Set by the server: hang up after the answer under way.
    """

    def __init__(
        self,
        connection: socket.socket,
        engine: Engine,
        limits: ServerLimits,
        stats: Callable[[], dict[str, Any]],
        rights: Rights,
        share: UserShare,
    ) -> None:
        self.busy = False
        self.requests = 0
        self.last = False
        self._engine = engine
        self._limits = limits
        self._stats = stats
        self._rights = rights
        self._socket = connection
        self._share = share
        self._share.connections += 1
        self._plan = ReaderPlan(self._engine.prefetcher, rights, share)
        self._operation = Operation(engine, rights)
        self._job = ""
        self._loop = asyncio.get_running_loop()
        self._incoming = Incoming(connection)
        self._heartbeat = Heartbeat(connection, limits.heartbeat_s)

    async def serve(self) -> None:
        """Answer requests until either side has enough."""
        frames, greeted = requests(), False
        try:
            while data := await self._incoming.receive():
                for request in frames.feed(data):
                    if not greeted or isinstance(request, Hello):
                        await self._greet(request, greeted=greeted)
                        greeted = True
                        continue
                    self.busy = True
                    self.requests += 1
                    await self._answer(request)
                    self.busy = False
                    if self.last:
                        return
        except DataError as error:
            await self.refuse(error)
        except (ConnectionError, TimeoutError):
            pass  # gone, or asleep for too long: both are the client's own affair

    async def refuse(self, error: DataError) -> None:
        """Say why."""
        with contextlib.suppress(OSError):
            await self._send(failure_of(error))

    def close(self) -> None:
        """Hang up. For when the task has ended: one that is cancelled before its first step runs no line of its own."""
        self._incoming.close()
        self._heartbeat.close()
        self._plan.close()
        self._share.connections -= 1
        self._socket.close()

    async def _greet(self, request: Request, *, greeted: bool) -> None:
        if greeted or not isinstance(request, Hello):
            raise DataError("a connection begins with one greeting", kind=ErrorKind.PROTOCOL)
        if request.version != PROTOCOL_VERSION:
            raise DataError(
                f"this cache server speaks protocol {PROTOCOL_VERSION}, the client {request.version}; "
                "run the same release on both sides",
                kind=ErrorKind.PROTOCOL,
            )
        self._job = self._plan.job = request.job
        await self._send(Welcome(PROTOCOL_VERSION, os.getpid()))

    async def _answer(self, request: Request) -> None:
        try:
            if isinstance(request, ReadBlocks):
                self._rights.check(ref.uri for ref in request.refs)
                check_sizes(request.refs)
                await self._send_blocks(request.refs)
                return
            with self._heartbeat:
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
                self._rights.check([request.uri])
                data, version = await self._engine.get_object(request.uri)
                return Object(version, len(data), data)
            case ListObjects():
                self._rights.check_listing(request.url)
                return Listing(await self._engine.list_objects(request.url), last=True)
            case Head():
                self._rights.check([request.uri])
                return Meta(await self._engine.head(request.uri))
            case ReportBad():
                self._rights.check(ref.uri for ref in request.refs)
                for ref in request.refs:
                    await self._engine.report_bad(ref)
                return Done()
            case Stats():
                return Statistics(self._operation.visible(self._stats()))
            case _ if isinstance(request, Order):
                return await self._operation.answer(request)
            case Hello() | ReadBlocks():
                raise DataError(f"{type(request).__name__} is answered elsewhere", kind=ErrorKind.PROTOCOL)
            case _:
                return self._plan.answer(request)

    async def _send_blocks(self, refs: Sequence[BlockRef]) -> None:
        slices = list(slice_refs(refs, max_blocks=self._limits.slice_blocks, max_bytes=self._limits.slice_bytes))
        if not slices:
            await self._send(Blocks([], last=True))
        for number, part in enumerate(slices, 1):
            with self._heartbeat:
                found = await self._engine.get_many(part, job=self._job)
            try:
                messages = list(pack_messages(found))
                for place, (items, fds) in enumerate(messages, 1):
                    last = number == len(slices) and place == len(messages)
                    await self._send(Blocks(items, last), fds)
            finally:
                for result in found:
                    if isinstance(result, Handle):
                        result.close()

    async def _send_object(self, reply: Object) -> None:
        assert reply.data is not None
        try:
            memory = (await asyncio.to_thread(seal_block, b"", reply.data)).memory
        except OSError as error:
            reason = f"the cache server has no memory for an object of {reply.size_bytes} bytes: {error}"
            await self._send(failure_of(TransientError(reason)))
            return
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
                sent = self._socket.sendmsg([left], ancillary) if ancillary else self._socket.send(left)
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


def check_sizes(refs: Sequence[BlockRef]) -> None:
    """Refuse what would take too much of the server's memory at once. Pure."""
    for ref in refs:
        if ref.length > MAX_BLOCK_BYTES:
            raise BadInputError(
                f"a block of {ref.length} bytes of {ref.uri} is asked for; a server takes {MAX_BLOCK_BYTES} at most",
                uri=ref.uri,
            )


def slice_refs(refs: Sequence[BlockRef], *, max_blocks: int, max_bytes: int) -> Iterator[Sequence[BlockRef]]:
    """Cut a request into parts within the limits; a block that is too large by itself is a part of its own. Pure."""
    begin, size_bytes = 0, 0
    for place, ref in enumerate(refs):
        if place > begin and (place - begin == max_blocks or size_bytes + ref.length > max_bytes):
            yield refs[begin:place]
            begin, size_bytes = place, 0
        size_bytes += ref.length
    if begin < len(refs):
        yield refs[begin:]


def pack_messages(found: Sequence[Handle | DataError]) -> Iterator[tuple[list[Inline | Passed | Failed], list[int]]]:
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
