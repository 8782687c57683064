"""Scanning files, in this process or in several: the jobs of a build."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from connectors.errors import DataError
from dataflow.convert.workers import run_in_processes
from dataflow.formats.place import Place

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from cache.access import BlockReader
    from connectors.objects import ObjectMeta
    from dataflow.formats.scanned import ScannedFormat
    from dataflow.formats.sidecar import FileScan

__all__ = ["ScanJob", "ScanTask", "cut_jobs", "scan_files", "serve"]

WORKER = "dataflow.indexing.worker"


@dataclass(frozen=True, slots=True)
class ScanTask:
    """What all jobs share.

    Attributes:
        form: The format.
        url: Where the files are.
        reader: Reads there.
    """

    form: ScannedFormat
    url: str
    reader: BlockReader

    def run(self, job: ScanJob) -> list[FileScan]:
        """Scan the files of a job."""
        place = Place(self.url, self.reader)
        return [self.form.scan_file(place, meta) for meta in job.files]


@dataclass(frozen=True, slots=True)
class ScanJob:
    """Some files to scan.

    Attributes:
        files: The files.
    """

    files: tuple[ObjectMeta, ...]


def cut_jobs(files: Sequence[ObjectMeta], *, job_bytes: int, job_files: int) -> list[ScanJob]:
    """Cut files into jobs of so many bytes or files at most, in their order, but for files that are larger."""
    jobs: list[ScanJob] = []
    group: list[ObjectMeta] = []
    size_bytes = 0
    for meta in files:
        if group and (size_bytes + meta.size_bytes > job_bytes or len(group) == job_files):
            jobs.append(ScanJob(tuple(group)))
            group, size_bytes = [], 0
        group.append(meta)
        size_bytes += meta.size_bytes
    return [*jobs, ScanJob(tuple(group))] if group else jobs


def scan_files(task: ScanTask, jobs: Sequence[ScanJob], *, workers: int) -> Iterator[tuple[ScanJob, list[FileScan]]]:
    """Do jobs, in this process for `workers` up to 1; yield each with its result as it is done, in any order.

    Raises:
        DataError: A file cannot be scanned; the others of the job are not told of.
    """
    if workers <= 1:
        for job in jobs:
            yield job, task.run(job)
    else:
        yield from run_in_processes(task, jobs, workers=workers, module=WORKER)


def serve(connection: Connection) -> None:
    """Be a worker: receive the task, then jobs until None; answer each with its scans or with what went wrong."""
    task: ScanTask = connection.recv()
    while (job := connection.recv()) is not None:
        try:
            answer: object = task.run(job)
        except DataError as error:
            answer = error
        except Exception as error:  # noqa: BLE001  anything else may not survive pickling
            answer = DataError(f"scanning {job.files[0].key} failed: {type(error).__name__}: {error}")
        connection.send(answer)
