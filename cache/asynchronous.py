"""A reader for code that runs in an event loop: the synchronous one in threads, so there is one implementation.

Threads are no detour here: a block of a disk tier is read and verified, an object in a file is mapped, and none of that
may happen in a loop. A call costs a hand-over to a thread and back, some 0.1 ms, however many blocks it names.

Cancelling a call ends its request: the thread is woken and free for the next one, and the server notices that nobody
waits. What cannot be woken ends by itself within its own limits: a private server that is starting, a request that a
stopped server does not take, a file in place.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from cache.access import open_reader
from cache.config import CacheConfig
from cache.interruption import Interruption
from cache.keys import BlockRef
from cache.reader import BlockData, BlockReader, ObjectData
from connectors.errors import BadInputError
from connectors.objects import ObjectMeta

__all__ = ["AsyncReader", "open_async_reader"]

_R = TypeVar("_R")


async def open_async_reader(
    url: str | os.PathLike[str], cache: str | CacheConfig | None = "auto", *, verify: bool = True, max_calls: int = 16
) -> AsyncReader:
    """Open the right reader for everything below `url`, for use with `await`.

    Args:
        url: As for `open_reader`.
        cache: As for `open_reader`.
        verify: As for `open_reader`.
        max_calls: Calls at once; further ones wait.

    Raises:
        BadInputError: As `open_reader`.
    """
    return AsyncReader(await asyncio.to_thread(partial(open_reader, url, cache, verify=verify)), max_calls=max_calls)


class AsyncReader:
    """A `BlockReader` with coroutines in the place of its methods, which return and raise the same.

    It may be used from any number of tasks, loops and threads, from a forked child and as a pickled copy.

    Args:
        reader: Does the work; owned.
        max_calls: Calls at once; further ones wait.
    """

    def __init__(self, reader: BlockReader, *, max_calls: int = 16) -> None:
        if max_calls < 1:
            raise BadInputError(f"max_calls must be >= 1, got {max_calls}")
        self.reader = reader
        self._max_calls = max_calls
        self._start()

    def _start(self) -> None:
        self._owner_pid = os.getpid()
        self._threads = ThreadPoolExecutor(self._max_calls, thread_name_prefix="cache-call")

    def __getstate__(self) -> dict[str, Any]:
        return {"reader": self.reader, "max_calls": self._max_calls}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["reader"], max_calls=state["max_calls"])  # type: ignore[misc]

    async def read_blocks(self, refs: Sequence[BlockRef]) -> list[BlockData]:
        """Return the blocks in the order of `refs`; one request, however many. Views live as long as they are held."""
        return await self._call(lambda: self.reader.read_blocks(refs))

    async def read_object(self, uri: str) -> ObjectData:
        """Return the newest content of a small object, never from the cache."""
        return await self._call(lambda: self.reader.read_object(uri))

    async def head(self, uri: str) -> ObjectMeta:
        """Return size and version that an object has now; its key is relative to its store."""
        return await self._call(lambda: self.reader.head(uri))

    async def list_objects(self, url: str) -> list[ObjectMeta]:
        """Return every object below `url`, sorted, keys relative to it."""
        return await self._call(lambda: self.reader.list_objects(url))

    async def stats(self) -> dict[str, Any]:
        """Return plain numbers as JSON types, as the reader does."""
        return await self._call(self.reader.stats)

    async def aclose(self) -> None:
        """Let calls under way end, then hang up. Views already handed out stay valid, a later call connects again."""
        threads = self._threads
        self._start()
        await asyncio.to_thread(threads.shutdown)
        await asyncio.to_thread(self.reader.close)

    async def __aenter__(self) -> AsyncReader:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _call(self, call: Callable[[], _R]) -> _R:
        if self._owner_pid != os.getpid():
            self._start()  # the threads stayed with the parent
        interruption = Interruption()
        future = self._threads.submit(interruption.run, call)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            interruption.interrupt()
            raise
