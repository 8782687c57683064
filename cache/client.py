"""The client: a `BlockReader` that asks a cache server.

Threads share a client; each call takes a connection of its own out of a small pool, so nothing is multiplexed. A forked
child closes what it inherited and makes its own connections (a server counts its users by connections), a pickled copy
likewise.

A server that dies in the middle of an answer costs nothing but time: what has arrived is kept, the rest is asked again.
A private server is started again under the same address first. Reading is idempotent, so asking twice is right.

A copy that turns out to be corrupt is reported, and the block asked again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from cache.block_table import BlockTable
from cache.config import CacheConfig
from cache.connection import Connection, ServerGoneError
from cache.frames import Done, Head, Meta, Reply, ReportBad, Request, Statistics, Stats
from cache.keys import BlockRef
from cache.plan_link import PlanLink
from cache.private import ServerLog, start_server
from cache.questions import ask, ask_blocks, ask_listing, ask_object, cut_batches
from cache.reader import BlockData, ObjectData
from connectors.errors import BadInputError, CorruptError, DataError, ErrorKind
from connectors.objects import ObjectMeta

__all__ = ["CacheClient", "ClientOptions"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_R = TypeVar("_R", bound=Reply)


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """How patient a client is.

    Attributes:
        silence_timeout_s: Longest time without a sign of life from the server, which gives one every 5 s.
        start_timeout_s: Longest time for a private server to come up.
        max_attempts: Times that one request is begun, each with a live server that then dies.
        max_reads: Times that a block is read whose copy in the cache turns out to be corrupt.
        max_idle: Connections kept for later calls.
    """

    silence_timeout_s: float = 30.0
    start_timeout_s: float = 60.0
    max_attempts: int = 8
    max_reads: int = 3
    max_idle: int = 4

    def __post_init__(self) -> None:
        for name in ("silence_timeout_s", "start_timeout_s", "max_attempts", "max_reads", "max_idle"):
            if getattr(self, name) <= 0:
                raise BadInputError(f"{name} must be > 0, got {getattr(self, name)}")


class CacheClient:
    """A `BlockReader` that asks the server at an address.

    Args:
        address: A daemon's socket path, or `@name`.
        private: Configuration with which a dead server is started again; None leaves that to whoever runs the daemon.
        options: See there.
    """

    def __init__(
        self, address: str, *, private: CacheConfig | None = None, options: ClientOptions | None = None
    ) -> None:
        self.address = address
        self._private = private
        self._options = options or ClientOptions()
        self._was_taken = False
        self._reset()
        _clients.add(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._connections: set[Connection] = set()
        self._plans: weakref.WeakSet[PlanLink] = weakref.WeakSet()
        self._server_log: ServerLog | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {
            "address": self.address,
            "private": self._private,
            "options": self._options,
            "was_taken": self._was_taken,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["address"], private=state["private"], options=state["options"])  # type: ignore[misc]
        self._was_taken = state["was_taken"]

    def read_blocks(self, refs: Sequence[BlockRef]) -> list[BlockData]:
        """Return the blocks in the order of `refs`, by one request (one per 4,096 blocks).

        Raises:
            ServerGoneError: No server answers, and none could be started.
            DataError: The first block that could not be had says why.
        """
        results: list[BlockData | DataError | None] = [None] * len(refs)
        for _ in range(self._options.max_reads):
            for batch in cut_batches(refs, _missing(results)):
                self._with_server(partial(ask_blocks, refs, batch, results))
            bad = _missing(results)
            if not bad:
                break
            for batch in cut_batches(refs, bad):
                self._with_server(partial(ask, ReportBad([refs[place] for place in batch]), Done))
        try:
            return [_settle(ref, result) for ref, result in zip(refs, results, strict=True)]
        finally:
            # An error among them refers to this frame, a circle in which the blocks would stay until a collection.
            results.clear()

    def read_object(self, uri: str) -> ObjectData:
        """Return the newest content of a small object, past the cache."""
        return self._with_server(partial(ask_object, uri))

    def list_objects(self, url: str) -> list[ObjectMeta]:
        """Return every object below `url`, sorted, keys relative to it."""
        return self._with_server(partial(ask_listing, url))

    def head(self, uri: str) -> ObjectMeta:
        """Return size and version of an object; its key is relative to its store."""
        return self._with_server(partial(ask, Head(uri), Meta)).meta

    def ask(self, request: Request, expected: type[_R]) -> _R:
        """Ask what is answered by one message of the type `expected`; repeated where a server dies over it.

        Raises:
            DataError: What the server answers instead, or that there is none.
        """
        return self._with_server(partial(ask, request, expected))

    def stats(self) -> dict[str, Any]:
        """Return the server's numbers, which concern all of its clients."""
        return self._with_server(partial(ask, Stats(), Statistics)).stats

    def greet(self, timeout_s: float) -> None:
        """Exchange a greeting with the server, on a connection of its own; a private one is not started for it.

        Raises:
            ServerGoneError: Nobody answers within `timeout_s`.
        """
        self._greeted(timeout_s).close()

    def open_plan(self, table: BlockTable) -> PlanLink:
        """Begin a plan over a table of blocks; see `cache.reader.TakesPlans`."""
        link = PlanLink(self._connect(), table)
        self._plans.add(link)
        return link

    def close(self) -> None:
        """Hang up. Views already handed out stay valid, calls under way end in peace, a later call connects again."""
        with self._lock:
            idle, self._idle = self._idle, []
            self._connections.clear()
            log, self._server_log = self._server_log, None
        for connection in idle:
            connection.close()
        if log is not None:
            log.drain()
            log.close()

    def _with_server(self, work: Callable[[Connection], _T | DataError]) -> _T:
        """Do `work` with a connection, again with another one when the server dies under it."""
        for attempt in range(1, self._options.max_attempts + 1):
            connection = self._take()
            try:
                result = work(connection)
            except ServerGoneError as error:
                self._hang_up(connection)
                self._forget_idle()
                if attempt == self._options.max_attempts or error.kind is ErrorKind.TIMEOUT:
                    raise
                _log.info("asking again: %s", str(error))
                continue
            except BaseException:
                self._replace(connection)  # in the middle of an answer, of no further use
                raise
            self._give_back(connection)
            if isinstance(result, DataError):
                raise result
            return result
        raise AssertionError("the last attempt returns or raises")

    def _replace(self, connection: Connection) -> None:
        """Hang up in the middle of an answer, but not as the last one: a private server would end, and its memory."""
        with self._lock:
            last = self._private is not None and not self._idle
        try:
            if last:
                with contextlib.suppress(DataError):
                    self._give_back(self._take())
        finally:
            self._hang_up(connection)

    def _hang_up(self, connection: Connection) -> None:
        with self._lock:
            self._connections.discard(connection)
        connection.close()

    def _take(self) -> Connection:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        connection = self._connect()
        with self._lock:
            self._connections.add(connection)
        return connection

    def _give_back(self, connection: Connection) -> None:
        with self._lock:
            keep = connection in self._connections and len(self._idle) < self._options.max_idle
            if keep:
                self._idle.append(connection)
            else:
                self._connections.discard(connection)
            log = self._server_log
        if not keep:
            connection.close()
        if log is not None:
            log.drain()

    def _forget_idle(self) -> None:
        """Hang up on connections to a server that has died."""
        with self._lock:
            idle, self._idle = self._idle, []
            self._connections.difference_update(idle)
        for connection in idle:
            connection.close()

    def _connect(self) -> Connection:
        for attempt in range(1, self._options.max_attempts + 1):
            try:
                return self._greeted(self._options.silence_timeout_s)
            except ServerGoneError as error:
                nobody = error.kind is ErrorKind.UNREACHABLE
                if self._private is None or not nobody or attempt == self._options.max_attempts:
                    raise
                self._start(self._private)
        raise AssertionError("the last attempt returns or raises")

    def _greeted(self, timeout_s: float) -> Connection:
        """Return a new connection; who took this client before and refuses it now has another in its place."""
        try:
            connection = Connection(self.address, timeout_s=timeout_s)
        except DataError as error:
            if isinstance(error, ServerGoneError) or not self._was_taken:
                raise
            raise ServerGoneError(str(error), kind=error.kind) from error
        self._was_taken = True
        return connection

    def _start(self, config: CacheConfig) -> None:
        log = start_server(self.address, config, timeout_s=self._options.start_timeout_s)
        if log is None:
            return
        with self._lock:
            before, self._server_log = self._server_log, log
        if before is not None:
            before.drain()
            before.close()

    def _leave_to_parent(self) -> None:
        """In a forked child: hang up on what belongs to the parent, whatever its threads were doing with it."""
        connections, plans, log = self._connections, self._plans, self._server_log
        self._reset()
        for connection in connections:
            connection.close()
        for plan in plans:
            plan.close()
        if log is not None:
            log.close()


_clients: weakref.WeakSet[CacheClient] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for client in list(_clients):
        client._leave_to_parent()  # noqa: SLF001  this module's own


os.register_at_fork(after_in_child=_after_fork_in_child)


def _missing(results: Sequence[BlockData | DataError | None]) -> list[int]:
    return [place for place, result in enumerate(results) if result is None]


def _settle(ref: BlockRef, result: BlockData | DataError | None) -> BlockData:
    if result is None:
        raise CorruptError(
            f"every copy of the block of {ref.length} bytes at offset {ref.offset} of {ref.uri} that the cache gave is "
            "corrupt; look at the disks of the cache",
            uri=ref.uri,
        )
    if isinstance(result, DataError):
        raise result
    return result
