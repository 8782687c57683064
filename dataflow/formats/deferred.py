"""A destination that is written to while the next object is being made.

One thread writes what it is given, in that order, so a record still follows the shard that it vouches for. After a put
that failed nothing more is written.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from dataflow.formats.destination import Destination

if TYPE_CHECKING:
    import os

    from connectors.protocols import Buffer

__all__ = ["DeferredDestination"]


class DeferredDestination(Destination):
    """A `Destination` whose `put` returns at once.

    Who puts bounds what is held: by waiting for one future before the object after the next is made.

    Args:
        url: The prefix.

    Attributes:
        last: Done when everything put so far has been written, with the first error if there was one.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        super().__init__(url)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="destination")
        self._failure: BaseException | None = None
        self.last: Future[None] = Future()
        self.last.set_result(None)

    def put(self, name: str, chunks: Iterable[Buffer]) -> None:
        """Write one object, atomically, after those before; what goes wrong is raised by `last`."""
        self.last = self._thread.submit(self._write, name, chunks)

    def close(self) -> None:
        """Wait for what is being written, and give back connections."""
        self._thread.shutdown()
        super().close()

    def _write(self, name: str, chunks: Iterable[Buffer]) -> None:
        if self._failure is not None:
            raise self._failure
        try:
            super().put(name, chunks)
        except BaseException as error:
            self._failure = error
            raise
