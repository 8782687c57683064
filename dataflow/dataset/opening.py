"""`open_dataset`: the one door to reading."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from cache.access import open_reader
from connectors.errors import BadInputError
from connectors.objects import normalise_url
from dataflow.dataset.dataset import Dataset
from dataflow.formats import open_source

if TYPE_CHECKING:
    from cache.access import BlockReader
    from cache.config import CacheConfig
    from dataflow.formats import Source

__all__ = ["open_dataset"]


def open_dataset(
    url: str | os.PathLike[str],
    *,
    cache: str | CacheConfig | None = "auto",
    columns: Sequence[str] | None = None,
    encoded: Collection[str] = (),
    verify: bool = True,
    format: str | None = None,  # noqa: A002  the word users know
    index: str | os.PathLike[str] | None = None,
    revision: int | None = None,
    buffer_bytes: int = 128 << 20,
) -> Dataset:
    """Open the dataset at `url`: a path, or a URL such as `s3://bucket/prefix`.

    Args:
        url: The folder or prefix of the dataset. `*` stands for any part of a name, `**/` for any folders:
            `s3://bucket/data/train-*.parquet`.
        cache: Which cache its bytes go through. `"auto"`: files of a local disk are read in place; remote data goes
            through this node's cache daemon, or a private cache (1 GiB of memory) where none answers. None: no
            caching. A string: a daemon's address. A `CacheConfig`: a private cache with those tiers.
        columns: Fields to read; all by default.
        encoded: Image fields to return as the `bytes` of their files, for a transform that decodes only what it needs.
        verify: Check each block against its checksum when it is first read in place. Bytes that enter a cache are
            always checked.
        format: Name of the format (`arrow`, `folder`); by default it is found out.
        index: An index that `dataflow index --out` wrote elsewhere; an index beside the data is found without this.
        revision: An older version of a native dataset that samples were appended to; the newest by default.
        buffer_bytes: Limit on the decoded blocks that each process keeps. It keeps the last one even if that alone is
            larger. 0 keeps none.

    Raises:
        NotFoundError: There is nothing at `url`.
        BadInputError: There is something that is no dataset, or an argument is wrong.
        CorruptError: The dataset is damaged.
    """
    if index is not None and revision is not None:
        raise BadInputError("an index is for files without one, a revision for native datasets: give one of them")
    location = normalise_url(url)
    reader = open_reader(location, cache, verify=verify)
    try:
        if index is None:
            source = open_source(location, reader, format, revision=revision)
        else:
            source = _open_by(index, location, reader, format)
        return Dataset(source, reader, columns=columns, encoded=encoded, buffer_bytes=buffer_bytes)
    except BaseException:
        reader.close()
        raise


def _open_by(index: str | os.PathLike[str], location: str, reader: BlockReader, name: str | None) -> Source:
    url = normalise_url(index)
    index_reader = open_reader(url, None)
    try:
        return open_source(location, reader, name, index=(url, index_reader))
    finally:
        index_reader.close()
