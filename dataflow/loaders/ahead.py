"""What iterators share whose batches are made ahead, by processes or by threads: which of them is handed out when."""

from __future__ import annotations

import math
import operator
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from dataflow.loaders.iterators import LoaderIterator
from dataflow.loaders.rehearsal import WORKERS_OPENING
from dataflow.loaders.state import Ledger

if TYPE_CHECKING:
    from dataflow.loaders.dataloader import DataLoader

__all__ = ["AheadIterator"]

_T = TypeVar("_T")


class AheadIterator(LoaderIterator):
    """Hands out what workers make, in the order in which it was drawn or in which it arrives.

    A kind of worker adds `_attend(timeout_s)`, which deals with what the workers did and says whether there was
    anything, `_dispatch(number)`, which asks for so many more batches and for those that are still due,
    `_deliver(number)`, which hands a batch to the caller, and `_shutdown_workers()`.
    """

    _opening = WORKERS_OPENING

    def __init__(self, loader: DataLoader[Any], ledger: Ledger) -> None:
        super().__init__(loader, ledger)
        self._prefetch_factor = operator.index(loader.prefetch_factor or 0)
        if self._prefetch_factor <= 0:
            raise AssertionError("prefetch_factor must be greater than 0 for MultiProcessingDataLoaderIter")
        self._in_order = loader.in_order
        self._restarts_workers = loader.on_worker_failure == "restart"
        self._deadline_s = float(math.inf if loader.worker_deadline_s is None else loader.worker_deadline_s)
        self._failure: RuntimeError | None = None

    def _begin_owing(self) -> None:
        """Begin an epoch, of which nothing was asked for yet."""
        # By number, in the order in which they were drawn; each has `made` once it is here.
        self._owed: dict[int, Any] = {}
        self._arrived: deque[int] = deque()  # where batches are handed out as they arrive

    def _next_data(self) -> Any:
        self._is_torn = True
        while True:
            if self._failure is not None:
                raise self._failure
            number = self._find_ready()
            if number is not None:
                return self._deliver(number)
            if not self._owed:
                self._dispatch(0)  # after errors there may be more to ask for
            if not self._owed:
                self._end_epoch()
                if not self._persistent_workers:
                    self._shutdown_workers()
                raise StopIteration
            if not self._attend(float(self._timeout) or None):
                raise RuntimeError(f"DataLoader timed out after {self._timeout} seconds")

    def _end_epoch(self) -> None:
        self._progress.finished = True

    def _wait(self, wait: Callable[[float | None], _T], until_s: float) -> _T:
        """Wait for the workers, until then on the monotonic clock. An interrupt meanwhile tears nothing."""
        timeout_s = None if until_s == math.inf else max(0.0, until_s - time.monotonic())
        is_torn, self._is_torn = self._is_torn, False
        found = wait(timeout_s)
        self._is_torn = is_torn
        return found

    def _find_ready(self) -> int | None:
        """Return the number of the batch to hand out now, if it is here."""
        if not self._in_order:
            return self._arrived[0] if self._arrived else None
        number = next(iter(self._owed), None)
        return None if number is None or self._owed[number].made is None else number
