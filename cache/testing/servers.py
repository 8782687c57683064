"""Servers for tests: a real engine and server on a thread of the test's own process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cache.address import listen, remove_socket, unused_address
from cache.config import CacheConfig
from cache.engine import Engine
from cache.rights import AccessConfig
from cache.server import CacheServer, ServerLimits
from connectors.protocols import Store
from connectors.registry import open_store

__all__ = ["RunningServer", "running_server"]


@dataclass(frozen=True)
class RunningServer:
    """A server under test."""

    address: str
    server: CacheServer
    loop: asyncio.AbstractEventLoop

    def stop(self) -> None:
        """Begin the shutdown, unless it has happened."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.server.stop)


@contextlib.contextmanager
def running_server(
    config: CacheConfig | None = None,
    *,
    address: str | None = None,
    limits: ServerLimits | None = None,
    store_opener: Callable[[str], Store] = open_store,
    grace_s: float | None = None,
    access: AccessConfig | None = None,
) -> Iterator[RunningServer]:
    """Serve until the context ends; an abstract address of its own unless one is given."""
    address = address or unused_address()
    listener = listen(address)
    running: list[RunningServer] = []
    ready = threading.Event()

    async def run() -> None:
        engine = Engine(config or CacheConfig(), open_store=store_opener)
        await engine.start()
        server = CacheServer(engine, listener, limits=limits or ServerLimits(), grace_s=grace_s, access=access)
        running.append(RunningServer(address, server, asyncio.get_running_loop()))
        ready.set()
        await server.serve()
        await engine.close()

    thread = threading.Thread(target=lambda: asyncio.run(run()), name="server under test")
    thread.start()
    try:
        ready.wait()
        yield running[0]
    finally:
        running[0].stop()
        thread.join()
        remove_socket(listener)
