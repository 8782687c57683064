"""The trainer's side of its worker processes: start, talk, notice deaths, replace, stop.

    Crew.post  -> orders to one worker, never blocking
    Crew.wait  -> when something arrives, by one poll over channels and process descriptors
    Crew.take  -> results, and deaths

A worker's results that were sent in full before it died are received before its death is reported. Its first message
is an empty one: an interpreter that is started anew may fail before it can work, on a main module without a guard for
instance, and so would any successor of it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import select
import signal
import socket
import time
import warnings
from dataclasses import dataclass, field
from typing import Any

from dataflow.loaders.channel import Channel, channel_pair
from dataflow.loaders.slots import Holdings, SlotMap
from dataflow.loaders.torch_private import JOIN_TIMEOUT_S
from dataflow.loaders.workers import BeginEpoch, Job, Order, Result, decode_result, encode_order, worker_main

__all__ = ["Crew", "Death", "Worker"]

_log = logging.getLogger(__name__)

_HERE = b""


@dataclass(eq=False)
class Worker:
    """One process.

    Attributes:
        process: As multiprocessing knows it.
        channel: To it.
        slots: Its shared memory.
        lifeline: Readable once the process is dead.
        heard_s: When it was last heard of, or was given work after it had none; on the monotonic clock.
        is_here: It has begun to work.
    """

    id: int
    process: Any
    channel: Channel
    slots: SlotMap
    lifeline: int
    owns_lifeline: bool
    heard_s: float = field(default_factory=time.monotonic)
    is_here: bool = False


@dataclass(frozen=True, slots=True)
class Death:
    """The end of a worker that was not asked to leave.

    Attributes:
        worker: Whose end it is.
        silent_s: How long it had made no batch, if it was ended for that.
    """

    worker: Worker
    silent_s: float | None = None

    @property
    def is_final(self) -> bool:
        """Whether a successor would end alike: it has failed by itself before it could work."""
        return not self.worker.is_here and (self.worker.process.exitcode or 0) > 0

    def as_error(self) -> RuntimeError:
        """Say it in torch's words where it has any, with the cause chained."""
        if self.silent_s is not None:
            return RuntimeError(str(self))
        process = self.worker.process
        error = RuntimeError(f"DataLoader worker (pid(s) {process.pid}) exited unexpectedly")
        error.__cause__ = RuntimeError(_obituary(process.pid, process.exitcode))
        return error

    def __str__(self) -> str:
        process = self.worker.process
        if self.silent_s is not None:
            return f"DataLoader worker (pid {process.pid}) made no batch for {self.silent_s:.3g} s and was ended"
        return _obituary(process.pid, process.exitcode).strip()


