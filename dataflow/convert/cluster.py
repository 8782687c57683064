"""Running jobs as tasks of a Ray cluster.

Ray places tasks on nodes and runs a task again whose process or node has died; a job may run twice, since it writes
atomically, and the same each time. Source, destination and quarantine must mean the same on every node, where
this package has to be installed. No more tasks are handed to the cluster than may run at once, and nothing but the
work that all share and the small record of each shard passes through its object store.

When a conversion fails or is interrupted, tasks that run are cancelled and waited for. After a kill -9 Ray ends them by
itself; one that publishes its shard meanwhile publishes the bytes that the resumed run would.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from connectors.errors import BadInputError, DataError
from dataflow.convert.workers import attempt
from dataflow.formats.destination import Destination

if TYPE_CHECKING:
    from dataflow.convert.job import Job, Work
    from dataflow.formats.protocol import Part

__all__ = ["connected", "run_on_ray"]

logger = logging.getLogger(__name__)

# How often a task is done again whose process or node died.
MAX_RETRIES = 3
# How long the end of cancelled tasks is waited for.
CANCEL_TIMEOUT_S = 60.0


@contextmanager
def connected() -> Iterator[None]:
    """Be connected to a cluster: to that of this process, else of `RAY_ADDRESS`, else of this machine.

    A connection that was there before stays.

    Raises:
        BadInputError: Ray is not installed, or there is no cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise BadInputError("engine ray needs Ray: pip install 'tiered-dataflow[ray]'") from error
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError) as error:
        raise BadInputError(
            f"no Ray cluster to work on: start one with `ray start --head`, or set RAY_ADDRESS ({error})"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def run_on_ray(work: Work, jobs: Iterable[Job], *, workers: int | None) -> Generator[tuple[Job, Part], None, None]:
    """Do jobs on the cluster that this process is connected to; yield each as it is done.

    Args:
        work: What all jobs share.
        jobs: The jobs.
        workers: Tasks at once; None for one per CPU of the cluster.

    Raises:
        DataError: What a task raised, or that its processes died again and again.
    """
    import ray

    shared = ray.put(work)
    task = ray.remote(do_job).options(num_cpus=1, max_retries=MAX_RETRIES, scheduling_strategy="SPREAD")
    limit = max(1, workers or int(ray.cluster_resources().get("CPU", 1)))
    running: dict[Any, Job] = {}
    todo = iter(jobs)
    try:
        while True:
            while len(running) < limit and (job := next(todo, None)) is not None:
                running[task.remote(shared, job)] = job
            if not running:
                return
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            job = running.pop(done)
            yield job, _result(ray, done, job)
    finally:
        _cancel(ray, list(running))


def do_job(work: Work, job: Job) -> Part | Exception:
    """Be a task: do one job, and return its part or what went wrong."""
    with Destination(work.url) as destination:
        return attempt(work, job, destination)


def _result(ray: Any, done: Any, job: Job) -> Part:
    try:
        result: Part | Exception = ray.get(done)
    except ray.exceptions.RayError as error:
        raise DataError(
            f"the task of {job.record} died {MAX_RETRIES + 1} times ({type(error).__name__}; out of memory?); "
            "what is finished is kept: go on with resume"
        ) from error
    if isinstance(result, Exception):
        raise result
    return result


def _cancel(ray: Any, tasks: list[Any]) -> None:
    """End tasks, so that none publishes a shard after this."""
    for task in tasks:
        ray.cancel(task, force=False)
    if tasks:
        _, left = ray.wait(tasks, num_returns=len(tasks), timeout=CANCEL_TIMEOUT_S)
        if left:
            logger.warning("%d tasks of a cancelled conversion did not end within %s s", len(left), CANCEL_TIMEOUT_S)
