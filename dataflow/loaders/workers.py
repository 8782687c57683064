"""A worker process: receives indices, makes batches, hands them over.

It is seeded, limited to one thread and told about itself exactly as torch's workers are. Between batches it sleeps in
`recvmsg`; an end of file there is its order to leave.
"""

from __future__ import annotations

import gc
import os
import pickle
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise, repeat
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch.utils.data import IterDataPipe, graph_settings

from dataflow.loaders.bad_samples import BadSample, BadSamples
from dataflow.loaders.channel import Channel
from dataflow.loaders.collate import Fetch, collate_into_slots
from dataflow.loaders.dataset_state import keep_state, open_at, take_state
from dataflow.loaders.depth import AHEAD_BYTES
from dataflow.loaders.generators import GeneratorStates, GeneratorWatch, seed_worker
from dataflow.loaders.lifeline import Lifeline
from dataflow.loaders.pace import PARCEL_S, Pace
from dataflow.loaders.packing import Parcel, Piece, pack, pack_rows
from dataflow.loaders.recycling import keep_freed_memory
from dataflow.loaders.slots import NewSlot, Notices, Placement, SlotPool
from dataflow.loaders.torch_private import (
    DatasetKind,
    ExceptionWrapper,
    forget_worker_info,
    name_thread,
    set_worker_info,
    set_worker_signal_handlers,
)
from dataflow.observe.stages import Recorder, stage

__all__ = [
    "BeginEpoch",
    "Job",
    "Made",
    "Order",
    "Result",
    "Status",
    "Tasks",
    "decode_order",
    "decode_result",
    "encode_order",
    "encode_result",
    "worker_main",
]


@dataclass(frozen=True)
class Job:
    """All that the workers of one iterator share. Travels by pickle where they are not forked.

    Attributes:
        trainer_pid: The process whose end is theirs.
        reports_generators: Whether results say where the global generators are.
        may_join: Whether several batches may be made before the first of them is sent.
        max_slots: Limit on the slots of one worker.
        max_free_slots: Free slots that one worker keeps.
        asks_dataset: Whether results say where the dataset is.
        bad_samples: What to do about samples that cannot be read.
        shared_seed: Seed that all ranks share, for torch's data pipes.
        The others are torch's DataLoader arguments of the same name.
    """

    kind: int
    dataset: Any
    auto_collation: bool
    collate_fn: Callable[[Any], Any]
    drop_last: bool
    worker_init_fn: Callable[[int], None] | None
    num_workers: int
    base_seed: int
    shared_seed: int | None
    bad_samples: BadSamples | None
    trainer_pid: int
    reports_generators: bool
    may_join: bool
    max_slots: int
    max_free_slots: int
    asks_dataset: bool


class BeginEpoch(NamedTuple):
    """Forget the last epoch. For iterable datasets: begin again, and go to where a loaded state says.

    Attributes:
        epoch: Counts the orders of this kind: what was made for another one is not wanted.
        number: The epoch's number, on which random transforms depend.
        skip: Samples of batches that are already handed out; read and dropped unless `dataset_state` is given.
        dataset_state: Of the dataset, where that says where it is.
        generators: For the successor of a dead worker: where that one's generators were after its last batch.
    """

    epoch: int
    number: int
    shared_seed: int | None
    skip: int
    dataset_state: Any
    generators: GeneratorStates | None


class Task(NamedTuple):
    """Make one batch."""

    epoch: int
    number: int
    index: Any


class Tasks(NamedTuple):
    """Make some batches. `notices` are about slots and are read on arrival, before it is the tasks' turn."""

    epoch: int
    numbers: list[int]
    indices: list[Any]
    notices: Notices


Order: TypeAlias = BeginEpoch | Tasks


def encode_order(order: Order) -> bytes:
    """Turn an order into a message. Plain tuples are pickled twice as fast as named ones."""
    if isinstance(order, BeginEpoch):
        return pickle.dumps((True, *order), 5)
    return pickle.dumps((False, order.epoch, order.numbers, _joined(order.indices), *order.notices), 5)


