"""What `iter(loader)` returns: batches made in this process, or by worker processes and put in order here.

Both derive from torch's own base class, which draws seeds, checks pinning and walks the sampler, so all of that is as in
torch. Worker processes get their tasks in torch's way too: batch i comes from worker i mod N, `prefetch_factor * N`
tasks are out at a time, and the next index is drawn from the sampler when a batch is handed out. Not torch's are the way
batches travel (`slots`, `packing`), and that a dead worker is replaced and asked again for what it owes.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import logging
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterDataPipe, MapDataPipe, _utils, graph_settings
from torch.utils.data import dataloader as torch_dataloader

from dataflow.loaders.collate import Fetch, allocate_private
from dataflow.loaders.crew import Crew, Death, Worker
from dataflow.loaders.packing import unpack
from dataflow.loaders.slots import HELD_SLOTS
from dataflow.loaders.state import Progress, is_elastic, is_stateful, restored_order, sampler_length, snapshot_order
from dataflow.loaders.workers import BeginEpoch, Job, Result, Status, Task

if TYPE_CHECKING:
    from dataflow.loaders.dataloader import DataLoader

__all__ = ["InlineIterator", "ProcessIterator"]

_log = logging.getLogger(__name__)

_Base: Any = torch_dataloader._BaseDataLoaderIter
_DatasetKind = torch_dataloader._DatasetKind

# Beyond what is out and what the caller holds: the batch in the making, and notices still on their way.
_SPARE_SLOTS = 4
# How often in a row the same batch may kill its worker.
_MAX_RESTARTS = 3


class _Iterator(_Base):  # type: ignore[misc]
    """What both have in common: the metering of `next`, and the beginning of an epoch."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        super().__init__(loader)
        self._meter = loader._meter
        self._batch_size = loader.batch_size

    def __next__(self) -> Any:
        meter = self._meter
        meter.enter()
        try:
            # Recording a range costs as much as all the rest of a small batch, so it is done when somebody looks.
            if self._IterableDataset_len_called is not None or torch.autograd._profiler_enabled():
                batch = super().__next__()
            else:
                batch = self._next_data()
                self._num_yielded += 1
        except BaseException:
            meter.leave(in_loop=False)
            raise
        meter.leave()
        return batch

    def _begin(self, loader: DataLoader[Any], indices: Iterator[Any] | None, order: dict[str, Any] | None) -> None:
        """Begin an epoch, or go on in one that a loaded state names.

        Args:
            loader: The loader.
            indices: The sampler's iterator if there is one already, else a new one is made.
            order: What determines the order, if it had to be taken down earlier.
        """
        resume, sampler = loader._take_resume(), self._index_sampler
        if is_elastic(sampler):
            self._sampler_iter = iter(sampler) if indices is None else indices
            ahead = set() if resume is None else resume.ahead
            progress = Progress({}, self._base_seed, sampler.first_step, ahead, epoch=sampler.epoch)
        elif resume is None:
            progress = Progress(snapshot_order(loader) if order is None else order, self._base_seed)
            self._sampler_iter = iter(sampler) if indices is None else indices
        else:
            progress = resume
            self._base_seed = progress.base_seed
            with restored_order(loader, progress.order):
                used = 0 if self._dataset_kind == _DatasetKind.Iterable else progress.batches
                self._sampler_iter = _advanced(iter(sampler), used)
        if self._dataset_kind == _DatasetKind.Iterable and not progress.shards:
            shards = max(1, self._num_workers)
            progress.shards, progress.shard_states = [0] * shards, [None] * shards
        loader._progress = self._progress = progress
        self._position = progress.batches
        self._skip = frozenset(progress.ahead)
        self._length = sampler_length(sampler)

    def _draw(self) -> tuple[int, Any]:
        """Return the next batch's number in the epoch and what the sampler says is in it."""
        while True:
            index = next(self._sampler_iter)
            number, self._position = self._position, self._position + 1
            if number not in self._skip:
                return number, index

    def _hand_out(self, number: int, index: Any) -> None:
        """Count a batch that goes to the caller, also one that went wrong: it does not come again."""
        progress, meter = self._progress, self._meter
        progress.hand_out(number)
        meter.batches += 1
        if self._dataset_kind == _DatasetKind.Map:
            meter.samples += len(index) if self._auto_collation else 1
            if progress.batches == self._length:
                # A sampler may draw once more behind its last index; the state of a finished epoch comes after that.
                after = list(itertools.islice(self._sampler_iter, 1))
                self._sampler_iter = itertools.chain(after, self._sampler_iter)
                progress.finished = not after


