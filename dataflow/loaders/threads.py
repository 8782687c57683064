"""Threads that make batches, and what they share with the iterator that asks for them.

    iterator -> orders -> any thread -> results -> iterator

A thread cannot be ended from outside. One that hangs is given up: another takes its place and its batch, and what it
says later is not heard. `close` waits a moment for the threads and leaves those that hang to the end of the process,
which they, as daemons, do not delay.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from dataflow.loaders.bad_samples import BadSample
from dataflow.loaders.collate import Fetch, size_bytes_of
from dataflow.loaders.pace import Pace
from dataflow.loaders.parallelism import parallelism_kept, use_one_thread
from dataflow.loaders.torch_private import JOIN_TIMEOUT_S, ExceptionWrapper
from dataflow.observe.stages import Recorder
from dataflow.transforms.callables import wait_no_more_for

__all__ = ["Made", "Order", "Result", "Threads"]


@dataclass(eq=False, slots=True)
class Order:
    """A batch to be made.

    Attributes:
        number: Of the batch in its epoch.
        index: What the sampler says is in it.
        begun_s: When a thread began with it, on the monotonic clock.
        thread: Which one has it.
    """

    number: int
    index: Any
    begun_s: float = math.inf
    thread: threading.Thread | None = None


@dataclass(frozen=True, slots=True)
class Made:
    """What became of an order.

    Attributes:
        order: The order.
        batch: The batch, where there is no error.
        error: What making it raised.
        bad_samples: Those that were found while it was made.
        dataset_state: After this batch, where the dataset has one; the wrapped exception, if it cannot be had.
        size_bytes: Of the batch, where that was looked at.
    """

    order: Order
    batch: Any
    error: BaseException | None
    bad_samples: list[BadSample]
    dataset_state: Any
    size_bytes: int | None


@dataclass(frozen=True, slots=True)
class Result:
    """What one thread made at once.

    Attributes:
        made: By order.
        seconds: Time by stage.
        counts: Counters.
    """

    made: list[Made]
    seconds: dict[str, float]
    counts: dict[str, int]


_Orders: TypeAlias = "queue.SimpleQueue[list[Order] | None]"
_Results: TypeAlias = "queue.SimpleQueue[Result]"


class Threads:
    """A number of threads with one queue to them and one from them. Used by one thread.

    Args:
        number: How many.
        make_fetch: Called by each thread once, for what it makes batches with.
        dataset_state: Returns where the dataset is, where that belongs to each batch.
    """

    def __init__(
        self, number: int, make_fetch: Callable[[], Fetch], dataset_state: Callable[[Fetch], Any] | None = None
    ) -> None:
        self._orders: _Orders = queue.SimpleQueue()
        self._results: _Results = queue.SimpleQueue()
        self._taken: deque[Result] = deque()
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self._make_fetch = make_fetch
        self._dataset_state = dataset_state
        # Also at the end of the interpreter, which does not wait for daemons.
        self.close = weakref.finalize(self, _close, self._orders, self._closing, self._threads)
        for _ in range(number):
            self.add()

    def add(self) -> None:
        """Start one more thread."""
        is_limited = threading.Event()
        thread = threading.Thread(
            target=_work,
            args=(self._make_fetch, self._dataset_state, self._orders, self._results, self._closing, is_limited),
            name="dataflow-worker",
            daemon=True,
        )
        with parallelism_kept():
            thread.start()
            self._threads.append(thread)  # only now: a thread that the system does not start cannot be waited for
            is_limited.wait()

    def replace(self, thread: threading.Thread | None) -> None:
        """Start one more thread, and never wait again for one that hangs."""
        if thread is not None and thread in self._threads:
            self._threads.remove(thread)
            wait_no_more_for(thread.ident)
        self.add()

    def ask(self, orders: list[Order]) -> None:
        """Have batches made, all by one thread."""
        self._orders.put(orders)

    def wait(self, timeout_s: float | None) -> None:
        """Wait until something was made, or for `timeout_s` (None waits for ever). An interrupt loses nothing."""
        with contextlib.suppress(queue.Empty):
            if not self._taken:  # one call, in which what was got is kept before a signal's handler may run
                self._taken.extend(map(self._results.get, [True], [timeout_s]))

    def take(self) -> Result | None:
        """Return what was made next, if `wait` has found something."""
        return self._taken.popleft() if self._taken else None


def _work(
    make_fetch: Callable[[], Fetch],
    dataset_state: Callable[[Fetch], Any] | None,
    orders: _Orders,
    results: _Results,
    closing: threading.Event,
    is_limited: threading.Event,
) -> None:
    use_one_thread()
    is_limited.set()
    maker = _Maker(make_fetch, dataset_state)
    while (taken := orders.get()) is not None and not closing.is_set():
        _serve(taken, maker, results, closing)
    orders.put(None)  # for the next thread


def _serve(orders: list[Order], maker: _Maker, results: _Results, closing: threading.Event) -> None:
    for order in orders:
        order.thread = threading.current_thread()
    while orders and not closing.is_set():
        some, orders = orders[: maker.pace.batches], orders[maker.pace.batches :]
        for result in maker.make(some):
            results.put(result)
            del result  # the caller may let go of it before the next one is made


class _Maker:
    """What one thread makes batches with.

    Attributes:
        pace: How many orders to give it at a time.
    """

    def __init__(self, make_fetch: Callable[[], Fetch], dataset_state: Callable[[Fetch], Any] | None) -> None:
        self._make_fetch = make_fetch
        self._dataset_state = dataset_state
        self._fetch: Fetch | None = None
        self.pace = Pace()

    def make(self, orders: list[Order]) -> Iterator[Result]:
        """Yield what becomes of the orders: all at once, or of each as it is made."""
        for order in orders:
            order.begun_s = time.monotonic()
        if len(orders) > 1 and (result := self._make_together(orders)) is not None:
            yield result
            return
        for order in orders:
            order.begun_s = time.monotonic()
            yield self._make(order)

    def _make_together(self, orders: list[Order]) -> Result | None:
        assert self._fetch is not None
        with Recorder() as recorder:
            try:
                batches = self._fetch.together([order.index for order in orders]).batches()
            except BaseException:  # one by one they tell which of them is to blame
                return None
        made = [
            Made(order, batch, None, [], None, size)
            for order, batch, size in zip(orders, batches, self._look(orders[0], batches), strict=True)
        ]
        return Result(made, dict(recorder.seconds), dict(recorder.counts))

    def _make(self, order: Order) -> Result:
        batch, failure, size = None, None, None
        with Recorder() as recorder:
            try:
                self._fetch = self._fetch or self._make_fetch()
                batch = self._fetch(order.index)
                if self._fetch.joins:
                    (size,) = self._look(order, [batch])
            except BaseException as error:  # also an exit, or the trainer would wait for ever
                failure = error
        bad = [] if self._fetch is None or self._fetch.sieve is None else self._fetch.sieve.take_found()
        state = None if failure is not None else self._state()
        made = Made(order, batch, failure, bad, state, size)
        return Result([made], dict(recorder.seconds), dict(recorder.counts))

    def _state(self) -> Any:
        try:
            return None if self._dataset_state is None or self._fetch is None else self._dataset_state(self._fetch)
        except Exception:  # is raised where somebody asks for the loader's state
            return ExceptionWrapper(where="in a DataLoader worker thread")

    def _look(self, first: Order, batches: list[dict[str, Any]]) -> list[int]:
        """Return the sizes of batches that could be gathered together, after adapting the pace to them."""
        sizes = [*map(size_bytes_of, batches)]
        self.pace.made(len(batches), time.monotonic() - first.begun_s, sum(sizes))
        return sizes


def _close(orders: _Orders, closing: threading.Event, threads: list[threading.Thread]) -> None:
    closing.set()
    orders.put(None)
    until_s = time.monotonic() + JOIN_TIMEOUT_S
    for thread in threads:
        if thread is not threading.current_thread():  # a collection may happen in any thread
            thread.join(max(0.0, until_s - time.monotonic()))
            if thread.is_alive():
                wait_no_more_for(thread.ident)
