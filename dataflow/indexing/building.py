"""`build_index`: the index of files that have none, built by one parallel pass and written where opening finds it.

    listing -> what is known already (--resume) -> jobs of files -> journal -> sidecar, in one atomic put

Killed anywhere, it leaves the data and an older sidecar as they were, and the journal, which the next run with `resume`
takes over. The sidecar depends on the files alone, not on workers or on what was known.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from cache.access import open_reader
from connectors.errors import BadInputError, DataError, NotFoundError
from connectors.objects import join_uri, normalise_url
from dataflow.formats import formats_called
from dataflow.formats.destination import Destination
from dataflow.formats.folder import FolderFormat
from dataflow.formats.place import Place
from dataflow.formats.scanned import assemble, kept_sidecar, slot
from dataflow.formats.sidecar import FileScan, Sidecar, known_parts, make_sidecar
from dataflow.index import kept
from dataflow.index.fetch import fetch_index
from dataflow.index.storage import SIDECAR_NAME
from dataflow.indexing.journal import Journal
from dataflow.indexing.scanning import ScanTask, cut_jobs, scan_files

if TYPE_CHECKING:
    from collections.abc import Sequence

    from connectors.objects import ObjectMeta
    from dataflow.formats.scanned import ScannedFormat

__all__ = ["IndexBuild", "IndexProgress", "build_index"]

logger = logging.getLogger(__name__)

# A job is that many bytes or files at most: enough that handing it out costs nothing, and little to do again. One job
# alone is not worth a second process, which imports for half a second.
JOB_BYTES = 64 << 20
JOB_FILES = 256


@dataclass(frozen=True, slots=True)
class IndexProgress:
    """How far a build is; files that were known before count as done.

    Attributes:
        files: Files that are done.
        num_files: Files in all.
        size_bytes: Their bytes.
        num_bytes: Bytes in all.
        samples: Samples found so far.
    """

    files: int
    num_files: int
    size_bytes: int
    num_bytes: int
    samples: int


@dataclass(frozen=True, slots=True)
class IndexBuild:
    """What a build did.

    Attributes:
        url: The index.
        beside: Whether it lies beside the data, where opening finds it without a listing.
        format: Format of the data.
        num_files: Files it covers.
        num_scanned: Those that were read now; the others were known.
        scanned_bytes: Their bytes.
        num_samples: Samples in all files.
        num_blocks: Blocks they are cut into.
        size_bytes: Bytes of the index.
        fingerprint: Name of the dataset.
    """

    url: str
    beside: bool
    format: str
    num_files: int
    num_scanned: int
    scanned_bytes: int
    num_samples: int
    num_blocks: int
    size_bytes: int
    fingerprint: str


def build_index(
    src: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    format: str | None = None,  # noqa: A002  the word users know
    workers: int | None = None,
    resume: bool = False,
    progress: Callable[[IndexProgress], None] | None = None,
) -> IndexBuild:
    """Scan the files at `src` and write their index.

    Args:
        src: A dataset of a format without an index of its own: archives, record files, lines of text; or a folder of
            media files, whose index is its listing.
        out: Where to write the index; `open_dataset(index=)` takes it. By default beside the data, as
            `dataflow-index.arrow`, where opening finds it; or in the cache folder of this user where the data cannot be
            written to, or is a single file.
        format: Name of the format; by default it is found out.
        workers: Processes; 0 and 1 mean this one. By default one per core where the work is worth it.
        resume: Scan only files that are new or have changed since the last run, whether it was finished or broke off.
        progress: Called in this thread, at first and whenever files are done.

    Raises:
        NotFoundError: There is nothing at `src`.
        BadInputError: The format has an index of its own, or an argument is wrong.
        DataError: A file is damaged, or the index cannot be written to `out`. What is scanned is kept for `resume`.
    """
    if workers is not None and workers < 0:
        raise BadInputError(f"workers must be >= 0, got {workers}")
    reader = open_reader(location := normalise_url(src), None)
    try:
        place = Place(location, reader)
        form = _form(place, format)
        target = None if out is None else normalise_url(out)
        if target is None and not place.names_files:
            target = join_uri(place.url, SIDECAR_NAME)
        if isinstance(form, FolderFormat):
            return _list(form, place, target, beside=out is None)
        files = form.files(place)
        name = slot(form, place)
        with Journal(f"{name}.journal", resume=resume) as journal:
            parts: list[FileScan | None] = [None] * len(files)
            if resume:
                parts = _known(files, target, name, journal)
            todo = [number for number, part in enumerate(parts) if part is None]
            _scan(ScanTask(form, location, reader), files, parts, journal, workers=workers, progress=progress)
            sidecar = assemble(form, place, files, [part for part in parts if part is not None])
            data = sidecar.encode()
            url = _write(target, name, data, may_fall_back=out is None)
    finally:
        reader.close()
    return IndexBuild(
        url=url,
        beside=out is None and url == target,
        format=form.name,
        num_files=len(files),
        num_scanned=len(todo),
        scanned_bytes=sum(files[number].size_bytes for number in todo),
        num_samples=int(sidecar.blocks.first_sample[-1]),
        num_blocks=len(sidecar.blocks),
        size_bytes=len(data),
        fingerprint=sidecar.fingerprint,
    )


def _list(form: FolderFormat, place: Place, target: str | None, *, beside: bool) -> IndexBuild:
    """Write the index of a folder of files, which is its listing."""
    source = form.open(place)
    assert source is not None
    assert target is not None
    files = [meta for meta in place.files if meta.key != SIDECAR_NAME]
    nothing = FileScan(np.zeros((0, 3), np.int64))
    sidecar = make_sidecar(form.name, files, [nothing] * len(files), (source.schema, {}))
    data = sidecar.encode()
    return IndexBuild(
        url=_write(target, "", data, may_fall_back=False),
        beside=beside,
        format=form.name,
        num_files=len(files),
        num_scanned=0,
        scanned_bytes=0,
        num_samples=source.index.num_samples,
        num_blocks=source.index.num_blocks,
        size_bytes=len(data),
        fingerprint=source.index.fingerprint,
    )


def _form(place: Place, name: str | None) -> ScannedFormat | FolderFormat:
    """Return the format of the files at a place, which must be one that has no index of its own."""
    for entry in formats_called(name):
        if not hasattr(entry, "scan_file"):
            if entry.open(place) is not None:
                if isinstance(entry, FolderFormat) and not place.names_files:
                    return entry
                raise BadInputError(f"{place.url} is a dataset of format {entry.name}, which needs no index")
        elif cast("ScannedFormat", entry).files(place):
            return cast("ScannedFormat", entry)
    if not place.files:
        raise NotFoundError(f"nothing at {place.url}", uri=place.url)
    raise BadInputError(f"no files at {place.url} that an index can be built of; `dataflow formats` lists what is read")


def _known(files: Sequence[ObjectMeta], target: str | None, name: str, journal: Journal) -> list[FileScan | None]:
    """Return what is known of each file from the last index and from a run that broke off."""
    sidecar = kept_sidecar(name)
    if target is not None:
        reader = open_reader(target, None)
        try:
            sidecar = fetch_index(reader, target, lambda data: Sidecar.decode(data, uri=target))
        except NotFoundError:
            logger.debug("no older index at %s", target)
        except DataError as error:
            logger.warning("the older index is not used: %s", error)
        finally:
            reader.close()
    parts = known_parts(sidecar, files)
    return [part or journal.found.get(meta) for meta, part in zip(files, parts, strict=True)]


def _scan(
    task: ScanTask,
    files: Sequence[ObjectMeta],
    parts: list[FileScan | None],
    journal: Journal,
    *,
    workers: int | None,
    progress: Callable[[IndexProgress], None] | None,
) -> None:
    """Scan the files that have no part, and put the parts in their places."""
    number_of = {meta.key: number for number, meta in enumerate(files)}
    jobs = cut_jobs(
        [meta for meta, part in zip(files, parts, strict=True) if part is None],
        job_bytes=JOB_BYTES,
        job_files=JOB_FILES,
    )
    num_bytes = sum(meta.size_bytes for meta in files)
    done = [0, 0, 0]

    def tell(metas: Sequence[ObjectMeta]) -> None:
        found = [parts[number_of[meta.key]] for meta in metas]
        done[0] += len(metas)
        done[1] += sum(meta.size_bytes for meta in metas)
        done[2] += sum(int(part.rows[:, 2].sum()) for part in found if part is not None)
        if progress is not None:
            progress(IndexProgress(done[0], len(files), done[1], num_bytes, done[2]))

    tell([meta for meta, part in zip(files, parts, strict=True) if part is not None])
    for job, scans in scan_files(task, jobs, workers=_workers(task.url, jobs, workers)):
        for meta, scan in zip(job.files, scans, strict=True):
            parts[number_of[meta.key]] = scan
            journal.add(meta, scan)
        tell(job.files)


def _workers(url: str, jobs: Sequence[object], workers: int | None) -> int:
    in_process = url.startswith("memory://")
    if workers is None:
        workers = 1 if in_process else len(os.sched_getaffinity(0))
    workers = min(workers, len(jobs))
    if workers > 1 and in_process:
        raise BadInputError("memory:// lives in one process; scan with workers=0")
    return workers


def _write(target: str | None, name: str, data: bytes, *, may_fall_back: bool) -> str:
    """Put the index in its place; return where that is."""
    if target is not None:
        folder, _, key = target.rpartition("/")
        try:
            with Destination(folder) as destination:
                destination.sweep(recursive=False)
                destination.put(key, [data])
        except DataError as error:
            if not may_fall_back:
                raise
            logger.info("the index cannot be written to %s, so it goes to the cache folder: %s", target, error)
        else:
            return target
    path = kept.keep(name, data)
    if path is None:
        elsewhere = kept.kept_folder()
        raise DataError(f"the index can neither be written beside the data nor to {elsewhere}: name a place with --out")
    return path.as_uri()
