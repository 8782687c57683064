"""Which formats there are, and which one a dataset has."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from connectors.errors import BadInputError, NotFoundError
from dataflow.formats.arrow.manifest import MANIFEST_NAME
from dataflow.formats.arrow.reading import ArrowFormat
from dataflow.formats.folder import FolderFormat
from dataflow.formats.huggingface import HuggingfaceFormat
from dataflow.formats.litdata import LitdataFormat
from dataflow.formats.mds import MdsFormat
from dataflow.formats.megatron import MegatronFormat
from dataflow.formats.parquet import ParquetFormat
from dataflow.formats.place import BadRange, Place
from dataflow.formats.protocol import ConfigurableFormat
from dataflow.formats.scanned import open_given, open_indexed
from dataflow.formats.splits import mixed_splits
from dataflow.formats.text import TextFormat
from dataflow.formats.tfrecord import TfrecordFormat
from dataflow.formats.unpacking import COMPRESSIONS
from dataflow.formats.webdataset import WebdatasetFormat
from dataflow.formats.zarr import ZarrFormat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cache.access import BlockReader
    from dataflow.formats.protocol import Format, Source

logger = logging.getLogger(__name__)

__all__ = ["FORMATS", "formats_called", "open_source"]

# Others name their lines `.json`, too. One that is not compressed may as well describe other files, unless it is named.
PACKED_JSON = tuple(".json" + packed for packed in COMPRESSIONS)
JSON_LINES = TextFormat("jsonl", (".jsonl", ".ndjson"), otherwise=PACKED_JSON)
NAMED_JSON = replace(JSON_LINES, otherwise=(".json", *PACKED_JSON))
# In the order in which they are tried: what says by itself what it is comes first.
FORMATS: tuple[Format, ...] = (
    ArrowFormat(),
    HuggingfaceFormat(),
    MdsFormat(),
    LitdataFormat(),
    ZarrFormat(),
    MegatronFormat(),
    WebdatasetFormat(),
    FolderFormat(),
    ParquetFormat(),
    TfrecordFormat(),
    JSON_LINES,
    TextFormat("csv", (".csv", ".tsv")),
    TextFormat("text", (".txt",)),
    FolderFormat("text-folder", ("text",)),
)

_HINT = "`dataflow formats` lists what is read"
# What people come with that no format reads, by how its names end.
_HINTS = {
    ".zarray": "zarr is read from version 3 on, to which `zarr migrate v3` brings it without writing a chunk anew",
    ".json": 'records of JSON in files of such names are read with `format="jsonl"` (`--from jsonl`)',
    ".npy": "`ShardWriter.write_columns` makes a dataset of arrays",
}


def open_source(
    url: str,
    reader: BlockReader,
    name: str | None = None,
    bad: list[BadRange] | None = None,
    index: tuple[str, BlockReader] | None = None,
    revision: int | None = None,
) -> Source:
    """Open the dataset at `url` by the first format that recognises it, or by the one that is named.

    Args:
        url: Normalised.
        reader: Reads there.
        name: Of the format; of one that has options also with them, as in `zarr:window=16,stride=8`.
        bad: Receives the damaged records that formats with a scan pass over; without it, those are errors.
        index: URL of a sidecar that lies elsewhere, and what reads there; nothing is looked for then.
        revision: A version of a native dataset, which it then has to be; the newest by default.

    Raises:
        NotFoundError: There is nothing at `url`.
        BadInputError: No format recognises it, or `name` is none of ours.
        CorruptError: It is a dataset, and damaged.
    """
    formats = formats_called(name)
    if revision is not None:
        formats = [entry for entry in formats if entry.name == ArrowFormat.name]
    place = Place(url, reader, bad, revision)
    if index is not None:
        return open_given(place, formats, *index)
    for number, entry in enumerate(formats):
        # A native dataset is found by name, which comes first; for all others a sidecar saves the listing.
        if number == (name is None) and not place.lenient and (found := open_indexed(place, formats)) is not None:
            return found
        if entry.name != ArrowFormat.name:
            _insist_on_end(place)
        source = entry.open(place)
        if source is not None:
            if (mixed := mixed_splits(place, source)) is not None:
                logger.warning("%s", mixed)
            return source
    if name is None and place.names_files and (source := NAMED_JSON.open(place)) is not None:
        return source
    _insist_on_end(place)
    if revision is not None:
        raise BadInputError(f"only native datasets have versions, and there is none at {url}", uri=url)
    if not place.files:
        raise NotFoundError(f"nothing at {url}", uri=url)
    others = f" beside {len(place.files) - 1:,} more" if place.files[1:] else ""
    raise BadInputError(
        f"no {'' if name is None else name + ' '}dataset at {url}, where {place.files[0].key} lies{others}; "
        f"{_hint(place)}",
        uri=url,
    )


def _hint(place: Place) -> str:
    keys = [meta.key for meta in place.files]
    below = [key.removesuffix(f"/{MANIFEST_NAME}") for key in keys if key.endswith(f"/{MANIFEST_NAME}")]
    if below:  # `convert --split` writes several beside each other
        more = f" and {len(below) - 3:,} more" if below[3:] else ""
        return f"native datasets lie below it, open one of them: {', '.join(below[:3])}{more}"
    return next((hint for end, hint in _HINTS.items() if any(key.endswith(end) for key in keys)), _HINT)


def formats_called(text: str | None) -> Sequence[Format]:
    """Return the format of a name, with the options behind it; for None all that find out what lies at a place.

    Raises:
        BadInputError: None is called so, or it has no such options.
    """
    if text is None:
        return FORMATS
    name, _, settings = text.partition(":")
    found = next((entry for entry in FORMATS if entry.name == name), None)
    if found is None:
        raise BadInputError(f"no format is called {name!r}; there are {', '.join(entry.name for entry in FORMATS)}")
    if found is JSON_LINES:
        found = NAMED_JSON
    if not settings:
        return [found]
    if not isinstance(found, ConfigurableFormat):
        raise BadInputError(f"format {name} has no options, got {settings!r}")
    return [found.with_options(dict(part.partition("=")[::2] for part in settings.split(",")))]


def _insist_on_end(place: Place) -> None:
    """Refuse a broken-off conversion: only a manifest says that what lies beside such records is complete."""
    if place.unfinished:
        raise BadInputError(
            f"no dataset at {place.url}: a conversion there is unfinished; finish it with --resume", uri=place.url
        )
