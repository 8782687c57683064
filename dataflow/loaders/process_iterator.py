"""Batches from worker processes, put in order.

Workers get their tasks in torch's way: batch i comes from worker i mod N, `prefetch_factor * N` tasks are out at a
time (more where nobody can tell, see `depth`), and the next index is drawn from the sampler when a batch is handed out.
Not torch's are the way batches travel (`slots`, `packing`), and that a dead worker is replaced and its successor is
asked for what it owes, in the same order, so the caller sees the same sequence.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.multiprocessing
from torch.utils.data import IterDataPipe, MapDataPipe

from dataflow.loaders.ahead import AheadIterator
from dataflow.loaders.crew import Crew, Death, Worker
from dataflow.loaders.depth import MAX_DEPTH, Depth
from dataflow.loaders.generators import GeneratorStates
from dataflow.loaders.order_state import snapshot_order
from dataflow.loaders.packing import unpack
from dataflow.loaders.rehearsal import REOPENING
from dataflow.loaders.slots import HELD_SLOTS, Leases
from dataflow.loaders.state import Ledger
from dataflow.loaders.torch_private import interpreter_is_leaving, sharding_init_fn
from dataflow.loaders.workers import BeginEpoch, Job, Made, Result, Status, Tasks

if TYPE_CHECKING:
    from dataflow.loaders.dataloader import DataLoader

__all__ = ["ProcessIterator"]

_log = logging.getLogger(__name__)

# Beyond what is out and what the caller holds: the batch in the making, and notices still on their way.
_SPARE_SLOTS = 4
# How often in a row a worker may die without having sent a result.
_MAX_RESTARTS = 3


@dataclass(eq=False, slots=True)
class _Arrival:
    """What batches that came together share.

    Attributes:
        leases: Of the slots that they are in.
        size_bytes: Of each, on average.
        dataset_state: After the last of them.
    """

    leases: Leases
    size_bytes: int
    dataset_state: Any


@dataclass(eq=False, slots=True)
class _Owed:
    """A batch that was asked for.

    Attributes:
        worker: Who makes it, or has made it.
        index: What the sampler says is in it.
        made: Once it is here.
        arrival: What it came with.
        staged: Once it is on its way to the device.
    """

    worker: Worker
    index: Any
    made: Made | None = None
    arrival: _Arrival | None = None
    staged: Future[Any] | None = None

    def unpack(self) -> Any:
        """Return the batch, or the wrapped exception."""
        assert self.made is not None
        assert self.arrival is not None
        return unpack(self.made.parcel, self.arrival.leases)


class ProcessIterator(AheadIterator):
    """Has the batches made by worker processes: `num_workers > 0`."""

    _crew: Crew

    def __init__(self, loader: DataLoader[Any], ledger: Ledger) -> None:
        super().__init__(loader, ledger)
        self._depth = Depth(self._prefetch_factor, most=self._most_ahead(MAX_DEPTH))
        self._context = loader.multiprocessing_context or torch.multiprocessing
        self._worker_init_fn = loader.worker_init_fn
        if isinstance(self._dataset, (IterDataPipe, MapDataPipe)):
            self._worker_init_fn = sharding_init_fn(self._worker_init_fn, self._world_size, self._rank)
        self._generators: list[GeneratorStates | None] = [None] * self._num_workers
        self._epoch = -1
        self._reset(loader, first_iter=True)

    @property
    def _workers(self) -> list[Any]:
        """The worker processes; torch's iterator has them under this name."""
        return [worker.process for worker in self._crew.workers]

    def _reset(self, loader: DataLoader[Any], first_iter: bool = False) -> None:
        shared_seed, was_torn, self._is_torn = self._shared_seed, self._is_torn, True
        if was_torn:
            self._crew.stop()  # what lies in the channels may have no beginning any more
        if not first_iter:
            self._prepare(loader, REOPENING)
        order = snapshot_order(loader) if self._ledger.resume is None else None
        # Draws the shared seed of data pipes, and calls the sampler's iter() again, as torch does.
        super()._reset(loader, first_iter)
        if first_iter:
            self._shared_seed = shared_seed  # torch draws one more here, of which no worker hears
        self._begin(loader, self._sampler_iter, order)
        progress = self._progress
        self._epoch += 1
        self._begin_owing()
        self._is_active = [True] * self._num_workers
        self._load = [0] * self._num_workers
        self._restarts = [0] * self._num_workers
        self._received = list(progress.shards)
        self._received_states = list(progress.shard_states)
        self._due = 0
        self._turns = itertools.cycle(range(self._num_workers))
        deque(itertools.islice(self._turns, progress.next_shard), maxlen=0)
        begin = [self._beginning(worker_id) for worker_id in range(self._num_workers)]
        if first_iter or self._crew.is_stopped:
            self._failure = None
            self._generators = [None] * self._num_workers
            self._crew = self._hire(begin, shared_seed)
        else:
            for worker_id, begin_one in enumerate(begin):
                self._crew.begin(worker_id, begin_one._replace(dataset_state=None))  # it is what it has
        self._dispatch(self._depth.batches * self._num_workers)
        self._is_torn = False

    def _hire(self, begin: list[BeginEpoch], shared_seed: int | None) -> Crew:
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
            bad_samples=self._bad_samples,
            trainer_pid=os.getpid(),
            reports_generators=self._restarts_workers or self._persistent_workers,
            may_join=self._deadline_s == math.inf,
            max_slots=max(self._prefetch_factor, MAX_DEPTH) + HELD_SLOTS + _SPARE_SLOTS,
            max_free_slots=self._prefetch_factor + _SPARE_SLOTS,
            asks_dataset=bool(self._progress.shards),
        )
        return Crew(self._context, job, begin)

    def _beginning(self, worker_id: int) -> BeginEpoch:
        """Where a worker that starts now has to begin: behind what it, or its predecessor, has sent."""
        skip, state = 0, None
        if self._received:
            skip = self._received[worker_id] * (self._batch_size or 1) if self._is_iterable else 0
            state = self._received_states[worker_id]
        return BeginEpoch(self._epoch, self._progress.epoch, self._shared_seed, skip, state, None)

    def _dispatch(self, number_of_batches: int = 1) -> None:
        """Draw more indices and ask for their batches, as far as there are indices and workers to ask.

        Waits until there is a message for each worker, where messages are for several batches.
        """
        self._due += number_of_batches
        at_once = self._depth.at_once
        if at_once > 1 and self._due < at_once * self._num_workers:
            return
        wanted: dict[int, list[int]] = {}
        try:
            while self._due:
                number, index = self._draw()
                self._due -= 1
                worker_id = self._pick_worker()
                if worker_id is None:
                    break
                self._load[worker_id] += 1
                self._owed[number] = _Owed(self._crew.workers[worker_id], index)
                wanted.setdefault(worker_id, []).append(number)
        except StopIteration:
            pass
        finally:
            self._ask_all(wanted)

    def _ask_all(self, wanted: dict[int, list[int]]) -> None:
        """Ask workers for batches; where an index cannot be sent, the others are asked all the same."""
        failures = []
        for worker_id, numbers in wanted.items():
            try:
                self._ask(self._crew.workers[worker_id], numbers)
            except Exception as error:
                failures.append(error)
                self._due += len(numbers)
        if failures:
            raise failures[0]

    def _pick_worker(self) -> int | None:
        share = self._depth.batches * self._num_workers // max(1, sum(self._is_active))
        for worker_id in itertools.islice(self._turns, self._num_workers):
            if self._is_active[worker_id] and (self._in_order or self._load[worker_id] < share):
                return worker_id
        return None

    def _ask(self, worker: Worker, numbers: list[int]) -> None:
        if self._deadline_s != math.inf and self._owed_by(worker) == numbers:
            worker.heard_s = time.monotonic()  # it had nothing to do until now
        indices = [self._owed[number].index for number in numbers]
        notices = worker.slots.notices()
        try:
            self._crew.post(worker.id, Tasks(self._epoch, numbers, indices, notices))
        except Exception:  # an index cannot be sent: nobody may wait for its batch
            for number in numbers:
                del self._owed[number]
            self._load[worker.id] -= len(numbers)
            for slot in notices.returned:
                worker.slots.give_back(slot)
            raise

    def _attend(self, timeout_s: float | None) -> bool:
        """Deal with what the workers did, waiting for it if need be; say whether there was anything."""
        until_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        if timeout_s != 0:  # else the caller only looks
            self._depth.waited()
        while True:
            wake_s = min(until_s, *(worker.heard_s + self._deadline_s for worker in self._owing()), math.inf)
            ready = self._wait(self._crew.wait, wake_s)
            try:
                events = self._crew.take(ready)
            except Exception as error:
                # Lost with it is what had arrived, which would be waited for.
                self._failure = RuntimeError(f"a batch of a DataLoader worker cannot be taken: {error}")
                self._shutdown_workers()
                raise self._failure from error
            # However long the caller was away, what a worker has said was heard just now.
            late = [worker for worker in self._owing() if time.monotonic() - worker.heard_s > self._deadline_s]
            for event in [*events, *map(self._crew.end_silent, late)]:
                if self._failure is not None:
                    break  # the workers were ended, and what the others did is of no use any more
                if isinstance(event, Death):
                    self._replace(event)
                else:
                    self._take(*event)
            if events or late or time.monotonic() >= until_s:
                return bool(events or late)

    def _owing(self) -> set[Worker]:
        """Return the workers whose silence would be noticed."""
        if self._deadline_s == math.inf:
            return set()
        return {owed.worker for owed in self._owed.values() if owed.made is None}

    def _take(self, worker: Worker, result: Result) -> None:
        """Receive a result."""
        self._meter.add(result.seconds, result.counts, batches=len(result.made))
        if result.generators is not None:
            self._generators[worker.id] = result.generators
            if self._persistent_workers:
                self._depth.hold()
        size_bytes = sum(result.slots.values()) // len(result.made)
        leases = Leases(worker.slots, result.slots, shared=len(result.made) > 1)
        arrival = _Arrival(leases, size_bytes, result.dataset_state)
        if result.epoch != self._epoch:
            return
        self._restarts[worker.id] = 0
        for made in result.made:
            if made.status == Status.EXHAUSTED:
                self._is_active[worker.id] = False
                self._received_states[worker.id] = result.dataset_state
                for number in self._owed_by(worker):
                    del self._owed[number]
                    self._dispatch()
                return
            owed = self._owed[made.number]
            owed.made, owed.arrival = made, arrival
            if not self._in_order:
                self._arrived.append(made.number)
            if self._received:
                self._received[worker.id] += 1
                self._received_states[worker.id] = result.dataset_state

    def _end_epoch(self) -> None:
        super()._end_epoch()
        self._progress.shard_states = list(self._received_states)

    def _deliver(self, number: int) -> Any:
        """Hand a batch to the caller, and ask for another one in its place."""
        owed = self._owed.pop(number)
        if not self._in_order:
            self._arrived.popleft()
        made, arrival, worker = owed.made, owed.arrival, owed.worker
        assert made is not None
        assert arrival is not None
        self._load[worker.id] -= 1
        grown = self._depth.delivered(arrival.size_bytes)
        self._dispatch(1 + grown * self._num_workers)
        self._hand_out(number, owed.index)
        progress = self._progress
        if progress.shards:
            progress.arriving = worker.id, arrival.dataset_state
        self._note(made.bad_samples)
        if made.status == Status.ERROR:
            owed.unpack().reraise()
        if self._staging is None:
            return owed.unpack()
        batch = self._staging.finish(self._stage(owed))
        self._stage_ahead()
        return batch

    def _stage(self, owed: _Owed) -> Future[Any]:
        """Start to bring a batch that is here to where the caller wants it, unless that was done before."""
        assert self._staging is not None
        return owed.staged or self._staging.begin(owed.unpack())

    def _stage_ahead(self) -> None:
        """Bring over the next batch while the caller works on this one, if it has arrived."""
        self._attend(0)
        number = self._find_ready()
        if number is not None and self._failure is None:
            owed = self._owed[number]
            if owed.made is not None and owed.made.status == Status.BATCH:
                owed.staged = self._stage(owed)

    def _replace(self, death: Death) -> None:
        """Put a new process in the place of a dead one and ask it for what that one owed."""
        worker_id, owed = death.worker.id, self._owed_by(death.worker)
        if not self._is_active[worker_id] and not owed:
            return  # it had nothing more to do
        self._restarts[worker_id] += 1
        if death.is_final or not self._restarts_workers or self._restarts[worker_id] > _MAX_RESTARTS:
            self._failure = death.as_error()
            self._shutdown_workers()
            return
        _log.warning("%s; another one starts and makes the %d batches that it owed", death, len(owed))
        self._meter.add({}, {"workers.replaced": 1})
        begin = self._beginning(worker_id)._replace(generators=self._generators[worker_id])
        self._crew.replace(worker_id, begin)
        successor = self._crew.workers[worker_id]
        for number in owed:
            self._owed[number].worker = successor
        if owed:
            self._ask(successor, owed)

    def _owed_by(self, worker: Worker) -> list[int]:
        return sorted(number for number, owed in self._owed.items() if owed.worker is worker and owed.made is None)

    def _shutdown_workers(self) -> None:
        """End the workers; torch's iterator has this under the same name."""
        if interpreter_is_leaving():  # multiprocessing has ended them
            if hasattr(self, "_crew"):
                self._crew.hang_up()
            return
        if hasattr(self, "_crew"):
            self._crew.stop()
        if self._staging is not None:
            self._staging.close()

    def __del__(self) -> None:
        self._shutdown_workers()
