"""Opening formats that have no index of their own: by a sidecar, or by a scan of what no sidecar knows yet.

    sidecar beside the data, or given    names, versions and blocks from the sidecar; nothing is listed
    otherwise                            a listing, compared with what was found before; only new and changed files
                                         are scanned, and the result is kept in the cache folder

A sidecar beside the data is believed after a look at the versions of a few of its files. What has changed beyond those
is found when it is read, because every read asks for the version that was scanned. One that does not hold is said so in
the log and brought up to date in the cache folder. What `dataflow index` was told to write elsewhere, and does not
hold, is refused: who names an index wants that one.

Files that were added are no part of the dataset: it is what was indexed, so that a job which is resumed goes on with
the same samples. Where that costs a look at some folders (`file://`), the log says that there are more.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import xxhash

from connectors.errors import BadInputError, CorruptError, NotFoundError
from connectors.folders import has_changed_folders
from connectors.objects import join_uri
from dataflow.formats.sidecar import FileScan, Sidecar, known_parts, make_sidecar
from dataflow.index import kept
from dataflow.index.fetch import fetch_index
from dataflow.index.storage import SIDECAR_NAME

if TYPE_CHECKING:
    import pyarrow as pa

    from cache.access import BlockReader
    from connectors.objects import ObjectMeta
    from dataflow.formats.place import Place
    from dataflow.formats.protocol import Format, Source
    from dataflow.index import Index

__all__ = [
    "ScannedFormat",
    "assemble",
    "kept_sidecar",
    "open_given",
    "open_indexed",
    "open_scanned",
    "scanned_format",
    "slot",
]

logger = logging.getLogger(__name__)

# Files whose versions are asked for before a sidecar is believed.
PROBES = 4


class ScannedFormat(Protocol):
    """A format whose index is found file by file. Picklable."""

    @property
    def name(self) -> str:
        """Name of the format."""
        ...

    def files(self, place: Place) -> list[ObjectMeta]:
        """Return the files at a place that belong to a dataset of this format."""
        ...

    def scan_file(self, place: Place, meta: ObjectMeta) -> FileScan:
        """Read one file from front to end and return where its samples lie.

        Raises:
            DataError: It is damaged, or contradicts itself; names it.
        """
        ...

    def merge(self, place: Place, learned: Sequence[tuple[ObjectMeta, str]]) -> tuple[pa.Schema, dict[str, str]]:
        """Return the fields of all samples, and the format's facts, from the different texts and their first files.

        Raises:
            BadInputError: Files contradict each other.
        """
        ...

    def source(self, index: Index, schema: pa.Schema, facts: dict[str, str]) -> Source:
        """Open the dataset with a known index."""
        ...


def open_scanned(form: ScannedFormat, place: Place) -> Source | None:
    """List a place and scan the files that are not known yet; None where there are none of this format.

    Raises:
        DataError: As the format's `scan_file` and `merge` do.
    """
    files = form.files(place)
    if not files:
        return None
    name = slot(form, place)
    before = kept_sidecar(name)
    parts = known_parts(before, files)
    if before is not None and None not in parts and len(files) == len(before.shards):
        return form.source(before.index(place.root), before.schema, before.facts)
    parts = [part or other for part, other in zip(parts, known_parts(place.outdated, files), strict=True)]
    todo = [number for number, part in enumerate(parts) if part is None]
    if len(todo) < len(files):
        logger.info("%d of %d files of %s are new or have changed: they are scanned", len(todo), len(files), place.url)
    for number in todo:
        parts[number] = form.scan_file(place, files[number])
    sidecar = assemble(form, place, files, [part for part in parts if part is not None])
    kept.keep(name, sidecar.encode())
    return form.source(sidecar.index(place.root), sidecar.schema, sidecar.facts)


def assemble(form: ScannedFormat, place: Place, files: Sequence[ObjectMeta], parts: Sequence[FileScan]) -> Sidecar:
    """Put the scans of all files together.

    Raises:
        BadInputError: Files contradict each other.
        CorruptError: A scan is not what it should be.
    """
    first: dict[str, ObjectMeta] = {}
    for meta, part in zip(files, parts, strict=True):
        first.setdefault(part.learned, meta)
    sidecar = make_sidecar(form.name, files, parts, form.merge(place, [(meta, text) for text, meta in first.items()]))
    sidecar.index(place.root).check()
    return sidecar


def slot(form: ScannedFormat, place: Place) -> str:
    """Return the name in the cache folder of what is known of a place."""
    return xxhash.xxh3_128_hexdigest("\0".join([form.name, place.url]).encode()) + ".sidecar.arrow"


def kept_sidecar(name: str) -> Sidecar | None:
    """Return what the cache folder has under a name; None where it has nothing that can be used."""
    data = kept.load(name)
    if data is None:
        return None
    try:
        return Sidecar.decode(data, uri=name)
    except CorruptError as error:
        logger.warning("the kept scan %s is damaged and is made again: %s", name, error)
        return None


def open_indexed(place: Place, formats: Sequence[Format]) -> Source | None:
    """Open a place by the sidecar beside its files; None where there is none that holds.

    One that does not hold becomes `place.outdated`.
    """
    if place.names_files:
        return None
    uri = join_uri(place.url, SIDECAR_NAME)
    try:
        sidecar = fetch_index(place.reader, uri, lambda data: Sidecar.decode(data, uri=uri))
    except NotFoundError:
        return None
    except CorruptError as error:
        logger.warning("the index %s is not used, the files are scanned: %s", uri, error)
        return None
    if all(form.name != sidecar.format for form in formats):
        return None
    changed = _changed(place, sidecar)
    if changed is not None:
        logger.warning(
            "the index %s is out of date (%s): what it does not know is scanned; write it again with `dataflow index`",
            uri,
            changed,
        )
        place.outdated = sidecar
        return None
    return _believed(place, formats, sidecar, uri)


def open_given(place: Place, formats: Sequence[Format], location: str, reader: BlockReader) -> Source:
    """Open a place by an index that lies anywhere.

    Args:
        place: Where the files are.
        formats: The formats that may be meant.
        location: URL of the index, normalised.
        reader: Reads there.

    Raises:
        NotFoundError: There is no index.
        CorruptError: It is damaged.
        BadInputError: It does not belong to these files any more, or never did.
    """
    sidecar = fetch_index(reader, location, lambda data: Sidecar.decode(data, uri=location))
    if all(form.name != sidecar.format for form in formats):
        raise BadInputError(f"{location} is the index of a {sidecar.format} dataset", uri=location)
    changed = _changed(place, sidecar)
    if changed is not None:
        raise BadInputError(
            f"{location} is not the index of {place.url} as it is now: {changed}; write it again with `dataflow index`",
            uri=location,
        )
    source = _believed(place, formats, sidecar, location)
    assert source is not None
    return source


def _believed(place: Place, formats: Sequence[Format], sidecar: Sidecar, uri: str) -> Source | None:
    """Open a place by a sidecar that holds; a folder by its listing."""
    form = scanned_format(formats, sidecar.format)
    names = sidecar.shards.names.to_pylist()
    if has_changed_folders(place.root, names, since=uri):
        files = place.files if form is None else form.files(place)
        if added := sorted({meta.key for meta in files} - {SIDECAR_NAME, *names}):
            logger.warning(
                "%d files at %s were added after the index %s was written (%s, ...) and are left out: "
                "run `dataflow index --resume` to take them in",
                len(added),
                place.url,
                uri,
                added[0],
            )
    if form is not None:
        return form.source(sidecar.index(place.root), sidecar.schema, sidecar.facts)
    place.files = sidecar.listing()
    return next(form for form in formats if form.name == sidecar.format).open(place)


def scanned_format(formats: Sequence[Format], name: str) -> ScannedFormat | None:
    """Return the format of that name, if its index is found by scans."""
    form = next((form for form in formats if form.name == name and hasattr(form, "scan_file")), None)
    return cast("ScannedFormat | None", form)


def _changed(place: Place, sidecar: Sidecar) -> str | None:
    """Return which of a few files is not as it was scanned; None where all are."""
    shards = sidecar.shards
    for shard in np.unique(np.linspace(0, len(shards) - 1, PROBES).astype(np.int64)).tolist() if len(shards) else ():
        name = shards.names[shard].as_py()
        try:
            meta = place.reader.head(join_uri(place.root, name))
        except NotFoundError:
            return f"{name} is gone"
        if (meta.size_bytes, meta.version) != (int(shards.size_bytes[shard]), shards.versions[shard].as_py()):
            return f"{name} has changed"
    return None
