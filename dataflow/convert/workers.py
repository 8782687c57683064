"""Running jobs, in this process or in several.

Worker processes are started by `subprocess`, never forked (the source may hold threads and sockets) and not by
multiprocessing's spawn, which runs the caller's main module again and keeps semaphores in /dev/shm. Each has one socket
pair to its parent: jobs go down, one at a time, results come up. A worker ends when the socket does, so however the
parent dies, none is left; interrupts are the parent's business alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Generator, Iterable
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

from connectors.errors import DataError
from connectors.limits import DEFAULT_LIMITS, FIRST_ANSWER_VARIABLE
from dataflow.convert.job import Work, run_job
from dataflow.formats.destination import Destination

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from dataflow.convert.job import Job
    from dataflow.formats.protocol import Part

__all__ = ["attempt", "run_here", "run_in_processes"]

WORKER = "dataflow.convert.worker"


def run_here(work: Work, jobs: Iterable[Job]) -> Generator[tuple[Job, Part], None, None]:
    """Do jobs one after the other; yield each as it is done."""
    with Destination(work.url) as destination:
        for job in jobs:
            yield job, run_job(work, job, destination)


def run_in_processes(
    work: Any, jobs: Iterable[Any], *, workers: int, module: str = WORKER
) -> Generator[Any, None, None]:
    """Do jobs in `workers` processes; yield each with its result as it is done, in any order.

    The first failure ends it: the other workers finish the job that they are at, whose result stays for a resumed run.

    Args:
        work: What all jobs share; picklable.
        jobs: The jobs; picklable.
        workers: Number of processes.
        module: What a worker runs, with the number of its descriptor: it is sent the work, then job after job, answers
            each with its result or with what went wrong, and ends at None.

    Raises:
        DataError: What a worker raised, or that one died.
    """
    todo = iter(jobs)
    crew: list[_Worker] = []
    try:
        # Together, so that they start side by side; then each is told its work.
        crew.extend(_Worker(module) for _ in range(workers))
        for worker in crew:
            worker.send(work)
        busy = [worker for worker in crew if worker.begin(next(todo, None))]
        while busy:
            ready = wait([worker.connection for worker in busy])
            for worker in [worker for worker in busy if worker.connection in ready]:
                yield worker.finish()
                if not worker.begin(next(todo, None)):
                    busy.remove(worker)
    finally:
        for worker in crew:
            worker.dismiss()
        for worker in crew:
            worker.join()


class _Worker:
    """One process, seen from its parent."""

    def __init__(self, module: str) -> None:
        self.connection, theirs = Pipe()
        self._job: Any = None
        with theirs:
            command = [sys.executable, "-P", "-m", module, str(theirs.fileno())]
            # The parent has reached the stores; one that is away when a worker comes to it will be back.
            patient = {FIRST_ANSWER_VARIABLE: f"{DEFAULT_LIMITS.retry_timeout_s:g}", **os.environ}
            # Inherited: an interrupt before it can ignore them would end it with a traceback.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=patient
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def begin(self, job: Any) -> bool:
        """Hand out a job; False where there is none left."""
        if job is None:
            return False
        self._job = job
        self.send(job)
        return True

    def finish(self) -> tuple[Any, Any]:
        """Return the job's result, which must have arrived, or raise what went wrong."""
        job, self._job = self._job, None
        assert job is not None
        try:
            result = self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if isinstance(result, Exception):
            raise result
        return job, result

    def dismiss(self) -> None:
        """Ask the worker to end after its job."""
        try:
            self.connection.send(None)
        except OSError:
            return  # it has ended already

    def join(self) -> None:
        """Wait for the end of the process; an interrupt while waiting kills it."""
        try:
            self._process.wait()
        finally:
            self._process.kill()
            self._process.wait()
            self.connection.close()

    def send(self, message: object) -> None:
        """Send the work, or a job; it is received when the process comes to it."""
        try:
            self.connection.send(message)
        except OSError as error:
            raise self._died() from error

    def _died(self) -> DataError:
        code = self._process.wait()
        return DataError(
            f"a worker process ended with {code} (killed, or out of memory?); what is finished is kept: "
            "go on with resume"
        )


def serve(connection: Connection) -> None:
    """Be a worker: receive the work, then jobs until None, and answer each with its part or with what went wrong."""
    work: Work = connection.recv()
    with Destination(work.url) as destination:
        while (job := connection.recv()) is not None:
            connection.send(attempt(work, job, destination))


def attempt(work: Work, job: Job, destination: Destination) -> Part | Exception:
    """Do one job; return its part or what went wrong, as an error that travels between processes."""
    try:
        return run_job(work, job, destination)
    except DataError as error:
        return error
    except Exception as error:  # noqa: BLE001  anything else may not survive pickling
        return DataError(f"{job.record} at {work.url} failed: {type(error).__name__}: {error}")
