"""Running the jobs of one stage: those that an earlier run finished are taken over, the others are done."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from connectors.errors import BadInputError, CorruptError
from dataflow.convert.cluster import run_on_ray
from dataflow.convert.job import PartRecord
from dataflow.convert.progress import Progress
from dataflow.convert.rejects import Rejects, write_rejects
from dataflow.convert.workers import run_here, run_in_processes
from dataflow.formats.destination import PART_SUFFIX

if TYPE_CHECKING:
    from dataflow.convert.job import Work
    from dataflow.formats.destination import Destination
    from dataflow.formats.protocol import Part

__all__ = ["ENGINES", "Stages", "read_records"]

ENGINES = ("local", "ray")

# Where less is left to do, a second process costs more (it imports for half a second or more) than it saves.
WORTHWHILE_S = 2.0
# Of the quarantine: what opening the source passed over.
SCAN_SHARD = "scan-00000"


@dataclass(slots=True)
class Stages:
    """Runs stage after stage of one conversion.

    Attributes:
        workers: Processes or tasks at once; None for one per core where the first job says that it is worth it.
        engine: What runs jobs, one of `ENGINES`.
        records: What an earlier run finished, by the names of its jobs.
        progress: Told what is done.
        num_errors: Bad samples so far, over all stages.
        examples: The first of them.
        quarantine: The shards of the quarantine so far: by the job's name, the shard's name and part.
    """

    workers: int | None
    engine: str
    records: dict[str, Part]
    progress: Callable[[Progress], None] | None
    num_errors: int = 0
    examples: list[str] = field(default_factory=list)
    quarantine: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self, name: str, work: Work, jobs: Sequence[Any], *, num_samples: int) -> list[Part]:
        """Return the results of jobs, in their order.

        Raises:
            DataError: A job failed, or there are too many bad samples.
        """
        parts = {job.record: self.records[job.record] for job in jobs if job.record in self.records}
        for part in parts.values():
            self._count(work, part)
        report = _Reporter(name, jobs, num_samples, self.progress)
        report([job for job in jobs if job.record in parts], parts)
        with closing(self._do(work, [job for job in jobs if job.record not in parts])) as done:
            for job, part in done:
                parts[job.record] = part
                self._count(work, part)
                report([job], parts)
        ordered = [parts[job.record] for job in jobs]
        self.examples += [example for part in ordered for example in part.get("examples", ())]
        self.quarantine |= {
            job.record: parts[job.record]["quarantine"] for job in jobs if "quarantine" in parts[job.record]
        }
        return ordered

    def count_bad(self, work: Work) -> None:
        """Take the ranges into account that opening the source passed over."""
        rejects = Rejects(work.source, work.policy, work.origin, self.num_errors)
        for bad in work.bad:
            rejects.bad_range(bad)
        self.num_errors = rejects.num_errors
        self.examples += rejects.examples
        if "quarantine" in (part := write_rejects(work, rejects, SCAN_SHARD)):
            self.quarantine[SCAN_SHARD] = part["quarantine"]

    def _do(self, work: Work, jobs: Sequence[Any]) -> Generator[tuple[Any, Part], None, None]:
        workers = self.workers
        in_process = any(url.startswith("memory://") for url in (work.url, work.quarantine_url, work.source.index.url))
        if self.engine == "ray":
            if in_process:
                raise BadInputError("memory:// lives in one process; convert with engine local")
            return run_on_ray(work, jobs, workers=workers)
        if in_process and (workers or 0) > 1 and len(jobs) > 1:
            raise BadInputError("memory:// lives in one process; convert with workers=0")
        if in_process or len(jobs) <= 1:
            return run_here(work, jobs)
        if workers is None:
            return _run_where_worthwhile(work, jobs)
        return _run_local(work, jobs, workers)

    def _count(self, work: Work, part: Part) -> None:
        if part.get("num_errors"):
            self.num_errors += part["num_errors"]
            work.policy.check(self.num_errors, part["examples"][-1])


def _run_local(work: Work, jobs: Sequence[Any], workers: int) -> Generator[tuple[Any, Part], None, None]:
    workers = min(workers, len(jobs))
    return run_here(work, jobs) if workers <= 1 else run_in_processes(work, jobs, workers=workers)


def _run_where_worthwhile(work: Work, jobs: Sequence[Any]) -> Generator[tuple[Any, Part], None, None]:
    """Do the first job here; what it took says whether the others are worth one process a core."""
    began_s = time.perf_counter()
    yield from run_here(work, jobs[:1])
    took_s = time.perf_counter() - began_s
    rest = jobs[1:]
    left_s = took_s * sum(job.source_bytes for job in rest) / max(1, jobs[0].source_bytes)
    yield from _run_local(work, rest, len(os.sched_getaffinity(0)) if left_s >= WORTHWHILE_S else 1)


def read_records(destination: Destination, sizes: dict[str, int], plan: str) -> dict[str, Part]:
    """Return what an earlier run of the same conversion finished, by the names of its jobs.

    Args:
        destination: Where it wrote.
        sizes: What lies there.
        plan: Digest of this conversion.

    Raises:
        BadInputError: The records are of another conversion.
        CorruptError: A record is damaged.
    """
    parts = {}
    for name in sizes:
        if not name.endswith(PART_SUFFIX):
            continue
        record = _read_record(destination, name)
        if record.plan != plan:
            raise BadInputError(
                f"{destination.url} holds parts of another conversion: the source or a setting has changed; "
                "start over with overwrite",
                uri=destination.url,
            )
        job = name.removesuffix(PART_SUFFIX)
        shard = record.part.get("shard")
        objects = {} if shard is None else shard.get("objects", {job: shard["size_bytes"]})
        if all(size_bytes in (sizes.get(name), 0) for name, size_bytes in objects.items()):
            parts[job] = record.part
    return parts


def _read_record(destination: Destination, name: str) -> PartRecord:
    try:
        return msgspec.json.decode(destination.get(name), type=PartRecord)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        uri = f"{destination.url}/{name}"
        message = f"{uri} is not the record of a finished shard: {error}; start over with overwrite"
        raise CorruptError(message, uri=uri) from error


class _Reporter:
    """Adds up finished jobs."""

    def __init__(
        self, stage: str, jobs: Sequence[Any], num_samples: int, progress: Callable[[Progress], None] | None
    ) -> None:
        self._stage = stage
        self._jobs = jobs
        self._num_samples = num_samples
        self._progress = progress
        self._shards = self._samples = self._source_bytes = 0

    def __call__(self, done: list[Any], parts: dict[str, Part]) -> None:
        self._shards += len(done)
        self._samples += sum(parts[job.record].get("num_samples", job.last - job.first) for job in done)
        self._source_bytes += sum(job.source_bytes for job in done)
        if self._progress is not None:
            total = sum(job.source_bytes for job in self._jobs)
            self._progress(
                Progress(
                    self._stage,
                    self._shards,
                    len(self._jobs),
                    self._samples,
                    self._num_samples,
                    self._source_bytes,
                    total,
                )
            )
