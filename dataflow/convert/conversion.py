"""`convert`: plan from the index, write shards in parallel, publish.

    source index -> plan (pure) -> shard jobs, each leaving shard + part record -> manifest -> part records removed

Until the manifest is written the destination holds no dataset, whatever is killed when. Part records make a broken-off
conversion resumable: its plan is a function of source and settings, so what a record of the same plan vouches for is
what this run would write.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from connectors.errors import BadInputError, CorruptError
from connectors.objects import normalise_url
from dataflow.convert.job import PartRecord, Work
from dataflow.convert.plan import ShardJob, plan_digest, plan_shards
from dataflow.convert.progress import Progress
from dataflow.convert.workers import run_here, run_in_processes
from dataflow.dataset import open_dataset
from dataflow.formats.destination import PART_SUFFIX, Destination
from dataflow.formats.writable import make_target

if TYPE_CHECKING:
    from dataflow.formats.protocol import Part

__all__ = ["Conversion", "convert"]

# Below this a second process costs more (it imports for half a second) than it saves.
SMALL_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion did.

    Attributes:
        url: Where the dataset is.
        format: Its format.
        num_samples: Samples in it.
        num_shards: Shards in it.
        num_resumed: Shards that an earlier run had finished.
        source_bytes: Bytes of the source's blocks.
        size_bytes: Bytes of the shards.
    """

    url: str
    format: str
    num_samples: int
    num_shards: int
    num_resumed: int
    source_bytes: int
    size_bytes: int


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    to: str = "arrow",
    shard_size_bytes: int = 128 << 20,
    block_size_bytes: int = 1 << 20,
    compression: str = "none",
    fields: Sequence[str] | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Conversion:
    """Write the dataset at `src` in another place and format.

    The bytes written depend on source and settings only, not on the number of workers. Media are copied as they are
    encoded.

    Args:
        src: Any dataset that `open_dataset` reads.
        dst: Any store that can be written; must hold nothing yet.
        to: Format to write: `arrow` (native shards), `jsonl`, `mds`, `parquet`, `tfrecord`, `webdataset`.
        shard_size_bytes: About the size of a shard; each worker holds one in memory.
        block_size_bytes: Size of a block before compression: what readers fetch and caches keep (`arrow`, `parquet`).
        compression: `none`, `lz4` or `zstd`, where the format has it.
        fields: Fields to keep; all by default.
        workers: Processes; 0 and 1 mean this one. By default one per core where the work is worth it.
        overwrite: Replace a dataset at `dst`. Objects that are no part of one are never removed.
        resume: Go on with a conversion that broke off: shards that it finished are kept.
        dry_run: Plan and check everything, write and remove nothing; `size_bytes` of the result is 0.
        progress: Called in this thread, at first and whenever shards are done.

    Raises:
        BadInputError: `dst` is not empty, or an argument is wrong.
        DataError: Source or destination fail. What is finished stays, invisible, for `resume`.
    """
    if shard_size_bytes < 1:
        raise BadInputError(f"shard_size_bytes must be >= 1, got {shard_size_bytes}")
    target = make_target(to, block_size_bytes=block_size_bytes, compression=compression)
    src, dst = normalise_url(src), normalise_url(dst)
    if overwrite and resume:
        raise BadInputError("overwrite and resume exclude each other: one starts over, the other goes on")
    if f"{src}/".startswith(f"{dst}/") or f"{dst}/".startswith(f"{src}/"):
        raise BadInputError(f"source {src} and destination {dst} must not contain each other")
    source = open_dataset(src, cache=None, columns=fields)
    try:
        jobs = plan_shards(source.index, shard_size_bytes)
        schema = target.stored_schema(source.schema)
        work = Work(source, target, schema, dst, plan_digest(source.index, schema, target, jobs))
        with Destination(dst) as destination:
            if dry_run:
                return _rehearse(work, jobs, destination, overwrite=overwrite, resume=resume)
            return _run(work, jobs, destination, workers=workers, overwrite=overwrite, resume=resume, progress=progress)
    finally:
        source.reader.close()


def _rehearse(
    work: Work, jobs: list[ShardJob], destination: Destination, *, overwrite: bool, resume: bool
) -> Conversion:
    """Check the destination as a real run would, and say what such a run would do."""
    if resume:
        num_resumed = len(_finished(work, jobs, destination))
    else:
        destination.insist_on_room(overwrite=overwrite, owns=work.target.owns)
        num_resumed = 0
    return _result(work, jobs, num_resumed=num_resumed, size_bytes=0)