def decode_order(message: bytes) -> Order:
    """Turn a message back into an order."""
    begins, *fields = pickle.loads(message)
    if begins:
        return BeginEpoch(*fields)
    epoch, numbers, indices, returned, retired = fields
    return Tasks(epoch, numbers, _parted(indices), Notices(returned, retired))


def _joined(indices: list[Any]) -> list[Any] | tuple[Any, list[int]]:
    """Make one array of several, which is pickled faster, and say where each of them ends."""
    if indices and all(type(one) is np.ndarray and one.dtype == np.int64 and one.ndim == 1 for one in indices):
        return np.concatenate(indices), [*accumulate(map(len, indices))]
    return indices


def _parted(indices: list[Any] | tuple[Any, list[int]]) -> list[Any]:
    if isinstance(indices, list):
        return indices
    samples, ends = indices
    return [samples[start:end] for start, end in pairwise([0, *ends])]


class Status:
    """What a result is."""

    BATCH = 0
    ERROR = 1
    EXHAUSTED = 2


class Made(NamedTuple):
    """What became of a task.

    Attributes:
        status: A `Status`.
        parcel: The batch, or the wrapped exception.
        bad_samples: Those that were found while it was made.
    """

    number: int
    status: int
    parcel: Parcel | Piece
    bad_samples: list[BadSample]


class Result(NamedTuple):
    """The answer to tasks.

    Attributes:
        made: By task.
        slots: Those of the parcels, and how much of each.
        new_slots: Slots to adopt; their descriptors came with the message, in this order.
        dropped_slots: Slots to forget.
        seconds: Time by stage since the last result.
        counts: Counters since the last result.
        dataset_state: After the last of them, where the dataset has one; the wrapped exception, if it cannot be had.
        generators: After the last of them, if they have drawn from them.
    """

    epoch: int
    made: list[Made]
    slots: dict[int, int]
    new_slots: list[NewSlot]
    dropped_slots: list[int]
    seconds: dict[str, float]
    counts: dict[str, int]
    dataset_state: Any
    generators: GeneratorStates | None


def encode_result(result: Result) -> bytes:
    """Turn a result into a message."""
    made = [(number, status, _plain(parcel), bad) for number, status, parcel, bad in result.made]
    return pickle.dumps((result.epoch, made, result.slots, [tuple(slot) for slot in result.new_slots], *result[4:]), 5)


def decode_result(message: bytes) -> Result:
    """Turn a message back into a result."""
    epoch, fields, slots, new_slots, *rest = pickle.loads(message)
    made = [Made(number, status, _parcel(*plain), bad) for number, status, plain, bad in fields]
    return Result(epoch, made, slots, [NewSlot(*slot) for slot in new_slots], *rest)


def _plain(parcel: Parcel | Piece) -> tuple[Any, ...]:
    if isinstance(parcel, Piece):
        return tuple(parcel)
    stream, buffers = parcel
    return stream if isinstance(stream, bytes) else tuple(stream), [tuple(one) for one in buffers]


def _parcel(first: Any, *rest: Any) -> Parcel | Piece:
    if isinstance(first, dict):
        return Piece(first, *rest)
    (buffers,) = rest
    where = first if isinstance(first, bytes) else Placement(*first)
    return Parcel(where, [Placement(*one) for one in buffers])


def worker_main(job: Job, worker_id: int, sock: socket.socket, begin: BeginEpoch) -> None:
    """Run a worker until the trainer closes the channel; nothing of it keeps the dataset alive then."""
    lifeline = Lifeline(job.trainer_pid)
    set_worker_signal_handlers()
    name_thread("pt_data_worker")  # by which torch's are known in `top`
    try:
        with Recorder() as recorder:
            _Worker(job, worker_id, Channel(sock), recorder).run(begin)
    except (KeyboardInterrupt, BrokenPipeError, ConnectionResetError):
        pass  # the trainer raises, or has left
    forget_worker_info()
    lifeline.let_go()


class _Outcome(NamedTuple):
    status: int
    batch: Any
    bad_samples: list[BadSample]


