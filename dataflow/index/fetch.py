"""Index files, wherever they lie, as bytes that are mapped.

On a local disk the file itself is mapped. Any other is fetched once and kept in the cache folder under the name of its
content, so that the processes of a node share its pages and the next job asks for nothing but the version. A kept file
that turns out to be damaged is fetched again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import xxhash

from connectors.errors import CorruptError
from connectors.filesystems import is_local
from connectors.objects import split_uri
from dataflow.index import kept

if TYPE_CHECKING:
    from cache.access import BlockReader

__all__ = ["fetch_index"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


def fetch_index(reader: BlockReader, uri: str, decode: Callable[[memoryview], T], *, digest: str | None = None) -> T:
    """Return what an index file says.

    Args:
        reader: Reads there.
        uri: The file.
        decode: Turns its content, which is mapped where that is possible, into what it says.
        digest: Of the content, where that is known: then a kept copy needs no look at the store.

    Raises:
        NotFoundError: There is no such file.
        DataError: It cannot be read, or as `decode` does.
    """
    root, key = split_uri(uri)
    if root == "file:///" and is_local(f"/{key}"):
        try:
            content = kept.map_file(Path("/", key))
        except OSError:
            content = memoryview(reader.read_object(uri).data)  # or an error that says what is wrong
        return decode(content)
    token = digest or f"{uri} {reader.head(uri).version}"
    name = xxhash.xxh3_128_hexdigest(token.encode()) + ".index.arrow"
    found = kept.load(name)
    if found is not None:
        try:
            return decode(found)
        except CorruptError as error:
            logger.warning("the copy of %s in %s is fetched again: %s", uri, kept.kept_folder(), error)
    fetched = reader.read_object(uri)
    result = decode(memoryview(fetched.data))
    if digest or f"{uri} {fetched.version}" == token:  # not replaced in between
        kept.keep(name, fetched.data)
        found = kept.load(name)
        return result if found is None else decode(found)
    return result
