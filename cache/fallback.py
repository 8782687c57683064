"""A ladder of readers: the first that is there answers. For daemons that die, and machines where none can be started.

Only `ServerGoneError` moves a call down a rung: nobody answered, and asking elsewhere gives the same bytes. Every other
error is about the data and is the caller's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from cache.block_table import BlockTable
from cache.connection import ServerGoneError
from cache.keys import BlockRef
from cache.reader import BlockData, BlockReader, ObjectData, PlanHandle, TakesPlans
from connectors.objects import ObjectMeta

__all__ = ["FallbackReader"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class FallbackReader:
    """A `BlockReader` over others.

    Args:
        rungs: From the best to the last resort, each with what the log calls it.
        retry_s: A rung that failed is tried again after this time.
        clock: Seconds that only grow; tests give their own.
    """

    def __init__(
        self,
        rungs: Sequence[tuple[str, BlockReader]],
        *,
        retry_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rungs = list(rungs)
        self._retry_s = retry_s
        self._clock = clock
        self._down_until_s: dict[int, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"rungs": self._rungs, "retry_s": self._retry_s, "clock": self._clock}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def read_blocks(self, refs: Sequence[BlockRef]) -> list[BlockData]:
        """See `BlockReader`; the source tells which rung it was."""
        return self._first(lambda reader: reader.read_blocks(refs))

    def read_object(self, uri: str) -> ObjectData:
        """See `BlockReader`."""
        return self._first(lambda reader: reader.read_object(uri))

    def head(self, uri: str) -> ObjectMeta:
        """See `BlockReader`."""
        return self._first(lambda reader: reader.head(uri))

    def list_objects(self, url: str) -> list[ObjectMeta]:
        """See `BlockReader`."""
        return self._first(lambda reader: reader.list_objects(url))

    def open_plan(self, table: BlockTable) -> PlanHandle | None:
        """See `cache.reader.TakesPlans`; the plan is for the rung in use now."""
        return self._first(lambda reader: reader.open_plan(table) if isinstance(reader, TakesPlans) else None)

    def stats(self) -> dict[str, Any]:
        """Return the numbers of the reader in use."""
        return self._first(lambda reader: reader.stats())

    def close(self) -> None:
        """Close all of them."""
        for _, reader in self._rungs:
            reader.close()

    def _first(self, call: Callable[[BlockReader], _T]) -> _T:
        last = len(self._rungs) - 1
        for place, (name, reader) in enumerate(self._rungs):
            if place < last and self._clock() < self._down_until_s.get(place, 0.0):
                continue
            try:
                result = call(reader)
            except ServerGoneError as error:
                if place == last:
                    raise
                if place not in self._down_until_s:
                    _log.warning("%s; going on with %s", str(error), self._rungs[place + 1][0])
                self._down_until_s[place] = self._clock() + self._retry_s
            else:
                if self._down_until_s.pop(place, None) is not None:
                    _log.warning("%s is back", name)
                return result
        raise AssertionError("the last rung returns or raises")
