"""Threads that make batches, and what they share with the iterator that asks for them.

    iterator -> orders -> any thread -> results -> iterator

A thread cannot be ended from outside. One that hangs is given up: another takes its place and its batch, and what it
says later is not heard. `close` waits a moment for the threads and leaves those that hang to the end of the process,
which they, as daemons, do not delay.
"""

from __future__ import annotations

import math
import queue
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from dataflow.loaders.bad_samples import BadSample
from dataflow.loaders.collate import Fetch
from dataflow.loaders.torch_private import JOIN_TIMEOUT_S
from dataflow.observe.stages import Recorder

__all__ = ["Made", "Order", "Threads"]


@dataclass(eq=False, slots=True)
class Order:
    """A batch to be made.

    Attributes:
        number: Of the batch in its epoch.
        index: What the sampler says is in it.
        begun_s: When a thread took it, on the monotonic clock.
        thread: Which one.
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
        seconds: Time by stage.
        counts: Counters.
        bad_samples: Those that were found while it was made.
        dataset_state: After this batch, where the dataset has one.
    """

    order: Order
    batch: Any
    error: Exception | None
    seconds: dict[str, float]
    counts: dict[str, int]
    bad_samples: list[BadSample]
    dataset_state: Any


_Orders: TypeAlias = "queue.SimpleQueue[Order | None]"
_Results: TypeAlias = "queue.SimpleQueue[Made]"


class Threads:
    """A number of threads with one queue to them and one from them. Used by one thread.

    Args:
        number: How many.
        make_fetch: Called by each thread once, for what it makes batches with.
        dataset_state: Returns the dataset's state, where that belongs to each batch.
    """

    def __init__(
        self, number: int, make_fetch: Callable[[], Fetch], dataset_state: Callable[[], Any] | None = None
    ) -> None:
        self._orders: _Orders = queue.SimpleQueue()
        self._results: _Results = queue.SimpleQueue()
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
        thread = threading.Thread(
            target=_work,
            args=(self._make_fetch, self._dataset_state, self._orders, self._results, self._closing),
            name="dataflow-worker",
            daemon=True,
        )
        self._threads.append(thread)
        thread.start()

    def replace(self, order: Order) -> None:
        """Start one more thread, and never wait again for the one that hangs over an order."""
        if order.thread in self._threads:
            self._threads.remove(order.thread)
        self.add()

    def ask(self, order: Order) -> None:
        """Have a batch made."""
        self._orders.put(order)

    def wait(self, timeout_s: float | None) -> Made | None:
        """Return what was made next; None if that takes longer than `timeout_s` (None waits for ever)."""
        try:
            return self._results.get(timeout=timeout_s)
        except queue.Empty:
            return None


def _work(
    make_fetch: Callable[[], Fetch],
    dataset_state: Callable[[], Any] | None,
    orders: _Orders,
    results: _Results,
    closing: threading.Event,
) -> None:
    torch.set_num_threads(1)
    fetch: Fetch | None = None
    while (order := orders.get()) is not None and not closing.is_set():
        order.thread, order.begun_s = threading.current_thread(), time.monotonic()
        batch, failure = None, None
        with Recorder() as recorder:
            try:
                fetch = fetch or make_fetch()
                batch = fetch(order.index)
            except Exception as error:
                failure = error
        bad = [] if fetch is None or fetch.sieve is None else fetch.sieve.take_found()
        state = dataset_state() if dataset_state is not None and failure is None else None
        results.put(Made(order, batch, failure, dict(recorder.seconds), dict(recorder.counts), bad, state))
        del order, batch, failure, state  # or they would live until the next order
    orders.put(None)  # for the next thread


def _close(orders: _Orders, closing: threading.Event, threads: list[threading.Thread]) -> None:
    closing.set()
    orders.put(None)
    until_s = time.monotonic() + JOIN_TIMEOUT_S
    for thread in threads:
        if thread is not threading.current_thread():  # a collection may happen in any thread
            thread.join(max(0.0, until_s - time.monotonic()))
