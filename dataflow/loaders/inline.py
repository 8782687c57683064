"""Batches made in the process that wants them.

Small batches of native data cost less made several at once: most of it is done once for all of them. They are drawn
ahead for that, where the sampler's future is known anyway; any other may look at what became of a batch before it draws
the next one. What goes wrong with one of them comes in its turn.
"""

from __future__ import annotations

import contextlib
import inspect
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterDataPipe, MapDataPipe, graph_settings

from dataflow.loaders.collate import Fetch, size_bytes_of
from dataflow.loaders.dataset_state import open_at, take_state
from dataflow.loaders.iterators import LoaderIterator
from dataflow.loaders.order_state import is_elastic, snapshot_order
from dataflow.loaders.pace import MAX_BATCHES, Pace
from dataflow.loaders.state import Ledger
from dataflow.loaders.torch_private import index_sampler

if TYPE_CHECKING:
    from dataflow.loaders.dataloader import DataLoader

__all__ = ["InlineIterator"]


class InlineIterator(LoaderIterator):
    """Makes the batches in this process: `num_workers=0`."""

    def __init__(self, loader: DataLoader[Any], ledger: Ledger) -> None:
        sampler = index_sampler(loader)
        order = None if self._draws_later(loader) or is_elastic(sampler) else snapshot_order(loader)
        super().__init__(loader, ledger)
        if self._timeout != 0:
            raise AssertionError("_SingleProcessDataLoaderIter requires timeout == 0")
        if isinstance(self._dataset, (IterDataPipe, MapDataPipe)):
            graph_settings.apply_sharding(self._dataset, self._world_size, self._rank)
        self._start(loader, order)

    def _reset(self, loader: DataLoader[Any], first_iter: bool = False) -> None:
        super()._reset(loader, first_iter)
        self._start(loader, None)

    def _start(self, loader: DataLoader[Any], order: dict[str, Any] | None) -> None:
        self._begin(loader, self._sampler_iter, order)
        self._may_join = self._draws_tail = is_elastic(self._index_sampler)
        # A dataset that is told where it was may set the process's generators, so it is told when the caller's are
        # back. Any other is opened at once, as in torch.
        is_told = any(state is not None for state in self._told)
        self._fetch = None if is_told else self._open()
        self._pace = Pace()
        self._most = max(1, self._most_ahead(MAX_BATCHES))
        # What was drawn and not handed out, the batches of it that are made, and what stopped the sampler.
        self._drawn: deque[tuple[int, Any]] = deque()
        self._made: deque[Any] = deque()
        self._draw_failure: Exception | None = None

    def _draws_later(self, loader: DataLoader[Any]) -> bool:
        # A sampler whose `__iter__` is no generator draws its order at once, and torch's base class calls it.
        return inspect.isgeneratorfunction(getattr(type(index_sampler(loader)), "__iter__", None))

    def _open(self) -> Fetch:
        progress, make_fetch = self._progress, self._fetch_maker(may_join=self._may_join)
        if not progress.shards:
            return make_fetch()
        skip = progress.shards[0] * (self._batch_size or 1) if self._is_iterable else 0
        fetch = open_at(self._told[0], self._dataset, make_fetch, skip=skip)
        progress.live_state = partial(_state_since, progress.shard_states[0], self._dataset, fetch)
        return fetch

    def _next_data(self) -> Any:
        fetch = self._fetch = self._fetch or self._open()
        if not self._drawn:
            self._draw_some(fetch)
        number, index = self._drawn.popleft()
        try:
            batch = self._made.popleft() if self._made else self._make(fetch, index)
        except Exception as error:
            if self._is_iterable and isinstance(error, StopIteration):
                self._progress.finished = True
            else:
                self._hand_out(number, index)
            raise
        self._hand_out(number, index)
        if fetch.sieve is not None:
            self._note(fetch.sieve.take_found())
        if self._progress.shards:
            self._progress.arriving = 0, None
        return batch if self._staging is None else self._staging.bring(batch)

    def _draw_some(self, fetch: Fetch) -> None:
        """Draw the next batch, or several that are made at once; what goes wrong behind the first of them comes later.

        Raises:
            StopIteration: The sampler has no more.
        """
        failure, self._draw_failure = self._draw_failure, None
        if failure is not None:
            raise failure
        try:
            while len(self._drawn) < min(self._pace.batches, self._most):
                self._drawn.append(self._draw())
        except StopIteration:  # comes again
            self._progress.finished = not self._drawn
            if not self._drawn:
                raise
        except Exception as error:
            if not self._drawn:
                raise
            self._draw_failure = error
        if len(self._drawn) > 1:
            began_s = time.monotonic()
            with contextlib.suppress(Exception):  # one by one they tell which of them is to blame
                self._made.extend(fetch.together([index for _, index in self._drawn]).batches())
                self._pace.made(len(self._made), time.monotonic() - began_s, sum(map(size_bytes_of, self._made)))

    def _make(self, fetch: Fetch, index: Any) -> Any:
        if not fetch.joins:
            return fetch(index)
        began_s = time.monotonic()
        batch = fetch(index)
        self._pace.made(1, time.monotonic() - began_s, size_bytes_of(batch))
        return batch


def _state_since(before: Any, dataset: Any, fetch: Fetch) -> Any:
    """Return where a dataset is: a stream that was not asked for anything yet may say where it was in another epoch."""
    return before if fetch.is_new and fetch.iterator is not None else take_state(dataset, fetch)
