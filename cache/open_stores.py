"""The stores of one engine: each root is opened once, and those that nobody uses are closed again, oldest use first.

Without a limit, a daemon that many users ask for many buckets would keep a client for each of them for ever. Room is
made before another store is opened, and only among stores without a user. Whoever uses one holds a request of the
budget, which bounds those that cannot be closed.

Opening one may take minutes, as where a host does not answer. It takes a thread of its own, also when all who asked for
it have gone, so only those wait for it who want it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from connectors.hedge import HedgedStore
from connectors.objects import split_uri
from connectors.protocols import Store

__all__ = ["OpenStores"]

_log = logging.getLogger(__name__)

# Reads of these are threads or copies, which a second one would not make faster.
_NEAR = ("file:", "memory:")
_OPENING_THREADS = 16


@dataclass(slots=True)
class _Open:
    store: Store
    users: int = 0


class OpenStores:
    """Belongs to the event loop's thread.

    Args:
        open_store: Opens the store for a root URL; called in threads, as it may import a client and read credentials.
        hedge: Whether reads of remote stores are sent a second time where they are slow (`connectors.hedge`).
        max_open: Past it, a store without a user is closed before another one is opened.
    """

    def __init__(self, open_store: Callable[[str], Store], *, hedge: bool, max_open: int) -> None:
        self._open_store = open_store
        self._threads = ThreadPoolExecutor(_OPENING_THREADS, thread_name_prefix="cache-open")
        self._hedge = hedge
        self._max_open = max_open
        # In the order of their last use.
        self._open: dict[str, _Open] = {}
        self._opening: dict[str, asyncio.Task[None]] = {}
        # Of stores that are closed.
        self._sent = self._won = 0

    def __len__(self) -> int:
        return len(self._open)

    @contextlib.asynccontextmanager
    async def use(self, uri: str) -> AsyncIterator[tuple[Store, str]]:
        """Hold the store of an object open for the length of the context; with it comes the object's key.

        Raises:
            DataError: It cannot be opened.
        """
        root, key = split_uri(uri)
        # Before its first user comes back to it, another one may have taken its room.
        while (found := self._open.get(root)) is None:
            opening = self._opening.get(root)
            if opening is None:
                opening = self._opening[root] = asyncio.create_task(self._begin(root))
                opening.add_done_callback(partial(self._opened, root))
            await asyncio.shield(opening)
        found.users += 1
        try:
            yield found.store, key
        finally:
            found.users -= 1
            if self._open.get(root) is found:
                self._open[root] = self._open.pop(root)

    async def close(self) -> None:
        """Close every store. One that is just being opened is waited for by nobody."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for opening in self._opening.values():
            opening.cancel()
        found, self._open = self._open, {}
        for one in found.values():
            await self._end(one.store)

    def hedges(self) -> tuple[int, int]:
        """Return how many reads were sent a second time, and how many of those were won."""
        hedged = [one.store for one in self._open.values() if isinstance(one.store, HedgedStore)]
        return self._sent + sum(store.sent for store in hedged), self._won + sum(store.won for store in hedged)

    def _opened(self, root: str, opening: asyncio.Task[None]) -> None:
        del self._opening[root]
        if not opening.cancelled():
            opening.exception()  # for whoever still waits; where nobody does, it is nobody's

    async def _begin(self, root: str) -> None:
        idle = [other for other, one in self._open.items() if not one.users]
        # Closing takes a while, in which nobody may come for one that is to be closed.
        surplus = max(0, len(self._open) + len(self._opening) - self._max_open)
        leaving = [self._open.pop(other) for other in idle[:surplus]]
        for one in leaving:
            await self._end(one.store)
        store = await asyncio.get_running_loop().run_in_executor(self._threads, self._open_store, root)
        near = root.startswith(_NEAR)
        self._open[root] = _Open(HedgedStore(store) if self._hedge and not near else store)

    async def _end(self, store: Store) -> None:
        if isinstance(store, HedgedStore):
            self._sent += store.sent
            self._won += store.won
        try:
            await store.close()
        except Exception:  # noqa: BLE001  whoever waits has another store in mind
            _log.exception("%s could not be closed", store.url)