class _Worker:
    def __init__(self, job: Job, worker_id: int, channel: Channel, recorder: Recorder) -> None:
        self._job = job
        self._where = f"in DataLoader worker process {worker_id}"
        self._channel = channel
        self._recorder = recorder
        self._orders: deque[BeginEpoch | Task] = deque()
        self._pace = Pace()
        self._pool = SlotPool(max_slots=job.max_slots, max_free=job.max_free_slots, free_bytes=2 * AHEAD_BYTES)
        self._fetch: Fetch | None = None
        self._epoch = 0
        self._exhausted = False
        self._failure: ExceptionWrapper | None = None
        self._init_failure: ExceptionWrapper | None = None
        self._dataset = job.dataset
        self._shared_rng = torch.Generator()
        torch.set_num_threads(1)
        keep_freed_memory()
        gc.freeze()  # what was inherited is neither searched for garbage nor, by that, copied page by page
        seed_worker(job.base_seed, worker_id)
        self._dataset = self._reseeded(job.shared_seed)
        set_worker_info(worker_id, job.num_workers, job.base_seed + worker_id, self._dataset)
        collate_into_slots(self._pool)
        try:
            if job.worker_init_fn is not None:
                job.worker_init_fn(worker_id)
        except Exception:
            self._init_failure = self._wrap()
        self._watch = GeneratorWatch()
        self._watch.changed()  # its successor is seeded and initialised to the same states

    def run(self, begin: BeginEpoch) -> None:
        self._begin(begin)
        while (order := self._next_order()) is not None:
            if isinstance(order, BeginEpoch):
                self._begin(order)
            elif order.epoch == self._epoch and not self._exhausted:
                self._work([order, *self._orders_like(order)])
            del order

    def _next_order(self) -> BeginEpoch | Task | None:
        for message in self._channel.receive(block=not self._orders):
            order = decode_order(message)
            if isinstance(order, BeginEpoch):
                self._orders.append(order)
            else:
                self._pool.take_back(order.notices)
                self._orders += map(Task, repeat(order.epoch), order.numbers, order.indices)
        return self._orders.popleft() if self._orders else None

    def _orders_like(self, first: Task) -> Iterator[Task]:
        """Take the tasks that follow, of the same epoch, as far as their batches travel together."""
        if self._job.kind == DatasetKind.Iterable or self._job.asks_dataset or not self._job.may_join:
            return  # each batch has a state of its own, and that of a stream may be the last
        for _ in range(1, self._pace.batches):
            following = self._orders[0] if self._orders else None
            if not isinstance(following, Task) or following.epoch != first.epoch:
                return
            self._orders.popleft()
            yield following

    def _begin(self, begin: BeginEpoch) -> None:
        self._epoch, self._exhausted, self._failure = begin.epoch, False, self._init_failure
        if self._failure is not None:
            return
        job = self._job
        try:
            self._dataset = self._reseeded(begin.shared_seed)
            make_fetch = partial(
                Fetch,
                job.kind,
                self._dataset,
                auto_collation=job.auto_collation,
                collate_fn=job.collate_fn,
                drop_last=job.drop_last,
                memory=self._pool,
                epoch=begin.number,
                bad_samples=job.bad_samples,
                may_join=job.may_join,
            )
            self._fetch = open_at(begin.dataset_state, self._dataset, make_fetch, skip=begin.skip)
            if begin.generators is not None:
                begin.generators.restore()
        except Exception:
            self._fetch, self._failure = None, self._wrap()

    def _reseeded(self, shared_seed: int | None) -> Any:
        if not isinstance(self._dataset, IterDataPipe):
            return self._dataset
        assert shared_seed is not None
        self._shared_rng.manual_seed(shared_seed)
        return graph_settings.apply_random_seed(self._dataset, self._shared_rng)

    def _work(self, tasks: list[Task]) -> None:
        began_s = time.perf_counter()
        slots: dict[int, int] = {}
        made = self._make_together(tasks, slots) or self._make_some(tasks, slots, began_s + PARCEL_S)
        with stage("handover"):
            self._orders.extendleft(reversed(tasks[len(made) :]))
            self._pace.made(len(made), time.perf_counter() - began_s, sum(slots.values()))
            self._send(made, slots)

    def _make_together(self, tasks: list[Task], slots: dict[int, int]) -> list[Made] | None:
        """Return what became of several tasks, where one call makes all of their batches."""
        if len(tasks) == 1 or self._fetch is None or not self._fetch.joins:
            return None
        try:
            gathered = self._fetch.together([task.index for task in tasks])
            with stage("handover"):
                pieces = pack_rows(*gathered, self._pool, slots) if gathered.are_rows else None
            batches = gathered.batches() if pieces is None else []
        except Exception:  # one by one they tell which of them is to blame
            return None
        if pieces is not None:
            return [Made(task.number, Status.BATCH, piece, []) for task, piece in zip(tasks, pieces, strict=True)]
        with stage("handover"):
            return [
                self._pack(task, Status.BATCH, batch, [], slots) for task, batch in zip(tasks, batches, strict=True)
            ]

    def _make_some(self, tasks: list[Task], slots: dict[int, int], until_s: float) -> list[Made]:
        """Return what became of the first tasks; when it takes too long, the others wait until these are sent."""
        made: list[Made] = []
        for task in tasks:
            outcome = self._make(task.index)
            with stage("handover"):  # at once: who makes batches may make the next one in the same memory
                made.append(self._pack(task, *outcome, slots))
            del outcome
            if time.perf_counter() > until_s:
                break
        return made

    def _make(self, index: Any) -> _Outcome:
        """Return what became of a task."""
        fetch = self._fetch
        if self._failure is not None or fetch is None:
            return _Outcome(Status.ERROR, self._failure, [])
        status, batch = Status.BATCH, None
        try:
            batch = fetch(index)
        except Exception as error:
            self._exhausted = isinstance(error, StopIteration) and self._job.kind == DatasetKind.Iterable
            status, batch = (Status.EXHAUSTED, None) if self._exhausted else (Status.ERROR, self._wrap())
        return _Outcome(status, batch, [] if fetch.sieve is None else fetch.sieve.take_found())

    def _pack(self, task: Task, status: int, batch: Any, bad_samples: list[BadSample], slots: dict[int, int]) -> Made:
        try:
            parcel = pack(batch, self._pool, slots)
        except Exception:
            status, parcel = Status.ERROR, pack(self._wrap(), self._pool, slots)
        return Made(task.number, status, parcel, bad_samples)

    def _wrap(self) -> ExceptionWrapper:
        """Wrap the exception that is being handled, so that it can be sent."""
        wrapper = ExceptionWrapper(where=self._where)
        try:
            pickle.dumps(wrapper.exc_type)
        except Exception:
            wrapper.exc_type = RuntimeError  # its class exists in this process only
        return wrapper

    def _encode(self, result: Result) -> bytes:
        is_stream = self._job.kind == DatasetKind.Iterable
        if not self._job.asks_dataset or self._fetch is None or (is_stream and result.made[-1].status == Status.ERROR):
            return encode_result(result)
        try:
            state = keep_state(self._dataset) if self._exhausted else take_state(self._dataset, self._fetch)
            return encode_result(result._replace(dataset_state=state))
        except Exception:  # is raised where somebody asks for the loader's state
            return encode_result(result._replace(dataset_state=self._wrap()))

    def _send(self, made: list[Made], slots: dict[int, int]) -> None:
        new_slots, dropped_slots, fds = self._pool.ship(slots)
        recorder = self._recorder
        seconds, counts = dict(recorder.seconds), dict(recorder.counts)
        recorder.seconds.clear()
        recorder.counts.clear()
        drawn = self._watch.changed() if self._job.reports_generators else None
        result = Result(self._epoch, made, slots, new_slots, dropped_slots, seconds, counts, None, drawn)
        try:
            self._channel.send(self._encode(result), fds)
        finally:
            for fd in fds:
                os.close(fd)
