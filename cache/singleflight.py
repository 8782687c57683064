"""One piece of work per key, many waiters. Pure bookkeeping on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["SingleFlight"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class SingleFlight(Generic[K, V]):
    """The work under way, by key.

    Waiters wait with `asyncio.wait`, which does not cancel what it waits for: one that gives up takes nothing from the
    others. A failure is a value like any other, so a flight without waiters leaves no unseen exception.

    Attributes:
        joined: How often somebody found the work already under way.
    """

    def __init__(self) -> None:
        self.joined = 0
        self._flights: dict[K, asyncio.Future[V]] = {}

    def join(self, key: K) -> asyncio.Future[V] | None:
        """Return the flight for `key`, None where there is none."""
        flight = self._flights.get(key)
        self.joined += flight is not None
        return flight

    def begin(self, key: K) -> asyncio.Future[V]:
        """Open a flight; whoever does must `land` it, whatever happens."""
        flight = self._flights[key] = asyncio.get_running_loop().create_future()
        return flight

    def __contains__(self, key: K) -> bool:
        return key in self._flights

    def withdraw(self, key: K) -> None:
        """End a flight that nobody has joined: whoever comes next starts anew."""
        del self._flights[key]

    def land(self, key: K, value: V) -> None:
        """End a flight: all who wait get `value`, and whoever comes next starts anew."""
        self._flights.pop(key).set_result(value)