def _advanced(indices: Iterator[Any], number: int) -> Iterator[Any]:
    """Drop `number` indices, and draw the next one now, while the generators are what they were."""
    head = list(itertools.islice(indices, number, number + 1))
    return itertools.chain(head, indices)


class InlineIterator(_Iterator):
    """Makes the batches in this process: `num_workers=0`."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        # A sampler whose `__iter__` is no generator draws its order at once, and torch's base class is about to call it.
        is_lazy = inspect.isgeneratorfunction(type(loader._index_sampler).__iter__)
        order = None if is_lazy or is_elastic(loader._index_sampler) else snapshot_order(loader)
        super().__init__(loader)
        if self._timeout != 0:
            raise AssertionError("_SingleProcessDataLoaderIter requires timeout == 0")
        if isinstance(self._dataset, (IterDataPipe, MapDataPipe)):
            graph_settings.apply_sharding(self._dataset, self._world_size, self._rank)
        self._begin(loader, self._sampler_iter, order)

    def _begin(self, loader: DataLoader[Any], indices: Iterator[Any] | None, order: dict[str, Any] | None) -> None:
        resume = loader._resume
        super()._begin(loader, indices, order)
        progress = self._progress
        with contextlib.nullcontext() if resume is None else restored_order(loader, progress.order):
            if self._dataset_kind == _DatasetKind.Iterable and is_stateful(self._dataset):
                if progress.shard_states[0] is not None:
                    self._dataset.load_state_dict(progress.shard_states[0])
                progress.live_state = self._dataset.state_dict
            self._fetch = Fetch(
                self._dataset_kind,
                self._dataset,
                auto_collation=self._auto_collation,
                collate_fn=self._collate_fn,
                drop_last=self._drop_last,
                allocate=allocate_private,
            )
            if self._dataset_kind == _DatasetKind.Iterable and progress.live_state is None:
                self._fetch.skip(progress.shards[0] * (self._batch_size or 1))

    def _next_data(self) -> Any:
        number, index = None, None
        try:
            number, index = self._draw()
            with self._meter.recorder:
                batch = self._fetch(index)
                if self._pin_memory:
                    batch = _utils.pin_memory.pin_memory(batch, self._pin_memory_device)
        except StopIteration:
            self._progress.finished = True
            number = None
            raise
        finally:
            if number is not None:
                self._hand_out(number, index)
        return batch


@dataclass(eq=False, slots=True)
class _Owed:
    """A batch that was asked for: by whom it is made, of what, and once it is here, the result."""

    worker: Worker
    index: Any
    result: Result | None = None


class ProcessIterator(_Iterator):
    """Has the batches made by worker processes and puts them in order.

    A worker's death is noticed in the same wait as its results. What it sent is used; what it still owes is asked of its
    successor, in the same order, so the caller sees the same sequence.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        super().__init__(loader)
        self._prefetch_factor = loader.prefetch_factor
        self._in_order = loader.in_order
        if self._prefetch_factor <= 0:
            raise AssertionError("prefetch_factor must be greater than 0 for MultiProcessingDataLoaderIter")
        self._restart_on_failure = loader.on_worker_failure == "restart"
        self._context = loader.multiprocessing_context or torch.multiprocessing
        self._worker_init_fn = loader.worker_init_fn
        if isinstance(self._dataset, (IterDataPipe, MapDataPipe)):
            self._worker_init_fn = functools.partial(
                torch_dataloader._sharding_worker_init_fn, self._worker_init_fn, self._world_size, self._rank
            )
        self._crew: Crew | None = None
        self._failure: RuntimeError | None = None
        self._epoch = -1
        self._reset(loader, first_iter=True)

    @property
    def _workers(self) -> list[Any]:
        """The worker processes; torch's iterator has them under this name."""
        return [] if self._crew is None else [worker.process for worker in self._crew.workers]

    def _reset(self, loader: DataLoader[Any], first_iter: bool = False) -> None:
        shared_seed = self._shared_seed
        if is_elastic(self._index_sampler):
            self._num_yielded = 0
            self._begin(loader, self._sampler_iter if first_iter else None, None)
        else:
            order = snapshot_order(loader) if loader._resume is None else None
            # Draws the shared seed of data pipes, and calls the sampler's iter() again, as torch does.
            super()._reset(loader, first_iter)
            self._begin(loader, self._sampler_iter, order)
        progress = self._progress
        self._epoch += 1
        self._tasks: dict[int, _Owed] = {}
        self._arrived: deque[int] = deque()  # in the order of arrival, if that is the order to be kept
        self._next_number = self._position
        self._is_active = [True] * self._num_workers
        self._load = [0] * self._num_workers
        self._restarts = [0] * self._num_workers
        self._received = list(progress.shards)
        self._received_states = list(progress.shard_states)
        self._turns = itertools.cycle(range(self._num_workers))
        deque(itertools.islice(self._turns, progress.next_shard), maxlen=0)
        begin = [self._beginning(worker_id) for worker_id in range(self._num_workers)]
        if self._crew is None:
            self._crew = self._hire(loader, begin, shared_seed)
        else:
            for worker_id, order_to_begin in enumerate(begin):
                self._crew.begin(worker_id, order_to_begin)
        for _ in range(self._prefetch_factor * self._num_workers):
            self._dispatch()

    def _hire(self, loader: DataLoader[Any], begin: list[BeginEpoch], shared_seed: int | None) -> Crew:
        job = Job(
            kind=self._dataset_kind,
            dataset=self._dataset,
            auto_collation=self._auto_collation,
            collate_fn=self._collate_fn,
            drop_last=self._drop_last,
            worker_init_fn=self._worker_init_fn,
            num_workers=self._num_workers,
            base_seed=self._base_seed,
            shared_seed=shared_seed,
            trainer_pid=os.getpid(),
            max_slots=self._prefetch_factor + HELD_SLOTS + _SPARE_SLOTS,
            max_free_slots=self._prefetch_factor + _SPARE_SLOTS,
        )
        return Crew(self._context, job, begin)

    def _beginning(self, worker_id: int) -> BeginEpoch:
        """Where a worker that starts now has to begin: behind what it, or its predecessor, has sent."""
        skip, state = 0, None
        if self._dataset_kind == _DatasetKind.Iterable:
            skip = self._received[worker_id] * (self._batch_size or 1)
            state = self._received_states[worker_id]
        return BeginEpoch(self._epoch, self._shared_seed, skip, state)

    def _dispatch(self) -> None:
        """Draw one more index and ask for its batch, if there is an index and a worker to ask."""
        try:
            number, index = self._draw()
        except StopIteration:
            return
        worker_id = self._pick_worker()
        if worker_id is None:
            return
        self._load[worker_id] += 1
        self._tasks[number] = _Owed(self._crew.workers[worker_id], index)
        self._ask(number)

    def _pick_worker(self) -> int | None:
        share = self._prefetch_factor * self._num_workers // max(1, sum(self._is_active))
        for worker_id in itertools.islice(self._turns, self._num_workers):
            if self._is_active[worker_id] and (self._in_order or self._load[worker_id] < share):
                return worker_id
        return None

    def _ask(self, number: int) -> None:
        owed = self._tasks[number]
        self._crew.post(owed.worker.id, Task(self._epoch, number, owed.index, owed.worker.slots.notices()))

    def _next_data(self) -> Any:
        while True:
            if self._failure is not None:
                raise self._failure
            number = self._find_ready()
            if number is not None:
                return self._deliver(number)
            if not self._tasks:
                self._progress.finished = True
                if not self._persistent_workers:
                    self._shutdown_workers()
                raise StopIteration
            events = self._crew.wait(self._timeout or None)
            if not events:
                raise RuntimeError(f"DataLoader timed out after {self._timeout} seconds")
            for event in events:
                if isinstance(event, Death):
                    self._replace(event)
                else:
                    self._take(*event)

    def _find_ready(self) -> int | None:
        """Return the number of the batch to hand out now, if it is here."""
        if not self._in_order:
            return self._arrived.popleft() if self._arrived else None
        while self._next_number < self._position and self._next_number not in self._tasks:
            self._next_number += 1  # its worker had no more samples
        owed = self._tasks.get(self._next_number)
        return None if owed is None or owed.result is None else self._next_number

    def _take(self, worker: Worker, result: Result) -> None:
        """Receive a result."""
        self._meter.add(result.seconds, result.counts)
        if result.epoch != self._epoch:
            for slot in result.parcel.slots():
                worker.slots.give_back(slot)
            return
        self._restarts[worker.id] = 0
        if result.status == Status.EXHAUSTED:
            self._is_active[worker.id] = False
            for number in [
                number for number, owed in self._tasks.items() if owed.worker.id == worker.id and not owed.result
            ]:
                del self._tasks[number]
                self._dispatch()
            return
        self._tasks[result.number].result = result
        self._arrived.append(result.number)
        if self._received:
            self._received[worker.id] += 1
            self._received_states[worker.id] = result.dataset_state

    def _deliver(self, number: int) -> Any:
        """Hand a batch to the caller, and ask for another one in its place."""
        owed = self._tasks.pop(number)
        worker, result = owed.worker, owed.result
        self._load[worker.id] -= 1
        self._dispatch()
        self._hand_out(number, owed.index)
        progress = self._progress
        if progress.shards:
            progress.shards[worker.id] += 1
            progress.shard_states[worker.id] = result.dataset_state
            progress.next_shard = (worker.id + 1) % self._num_workers
        batch = unpack(result.parcel, worker.slots)
        if result.status == Status.ERROR:
            batch.reraise()
        return batch

    def _replace(self, death: Death) -> None:
        """Put a new process in the place of a dead one and ask it for what that one owed."""
        worker_id = death.worker.id
        owed = sorted(number for number, task in self._tasks.items() if task.worker is death.worker and not task.result)
        if not self._is_active[worker_id] and not owed:
            return  # it had nothing more to do
        self._restarts[worker_id] += 1
        if not self._restart_on_failure or self._restarts[worker_id] > _MAX_RESTARTS:
            self._failure = death.as_error()
            self._shutdown_workers()
            return
        _log.warning("%s; starting another one, which makes the %d batches that it owed", death, len(owed))
        self._meter.add({}, {"workers.replaced": 1})
        self._crew.replace(worker_id, self._beginning(worker_id))
        for number in owed:
            self._tasks[number].worker = self._crew.workers[worker_id]
            self._ask(number)

    def _shutdown_workers(self) -> None:
        """End the workers; torch's iterator has this under the same name."""
        if _utils is None or _utils.python_exit_status is not False:
            return  # the interpreter is leaving: multiprocessing ends daemons, and our channels are closed anyway
        if self._crew is not None:
            self._crew.stop()

    def __del__(self) -> None:
        if getattr(self, "_crew", None) is not None:
            self._shutdown_workers()
