"""Running shard jobs, in this process or in several.

Workers are spawned, never forked: the source may hold threads and sockets. Each watches its parent and ends with it,
however the parent died; interrupts are the parent's business alone. At most two jobs per worker are handed out ahead.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_processes
from typing import TYPE_CHECKING

from connectors.errors import DataError
from dataflow.convert.job import Work, write_shard
from dataflow.formats.destination import Destination

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from dataflow.convert.plan import ShardJob
    from dataflow.formats.protocol import Part

__all__ = ["run_here", "run_in_processes"]

JOBS_AHEAD = 2


def run_here(work: Work, jobs: Iterable[ShardJob]) -> Iterator[tuple[ShardJob, Part]]:
    """Write shards one after the other; yield each as it is done."""
    with Destination(work.url) as destination:
        for job in jobs:
            yield job, write_shard(work, job, destination)


def run_in_processes(work: Work, jobs: Iterable[ShardJob], *, workers: int) -> Iterator[tuple[ShardJob, Part]]:
    """Write shards in `workers` processes; yield each as it is done, in any order. The first failure ends it.

    Raises:
        DataError: What a worker raised, or that one died.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(work,))
    todo = iter(jobs)
    running: dict[Future[Part], ShardJob] = {}
    try:
        while True:
            while len(running) < JOBS_AHEAD * workers and (job := next(todo, None)) is not None:
                running[pool.submit(_run_job, job)] = job
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process of the conversion died (killed, or out of memory); finished shards are kept: "
            "go on with resume"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_work: Work
_destination: Destination


def _start_worker(work: Work) -> None:
    global _work, _destination
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()
    _work = work
    _destination = Destination(work.url)


def _run_job(job: ShardJob) -> Part:
    return write_shard(_work, job, _destination)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for_processes([parent.sentinel])
        os._exit(1)
