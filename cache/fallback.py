"""A ladder of readers: the first that is well answers. For daemons that die or dawdle, and machines where none starts.

Only `ServerGoneError` moves a call down a rung: nobody answered, and asking elsewhere gives the same bytes. Every other
error is about the data and is the caller's.

A rung that is slow but alive is left as well, after some slow answers in a row, each of which was right and was used.
An origin that is slow is slow for every rung, so time counts against a rung only where that is no excuse: it had all
blocks itself, or does not even answer a greeting. A rung that was left has to answer a greeting before a call is risked
on it, so a daemon that stays stopped costs one second in thirty and not its whole silence.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from cache.block_table import BlockTable
from cache.breaker import Breaker
from cache.connection import ServerGoneError
from cache.keys import BlockRef
from cache.reader import BlockData, BlockReader, ObjectData, PlanHandle, TakesPlans
from connectors.errors import BadInputError
from connectors.objects import ObjectMeta

__all__ = ["FallbackReader", "Greets"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_MAX_SLOW = 3
# A disk that gives less is not worth having; what it takes longer for is slow.
_SLOW_BYTES_PER_S = 16 << 20


@runtime_checkable
class Greets(Protocol):
    """What a reader with a server behind it can do as well."""

    def greet(self, timeout_s: float) -> None:
        """Exchange a greeting with the server, which needs nothing but the server; it is not started for it.

        Raises:
            ServerGoneError: There was none in time.
        """
        ...


class FallbackReader:
    """A `BlockReader` over others.

    Args:
        rungs: From the best to the last resort, each with what the log calls it.
        retry_s: A rung that failed or was slow is tried again after this time.
        slow_s: A call that takes longer is slow, with time for its bytes on top.
        greeting_s: Longest time for a greeting.
        clock: Seconds that only grow; tests give their own.
    """

    def __init__(
        self,
        rungs: Sequence[tuple[str, BlockReader]],
        *,
        retry_s: float = 30.0,
        slow_s: float = 2.0,
        greeting_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, value in {"slow_s": slow_s, "greeting_s": greeting_s}.items():
            if value <= 0:
                raise BadInputError(f"{name} must be > 0, got {value}")
        self._rungs = list(rungs)
        self._options = {"retry_s": retry_s, "slow_s": slow_s, "greeting_s": greeting_s}
        self._slow_s = slow_s
        self._greeting_s = greeting_s
        self._clock = clock
        self._breakers = [Breaker(retry_s=retry_s, max_slow=_MAX_SLOW) for _ in self._rungs]

    def __getstate__(self) -> dict[str, Any]:
        return {"rungs": self._rungs, "clock": self._clock, **self._options}

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
        for place, (name, reader) in enumerate(self._rungs[:-1]):
            breaker, below = self._breakers[place], self._rungs[place + 1][0]
            if breaker.is_open(self._clock()):
                continue
            begin_s = self._clock()
            try:
                if breaker.tripped:
                    self._greet(reader)
                result = call(reader)
            except ServerGoneError as error:
                if breaker.failed(self._clock()):
                    _log.warning("%s; going on with %s", str(error), below)
                continue
            if self._is_slow(reader, result, self._clock() - begin_s):
                if breaker.was_slow(self._clock()):
                    _log.warning("%s is slow: it was %d times in a row; going on with %s", name, _MAX_SLOW, below)
            elif breaker.was_fine():
                _log.warning("%s is back", name)
            return result
        return call(self._rungs[-1][1])

    def _is_slow(self, reader: BlockReader, result: object, seconds: float) -> bool:
        """Say whether a call was slow and nobody but the rung is to blame."""
        if seconds <= self._slow_s:
            return False
        blocks = [block for block in result if isinstance(block, BlockData)] if isinstance(result, list) else []
        if blocks and all(block.source != "origin" for block in blocks):
            return seconds > self._slow_s + sum(len(block.view) for block in blocks) / _SLOW_BYTES_PER_S
        try:
            self._greet(reader)
        except ServerGoneError:
            return True
        return False

    def _greet(self, reader: BlockReader) -> None:
        if isinstance(reader, Greets):
            reader.greet(self._greeting_s)