def _obituary(pid: int, exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        text = f"DataLoader worker (pid {pid}) is killed by signal: {signal.strsignal(-exit_code)}. "
        if -exit_code == signal.SIGBUS:
            text += "The system ran out of memory for the batches that workers hand over. "
        return text
    return (
        f"DataLoader worker (pid {pid}) exited unexpectedly with exit code {exit_code}. Details are lost due to "
        "multiprocessing. Rerunning with num_workers=0 may give better error trace."
    )


class Crew:
    """The workers of one iterator. Used by one thread.

    Args:
        context: Whatever makes processes: `multiprocessing`, or one of its contexts.
        job: What the workers do.
        begin: For each worker, where it begins.

    Attributes:
        workers: By id.
    """

    def __init__(self, context: Any, job: Job, begin: list[BeginEpoch]) -> None:
        self._context = context
        self._job = job
        self._pid = os.getpid()
        self._holdings = Holdings()
        self._poll = select.poll()
        self._by_fd: dict[int, Worker] = {}
        self._is_stopped = False
        self.workers: list[Worker] = []
        try:
            for worker_id, begin_one in enumerate(begin):
                self.workers.append(self._start(worker_id, begin_one))
        except BaseException:
            self.stop()
            raise

    @property
    def is_stopped(self) -> bool:
        """Whether `stop` was called or the workers belong to a parent that forked; nothing else may be called, then."""
        return self._is_stopped or os.getpid() != self._pid

    def post(self, worker_id: int, order: Order) -> None:
        """Give an order to a worker."""
        worker = self.workers[worker_id]
        worker.channel.post(encode_order(order))
        if worker.channel.pending:
            self._watch(worker)

    def begin(self, worker_id: int, begin: BeginEpoch) -> None:
        """Let a worker begin an epoch; one that has died meanwhile is replaced."""
        if self.workers[worker_id].lifeline in self._by_fd:
            self.post(worker_id, begin)
        else:
            self.replace(worker_id, begin)

    def wait(self, timeout_s: float | None) -> list[int]:
        """Wait until something may have happened, or for `timeout_s` (None waits for ever). An interrupt loses nothing.

        Returns:
            The descriptors to look at, for `take`.
        """
        return [fd for fd, _ in self._poll.poll(None if timeout_s is None else timeout_s * 1000)]

    def take(self, ready: list[int]) -> list[tuple[Worker, Result] | Death]:
        """Return what happened. Descriptors may be ready for nothing more than the start of a worker."""
        events: list[tuple[Worker, Result] | Death] = []
        for worker in {self._by_fd[fd] for fd in ready}:
            # Whether it is dead was looked at first: then what it sent before is already in the socket.
            events += [(worker, result) for result in self._receive(worker)]
            if worker.lifeline in ready or worker.channel.closed:
                self._bury(worker)
                events.append(Death(worker))
        return events

    def end_silent(self, worker: Worker) -> Death:
        """End a worker that is not heard of. One that the system holds fast in a call goes when that returns."""
        silent_s = time.monotonic() - worker.heard_s
        worker.process.kill()
        self._bury(worker)
        return Death(worker, silent_s)

    def replace(self, worker_id: int, begin: BeginEpoch) -> None:
        """Start a new process in the place of a dead one."""
        self.workers[worker_id] = self._start(worker_id, begin)

    def stop(self) -> None:
        """End all workers: in order if they can, by force after torch's patience. Safe to call again."""
        if self.is_stopped:
            return
        self._is_stopped = True
        for worker in self.workers:
            self._forget(worker)
            worker.channel.close()  # an end of file is the order to leave
        for worker in self.workers:
            worker.process.join(timeout=JOIN_TIMEOUT_S)
        for worker in self.workers:
            if worker.process.is_alive():
                worker.process.terminate()
                worker.process.join(timeout=JOIN_TIMEOUT_S)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()

    def hang_up(self) -> None:
        """Close the channels, and leave the workers to whoever ends them. Nothing else may be called any more."""
        for worker in self.workers:
            worker.channel.close()

    def _start(self, worker_id: int, begin: BeginEpoch) -> Worker:
        channel, worker_end = channel_pair()
        try:
            process = self._context.Process(target=_work, args=([self._job], worker_id, worker_end, begin), daemon=True)
            _start_process(process)
        except BaseException:
            channel.close()
            raise
        finally:
            worker_end.close()
        try:
            lifeline, owns_lifeline = os.pidfd_open(process.pid), True
        except OSError:
            lifeline, owns_lifeline = process.sentinel, False
        worker = Worker(worker_id, process, channel, SlotMap(self._holdings), lifeline, owns_lifeline)
        self._by_fd[worker.lifeline] = self._by_fd[channel.sock.fileno()] = worker
        self._poll.register(worker.lifeline, select.POLLIN)
        self._watch(worker)
        return worker

    def _watch(self, worker: Worker) -> None:
        mask = select.POLLIN | select.POLLOUT if worker.channel.pending else select.POLLIN
        self._poll.register(worker.channel.sock.fileno(), mask)

    def _receive(self, worker: Worker) -> list[Result]:
        channel = worker.channel
        if channel.pending:
            channel.flush()
            self._watch(worker)
        messages = channel.receive(block=False)
        worker.is_here = worker.is_here or bool(messages)
        if messages != [_HERE]:  # its start counts with its first batch
            worker.heard_s = time.monotonic()
        results = [decode_result(message) for message in messages if message != _HERE]
        for result in results:
            for slot in result.new_slots:
                worker.slots.adopt(slot, channel.fds.popleft())
            worker.slots.forget(result.dropped_slots)
        return results

    def _bury(self, worker: Worker) -> None:
        self._forget(worker)
        worker.channel.close()
        worker.process.join(timeout=JOIN_TIMEOUT_S)
        if worker.process.is_alive():  # it closed its channel, or its exit hangs
            worker.process.kill()
            worker.process.join(timeout=JOIN_TIMEOUT_S)

    def _forget(self, worker: Worker) -> None:
        if self._by_fd.pop(worker.lifeline, None) is None:
            return
        del self._by_fd[worker.channel.sock.fileno()]
        self._poll.unregister(worker.lifeline)
        self._poll.unregister(worker.channel.sock)
        if worker.owns_lifeline:
            os.close(worker.lifeline)


def _work(job: list[Job], worker_id: int, sock: socket.socket, begin: BeginEpoch) -> None:
    """Say that the worker is here, and run it. Takes the job out of the list, as the process keeps its arguments."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the trainer has left, which is seen again soon
        Channel(sock).send(_HERE)
    worker_main(job.pop(), worker_id, sock, begin)


def _start_process(process: Any) -> None:
    try:
        process.start()
    except (TypeError, AttributeError, pickle.PicklingError):
        warnings.warn(
            "Got pickle error when attempting to start a worker Process. "
            "This might be because the worker Process arguments are not picklable. "
            "Python 3.14+ changed the multiprocessing start method in non-Mac POSIX platforms "
            "to 'forkserver', which requires the worker Process arguments to be picklable. "
            "You can also try multiprocessing.set_start_method('fork').",
            stacklevel=2,
        )
        raise
