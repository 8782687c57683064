"""The stores of one engine: each root is opened once, and those that nobody uses are closed again, oldest use first.

Without a limit, a daemon that many users ask for many buckets would keep a client for each of them for ever. Room is
made before another store is opened, and only among stores without a user. Whoever uses one holds a request of the
budget, which bounds those that cannot be closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from dataclasses import dataclass

from connectors.hedge import HedgedStore
from connectors.objects import split_uri
from connectors.protocols import Store

__all__ = ["OpenStores"]

_log = logging.getLogger(__name__)

# Reads of these are threads or copies, which a second one would not make faster.
_NEAR = ("file:", "memory:")


@dataclass(slots=True)
class _Open:
    store: Store
    users: int = 0


class OpenStores:
    """Belongs to the event loop's thread.

    Args:
        open_store: Opens the store for a root URL.
        executor: Threads to open stores in: that may import a client and read credentials.
        hedge: Whether reads of remote stores are sent a second time where they are slow (`connectors.hedge`).
        max_open: Past it, a store without a user is closed before another one is opened.
    """

    def __init__(self, open_store: Callable[[str], Store], *, executor: Executor, hedge: bool, max_open: int) -> None:
        self._open_store = open_store
        self._executor = executor
        self._hedge = hedge
        self._max_open = max_open
        # In the order of their last use.
        self._open: dict[str, _Open] = {}
        self._opening = asyncio.Lock()
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
        found = self._open.get(root)
        if found is None:
            # One at a time, so once each.
            async with self._opening:
                found = self._open.get(root) or await self._begin(root)
                found.users += 1
        else:
            found.users += 1
        try:
            yield found.store, key
        finally:
            found.users -= 1
            if self._open.get(root) is found:
                self._open[root] = self._open.pop(root)

    async def close(self) -> None:
        """Close every store."""
        found, self._open = self._open, {}
        for one in found.values():
            await self._end(one.store)

    def hedges(self) -> tuple[int, int]:
        """Return how many reads were sent a second time, and how many of those were won."""
        hedged = [one.store for one in self._open.values() if isinstance(one.store, HedgedStore)]
        return self._sent + sum(store.sent for store in hedged), self._won + sum(store.won for store in hedged)

    async def _begin(self, root: str) -> _Open:
        idle = [other for other, one in self._open.items() if not one.users]
        # Closing takes a while, in which nobody may come for one that is to be closed.
        leaving = [self._open.pop(other) for other in idle[: max(0, len(self._open) - self._max_open + 1)]]
        for one in leaving:
            await self._end(one.store)
        store = await asyncio.get_running_loop().run_in_executor(self._executor, self._open_store, root)
        near = root.startswith(_NEAR)
        found = self._open[root] = _Open(HedgedStore(store) if self._hedge and not near else store)
        return found

    async def _end(self, store: Store) -> None:
        if isinstance(store, HedgedStore):
            self._sent += store.sent
            self._won += store.won
        try:
            await store.close()
        except Exception:  # noqa: BLE001  whoever waits has another store in mind
            _log.exception("%s could not be closed", store.url)