def _run(
    work: Work,
    jobs: list[ShardJob],
    destination: Destination,
    *,
    workers: int | None,
    overwrite: bool,
    resume: bool,
    progress: Callable[[Progress], None] | None,
) -> Conversion:
    parts: dict[int, Part] = {}
    if resume:
        parts = _finished(work, jobs, destination)
    else:
        destination.clear(overwrite=overwrite, owns=work.target.owns, manifest=work.target.manifest_name)
    num_resumed = len(parts)
    todo = [job for job in jobs if job.number not in parts]
    report = _Reporter(jobs, progress)
    report([job for job in jobs if job.number in parts])
    for job, part in _run_jobs(work, todo, workers):
        parts[job.number] = part
        report([job])
    ordered = [parts[job.number] for job in jobs]
    work.target.publish(destination, work.schema, ordered, _lineage(work))
    destination.delete(work.target.shard_name(job.number) + PART_SUFFIX for job in jobs)
    return _result(work, jobs, num_resumed=num_resumed, size_bytes=sum(part["size_bytes"] for part in ordered))


def _result(work: Work, jobs: list[ShardJob], *, num_resumed: int, size_bytes: int) -> Conversion:
    return Conversion(
        url=work.url,
        format=work.target.format,
        num_samples=len(work.source),
        num_shards=len(jobs),
        num_resumed=num_resumed,
        source_bytes=int(work.source.index.blocks.length.sum()),
        size_bytes=size_bytes,
    )


def _run_jobs(work: Work, jobs: list[ShardJob], workers: int | None) -> Iterator[tuple[ShardJob, Part]]:
    in_process = any(url.startswith("memory://") for url in (work.url, work.source.index.url))
    if workers is None:
        small = sum(job.source_bytes for job in jobs) < SMALL_BYTES
        workers = 1 if small or in_process else len(os.sched_getaffinity(0))
    if workers < 0:
        raise BadInputError(f"workers must be >= 0, got {workers}")
    workers = min(workers, len(jobs))
    if workers <= 1:
        return run_here(work, jobs)
    if in_process:
        raise BadInputError("memory:// lives in one process; convert with workers=0")
    return run_in_processes(work, jobs, workers=workers)


def _finished(work: Work, jobs: list[ShardJob], destination: Destination) -> dict[int, Part]:
    """Return the parts that an earlier run of the same plan left; make sure that nothing else is there."""
    target, sizes = work.target, destination.sizes()
    recorded = any(name.endswith(PART_SUFFIX) for name in sizes)
    names = {target.shard_name(job.number): job.number for job in jobs}
    parts = {}
    for name in sizes:
        shard = name.removesuffix(PART_SUFFIX)
        if name == target.manifest_name:
            if recorded:
                continue  # killed between the manifest and the removal of the records: both are done again
            raise BadInputError(f"{work.url} is a finished dataset already; nothing to resume", uri=work.url)
        if not target.owns(name):
            raise BadInputError(f"{work.url} holds {name}, which no conversion left there", uri=work.url)
        if name == shard:
            continue
        record = _read_record(destination, name)
        if record.plan != work.plan or shard not in names:
            raise BadInputError(
                f"{work.url} holds parts of another conversion: the source or a setting has changed; "
                "start over with overwrite",
                uri=work.url,
            )
        if sizes.get(shard) == record.part["size_bytes"]:
            parts[names[shard]] = record.part
    return parts


def _read_record(destination: Destination, name: str) -> PartRecord:
    try:
        return msgspec.json.decode(destination.get(name), type=PartRecord)
    except msgspec.MsgspecError as error:
        uri = f"{destination.url}/{name}"
        message = f"{uri} is not the record of a finished shard: {error}; start over with overwrite"
        raise CorruptError(message, uri=uri) from error


def _lineage(work: Work) -> dict[str, Any]:
    """Say where the data came from. No time and no host: equal conversions give equal manifests."""
    index = work.source.index
    source = {
        "url": _without_credentials(index.url),
        "format": work.source.source.format,
        "fingerprint": index.fingerprint,
    }
    before = work.source.source.lineage
    return {"source": source | ({"lineage": before} if before else {})}


def _without_credentials(url: str) -> str:
    """Drop user, password and query (signatures) from a URL that will be stored."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()


class _Reporter:
    """Adds up finished jobs."""

    def __init__(self, jobs: list[ShardJob], progress: Callable[[Progress], None] | None) -> None:
        self._progress = progress
        self._total = _sums(jobs)
        self._done = _sums([])

    def __call__(self, done: list[ShardJob]) -> None:
        shards, samples, source_bytes = self._done = tuple(map(sum, zip(self._done, _sums(done), strict=True)))
        if self._progress is not None:
            num_shards, num_samples, num_source_bytes = self._total
            self._progress(Progress(shards, num_shards, samples, num_samples, source_bytes, num_source_bytes))


def _sums(jobs: list[ShardJob]) -> tuple[int, ...]:
    return len(jobs), sum(job.last - job.first for job in jobs), sum(job.source_bytes for job in jobs)
