"""Batches from threads of this process, put in order.

For datasets whose work lets go of the interpreter's lock: reading, decompression, decoding, numpy and arrow. Nothing is
handed over, nothing is pickled, and nothing is started that could be left behind.

Indices are drawn when worker processes would draw them, so the order is theirs. A map-style dataset is used by all
threads at once; a stream cannot be, so one thread reads it, as a loader without workers would.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterDataPipe, MapDataPipe, graph_settings

from dataflow.loaders.ahead import AheadIterator
from dataflow.loaders.collate import Fetch
from dataflow.loaders.dataset_state import open_at, take_state
from dataflow.loaders.depth import AHEAD_BYTES, MAX_DEPTH, Depth
from dataflow.loaders.device import Staging
from dataflow.loaders.order_state import snapshot_order
from dataflow.loaders.rehearsal import REOPENING
from dataflow.loaders.state import Ledger
from dataflow.loaders.threads import Made, Order, Result, Threads

if TYPE_CHECKING:
    from dataflow.loaders.dataloader import DataLoader

__all__ = ["ThreadIterator"]

_log = logging.getLogger(__name__)

# How often a batch that hangs is given to another thread.
_MAX_RESTARTS = 3


@dataclass(eq=False, slots=True)
class _Owed:
    """A batch that was asked for.

    Attributes:
        order: The newest one for it.
        tries: How often it was asked for before.
        made: Once it is here.
        staged: Once it is on its way to the device.
    """

    order: Order
    tries: int = 0
    made: Made | None = None
    staged: Future[Any] | None = None


class ThreadIterator(AheadIterator):
    """Has the batches made by threads: `workers="thread"`."""

    _threads: Threads

    def __init__(self, loader: DataLoader[Any], ledger: Ledger) -> None:
        super().__init__(loader, ledger)
        self._depth = Depth(self._prefetch_factor, most=self._most_ahead(MAX_DEPTH))
        if isinstance(self._dataset, (IterDataPipe, MapDataPipe)):
            graph_settings.apply_sharding(self._dataset, self._world_size, self._rank)
        self._reset(loader, first_iter=True)

    def _reset(self, loader: DataLoader[Any], first_iter: bool = False) -> None:
        self._is_torn = True
        if not first_iter:
            self._threads.close()
            self._prepare(loader, REOPENING)
        order = snapshot_order(loader) if self._ledger.resume is None else None
        # Calls the sampler's iter() again, as torch does where there are workers.
        super()._reset(loader, first_iter)
        self._begin(loader, self._sampler_iter, order)
        self._begin_owing()
        self._failure = None
        self._is_exhausted = False
        self._threads = self._start()
        self._due = 0
        self._dispatch(self._depth.batches * self._num_workers)
        self._is_torn = False

    def _start(self) -> Threads:
        progress = self._progress
        make_fetch = self._fetch_maker(may_join=self._deadline_s == math.inf)
        if not self._is_iterable:
            return Threads(self._num_workers, make_fetch)
        skip = progress.shards[0] * (self._batch_size or 1)
        open_stream = partial(open_at, self._told[0], self._dataset, make_fetch, skip=skip)
        return Threads(1, open_stream, partial(_copied_state, self._dataset))

    def _dispatch(self, number_of_batches: int = 1) -> None:
        """Draw more indices and ask for their batches, as far as there are any."""
        self._due += number_of_batches
        while self._due >= self._depth.at_once and not self._is_exhausted:
            orders: list[Order] = []
            try:
                for _ in range(self._depth.at_once):
                    number, index = self._draw()
                    self._due -= 1
                    orders.append(Order(number, index))
                    self._owed[number] = _Owed(orders[-1])
            except StopIteration:
                self._is_exhausted = True
            finally:
                if orders:
                    self._threads.ask(orders)

    def _attend(self, timeout_s: float | None) -> bool:
        """Deal with what the threads did, waiting for it if need be; say whether there was anything."""
        until_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        if timeout_s != 0:  # else the caller only looks
            self._depth.waited()
        while True:
            # A thread takes an order unseen; one that is taken from now on is not late before a whole deadline.
            now_s = time.monotonic()
            wake_s = min(until_s, now_s + self._deadline_s, *(begun_s + self._deadline_s for begun_s in self._begun()))
            self._wait(self._threads.wait, wake_s)
            result = self._threads.take()
            if result is not None:
                self._take(result)
            now_s = time.monotonic()
            late = [owed for owed in self._watched() if self._is_late(owed, now_s)]
            for owed in late:
                if self._failure is None and self._is_late(owed, now_s):  # still, after others were given up
                    self._give_up(owed)
            if result is not None or late or time.monotonic() >= until_s:
                return result is not None or bool(late)

    def _is_late(self, owed: _Owed, now_s: float) -> bool:
        return owed.made is None and now_s - owed.order.begun_s > self._deadline_s

    def _begun(self) -> list[float]:
        return [owed.order.begun_s for owed in self._watched() if owed.made is None]

    def _watched(self) -> Iterable[_Owed]:
        """Return the batches that may be late."""
        return () if self._deadline_s == math.inf else self._owed.values()

    def _take(self, result: Result) -> None:
        """Receive a result."""
        self._meter.add(result.seconds, result.counts, batches=len(result.made))
        for made in result.made:
            self._take_one(made)

    def _take_one(self, made: Made) -> None:
        owed = self._owed.get(made.order.number)
        if owed is None or owed.order is not made.order:
            return  # it was given up
        if self._is_iterable and isinstance(made.error, StopIteration):
            self._is_exhausted = True
            del self._owed[made.order.number]
            return
        owed.made = made
        if not self._in_order:
            self._arrived.append(made.order.number)

    def _give_up(self, owed: _Owed) -> None:
        """Leave the thread that hangs over a batch to itself, and have another one make it."""
        order = owed.order
        self._threads.replace(order.thread)
        what = f"a DataLoader worker thread made no batch for {time.monotonic() - order.begun_s:.3g} s"
        if self._is_iterable or not self._restarts_workers or owed.tries == _MAX_RESTARTS:
            self._failure = self._failure or RuntimeError(what)
            self._shutdown_workers()
            return
        _log.warning("%s; another one starts and makes it", what)
        self._meter.add({}, {"workers.replaced": 1})
        owed.tries += 1
        for other in self._owed.values():  # what waits behind it does not come either
            if other.made is None and other.order.thread is order.thread:
                other.order = Order(other.order.number, other.order.index)
                self._threads.ask([other.order])

    def _deliver(self, number: int) -> Any:
        """Hand a batch to the caller, and ask for another one in its place."""
        owed = self._owed.pop(number)
        if not self._in_order:
            self._arrived.popleft()
        made = owed.made
        assert made is not None
        grown = self._depth.delivered(AHEAD_BYTES if made.size_bytes is None else made.size_bytes)
        self._dispatch(1 + grown * self._num_workers)
        self._hand_out(number, owed.order.index)
        if self._is_iterable:
            self._progress.arriving = 0, made.dataset_state
        self._note(made.bad_samples)
        if made.error is not None:
            self._is_torn = False  # also behind an exit of the thread
            raise made.error
        if self._staging is None:
            return made.batch
        batch = self._staging.finish(owed.staged or self._staging.begin(made.batch))
        self._stage_ahead(self._staging)
        return batch

    def _stage_ahead(self, staging: Staging) -> None:
        """Bring over the next batch while the caller works on this one, if it is here."""
        self._attend(0)
        number = self._find_ready()
        if number is None:
            return
        owed = self._owed[number]
        if owed.staged is None and owed.made is not None and owed.made.error is None:
            owed.staged = staging.begin(owed.made.batch)

    def _shutdown_workers(self) -> None:
        """End the threads; torch's iterator has this under the same name."""
        if hasattr(self, "_threads"):
            self._threads.close()
        if self._staging is not None:
            self._staging.close()

    def __del__(self) -> None:
        self._shutdown_workers()


def _copied_state(dataset: Any, fetch: Fetch) -> Any:
    """Return where a stream is now; what it returns may be the very object that it goes on with."""
    return copy.deepcopy(take_state(dataset, fetch))
