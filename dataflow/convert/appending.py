"""`append`: more samples for a native dataset, as a new version of it.

    source -> an ordinary conversion into rev-0000N/ below the dataset -> one new manifest

So whatever a conversion promises holds: bytes that do not depend on workers, bounded memory, `resume` after a kill at
any moment, nothing visible before all of it is. Shards are never copied, and the old version stays readable.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from connectors.errors import BadInputError
from connectors.objects import normalise_url
from dataflow.convert.conversion import convert
from dataflow.convert.iterables import name_of
from dataflow.convert.result import Conversion
from dataflow.dataset import open_dataset
from dataflow.formats.arrow.manifest import MANIFEST_NAME
from dataflow.formats.arrow.publish import owns
from dataflow.formats.arrow.revision import addition_name, insist_on_schema, publish_revision, read_manifest
from dataflow.formats.destination import PART_SUFFIX, Destination
from dataflow.formats.fields import select_fields, storable_schema

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence, Sized

    from dataflow.formats.arrow.manifest import Manifest

__all__ = ["append"]

logger = logging.getLogger(__name__)


def append(
    src: str | os.PathLike[str] | Iterable[Any] | Sized,
    dst: str | os.PathLike[str],
    *,
    fields: Sequence[str] | None = None,
    quarantine: str | os.PathLike[str] | None = None,
    resume: bool = False,
    dry_run: bool = False,
    **settings: Any,
) -> Conversion:
    """Add the samples at `src` to the native dataset at `dst`, behind those that it has, as a new version.

    Whoever has an older version open goes on with it; `open_dataset(revision=)` opens it again. The fingerprint
    changes, so a loader's state of the old version continues on the old version only. One writer at a time.

    Args:
        src: As for `convert`; its samples must have the fields of the dataset.
        dst: A native dataset.
        fields: Fields to take, in the order of the dataset's; by default all.
        quarantine: Where rejected samples go; by default `dst` with `.quarantine-` and the number of the version.
        resume: Go on with an append that broke off.
        dry_run: Plan and check everything, write nothing.
        settings: Whatever else `convert` takes, but for `to`, `compression`, `split` and `overwrite`: those are the
            dataset's.

    Returns:
        What was added.

    Raises:
        BadInputError: There is no native dataset, its fields are others, an append that broke off is in the way, or
            there is none to resume.
        DataError: Source or destination fail. What is finished stays, invisible, for `resume`.
    """
    if wrong := {"to", "compression", "split", "overwrite"} & settings.keys():
        raise BadInputError(f"{min(wrong)} cannot be chosen when samples are appended: the dataset has it already")
    url = normalise_url(dst)
    with Destination(url) as destination:
        base = read_manifest(destination)
        if base is None:
            raise BadInputError(f"{url} is no native dataset, and only to those samples are appended", uri=url)
        staging = f"{url}/{addition_name(base.revision + 1)}"
        names = _staged(staging)
        if resume and not names:
            raise BadInputError(f"nothing to resume: no append to version {base.revision} of {url} is under way")
        if names and not resume:
            raise BadInputError(f"an append to {url} broke off: finish it with --resume, or remove {staging}", uri=url)
        if MANIFEST_NAME in names and not any(name.endswith(PART_SUFFIX) for name in names):
            result = _finished(destination, base, src, settings.get("format"))
        else:
            fields = _checked(src, base, url, fields, settings)
            result = convert(
                src,
                staging,
                to="arrow",
                compression=base.compression,
                fields=fields,
                quarantine=quarantine or f"{url}.quarantine-{base.revision + 1:05d}",
                resume=resume,
                dry_run=dry_run,
                **settings,
            )
        if not dry_run:
            _insist_on_fit(destination, base, staging)
            destination.sweep(recursive=False)
            publish_revision(destination, base)
    return replace(result, url=url)


def _staged(staging: str) -> set[str]:
    with Destination(staging) as folder:
        return set(folder.sizes())


def _insist_on_fit(destination: Destination, base: Manifest, staging: str) -> None:
    """Refuse what was written and has other fields, and remove it: nothing can come of it."""
    added = read_manifest(destination, addition_name(base.revision + 1))
    assert added is not None
    try:
        insist_on_schema(base, added.read_schema(uri=staging), destination.url)
    except BadInputError:
        with Destination(staging) as folder:
            folder.clear(overwrite=True, owns=owns, is_manifest=MANIFEST_NAME.__eq__)
        raise


def _checked(
    src: Any, base: Manifest, url: str, fields: Sequence[str] | None, settings: dict[str, Any]
) -> Sequence[str] | None:
    """Return the fields to take; refuse others than the dataset has where that can be seen without reading samples."""
    own = base.read_schema(uri=url)
    if not isinstance(src, str | os.PathLike) or settings.get("map") is not None:
        return fields
    if settings.get("on_error", "raise") != "raise":
        return fields  # opening it may fail on what the conversion passes over
    source = open_dataset(src, cache=None, format=settings.get("format"))
    try:
        if fields is None and set(source.schema.names) == set(own.names):
            fields = own.names
        insist_on_schema(base, storable_schema(select_fields(source.schema, fields)), url)
    finally:
        source.reader.close()
    return fields


def _finished(destination: Destination, base: Manifest, src: Any, name: str | None) -> Conversion:
    """Return what an append did that was killed when only publishing was left."""
    added = read_manifest(destination, addition_name(base.revision + 1))
    assert added is not None
    source = added.lineage["source"]
    if isinstance(src, str | os.PathLike):
        dataset = open_dataset(src, cache=None, format=name)
        same = dataset.fingerprint == source["fingerprint"]
        dataset.reader.close()
    else:
        same = name_of(src) == source["url"]
    if not same:
        folder = f"{destination.url}/{addition_name(base.revision + 1)}"
        raise BadInputError(f"the append that broke off was of {source['url']}: finish that first, or remove {folder}")
    logger.info("the samples of %s are all written; only the new version is published", source["url"])
    return Conversion(
        url=destination.url,
        format="arrow",
        num_samples=added.num_samples,
        num_shards=added.num_shards,
        num_resumed=added.num_shards,
        source_bytes=0,
        size_bytes=added.size_bytes,
        num_source=added.num_samples,
    )
