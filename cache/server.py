"""The cache server: an engine behind a unix socket. A daemon and a private server differ only in when they end.

Shutdown, in this order: stop accepting; hang up on idle clients; let the others have the answer they wait for, until
`drain_s`; hang up on the rest; close the engine; give up the address. The address comes last because it stands for the
cache directories: who can bind it can lock them. Clients see a closed connection and ask again elsewhere.

A private server ends the same way when its last connection has closed, or when none came during its first `grace_s`. A
client that connects in just that moment finds the connection closed, and starts a new server.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from cache.address import peer, remove_socket
from cache.allocator import keep_freed_memory
from cache.config import CacheConfig
from cache.engine import Engine
from cache.rights import AccessConfig, Rights
from cache.session import ServerLimits, Session
from cache.share import UserShare
from connectors.errors import DataError, PermissionDeniedError, TransientError
from connectors.registry import open_store

__all__ = ["CacheServer", "ServerLimits", "run_server"]

_log = logging.getLogger(__name__)

_ACCEPT_AGAIN_S = 0.1


class CacheServer:
    """Serves an engine on a listening socket. Belongs to one event loop.

    Args:
        engine: Started by the caller, closed by the caller after `serve`.
        listener: From `cache.address.listen`; the caller gives it up at the very end.
        limits: See there.
        access: Who may ask, and for what; by default whoever may open the socket's file, for everything.
        grace_s: None for a daemon; a private server ends with its last connection, or after this time without any.
    """

    def __init__(
        self,
        engine: Engine,
        listener: socket.socket,
        *,
        limits: ServerLimits,
        access: AccessConfig | None = None,
        grace_s: float | None = None,
    ) -> None:
        self.engine = engine
        self.limits = limits
        self._listener = listener
        self._access = access or AccessConfig()
        if self._access.allowed_uids is None and not isinstance(listener.getsockname(), str):
            # An abstract socket has no file whose permissions could decide.
            self._access = replace(self._access, allowed_uids=())
        self._grace_s = grace_s
        self._started_s = time.monotonic()
        self._stop = asyncio.Event()
        self._sessions: dict[asyncio.Task[None], Session] = {}
        # One a user, whoever that is of the few that a machine has; kept when the user has gone.
        self._shares: dict[int, UserShare] = {}
        self._ended_requests = 0
        self._accepting_again: asyncio.TimerHandle | None = None

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
        self._begin_accepting()
        if self._grace_s is not None:
            asyncio.get_running_loop().call_later(self._grace_s, self._end_if_unused)
        await self._stop.wait()
        self._end_accepting()
        for task, session in self._sessions.items():
            session.last = True
            if not session.busy:
                task.cancel()
        if self._sessions:
            await asyncio.wait(list(self._sessions), timeout=self.limits.drain_s)
        for task in self._sessions:
            task.cancel()
        if self._sessions:
            await asyncio.wait(list(self._sessions))

    def stats(self) -> dict[str, Any]:
        """Return the engine's numbers and the server's own."""
        server = {
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - self._started_s, 3),
            "connections": len(self._sessions),
            "requests": self._ended_requests + sum(session.requests for session in self._sessions.values()),
        }
        return {**self.engine.stats(), "server": server}

    # A callback and not a task that awaits: one cancelled while a connection comes in would lose it, unclosed.
    def _begin_accepting(self) -> None:
        self._accepting_again = None
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _end_accepting(self) -> None:
        asyncio.get_running_loop().remove_reader(self._listener)
        if self._accepting_again is not None:
            self._accepting_again.cancel()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # out of descriptors or memory: those who wait, wait on
            _log.warning("cannot accept a connection: %s", error)
            self._end_accepting()
            self._accepting_again = asyncio.get_running_loop().call_later(_ACCEPT_AGAIN_S, self._begin_accepting)
            return
        connection.setblocking(False)
        pid, uid = peer(connection)
        share = self._shares.setdefault(uid, UserShare())
        refusal = self._refusal(pid, uid, share)
        session = Session(connection, self.engine, self.limits, self.stats, Rights(self._access, uid), share)
        task = asyncio.create_task(session.serve() if refusal is None else session.refuse(refusal))
        self._sessions[task] = session
        task.add_done_callback(self._gone)

    def _refusal(self, pid: int, uid: int, share: UserShare) -> DataError | None:
        if not self._access.may_ask(uid):
            _log.warning("refused process %d of user %d", pid, uid)
            return PermissionDeniedError(f"user {uid} may not use this cache server; its owner has to allow it")
        if len(self._sessions) >= self.limits.max_connections:
            return TransientError(f"the cache server has its {self.limits.max_connections} connections already")
        if share.connections >= self.limits.max_user_connections:
            return TransientError(f"user {uid} has {share.connections} connections to the cache server already")
        return None

    def _gone(self, task: asyncio.Task[None]) -> None:
        session = self._sessions.pop(task)
        session.close()
        self._ended_requests += session.requests
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("serving a client failed", exc_info=error)
        if not self._sessions:
            self.engine.prefetcher.nobody_reads()
        if self._grace_s is not None:
            self._end_if_unused()

    def _end_if_unused(self) -> None:
        if not self._sessions:
            self.stop()


def run_server(
    config: CacheConfig,
    listener: socket.socket,
    *,
    limits: ServerLimits | None = None,
    access: AccessConfig | None = None,
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
        access: See `CacheServer`.
        grace_s: See `CacheServer`.
        on_ready: Called when clients are answered.
        on_stop: Called when a signal has begun the shutdown.

    Raises:
        DataError: The engine cannot start.
    """
    keep_freed_memory()
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_run(config, listener, limits or ServerLimits(), access, grace_s, on_ready, on_stop))
    finally:
        remove_socket(listener)


async def _run(
    config: CacheConfig,
    listener: socket.socket,
    limits: ServerLimits,
    access: AccessConfig | None,
    grace_s: float | None,
    on_ready: Callable[[], None],
    on_stop: Callable[[], None],
) -> None:
    engine = Engine(config, open_store=open_store)
    await engine.start()
    try:
        server = CacheServer(engine, listener, limits=limits, access=access, grace_s=grace_s)

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
