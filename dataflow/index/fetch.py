"""Index files, wherever they lie, as bytes that are mapped.

On a local disk the file itself is mapped. Any other is fetched once and kept in the cache folder under the version that
the store has for it, so that the processes of a node share its pages and the next job asks for nothing but the version.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from connectors.errors import NotFoundError
from connectors.filesystems import is_local
from connectors.objects import split_uri
from dataflow.index import kept

if TYPE_CHECKING:
    from cache.access import BlockReader

__all__ = ["fetch"]


def fetch(reader: BlockReader, uri: str, *, digest: str | None = None) -> memoryview:
    """Return an index file, mapped where that is possible.

    Args:
        reader: Reads there.
        uri: The file.
        digest: Of its content, where that is known: then a kept copy needs no look at the store.

    Raises:
        NotFoundError: There is no such file.
        DataError: It cannot be read.
    """
    root, key = split_uri(uri)
    if root == "file:///" and is_local(f"/{key}"):
        try:
            return kept.map_file(Path("/", key))
        except FileNotFoundError as error:
            raise NotFoundError(f"no index at {uri}", uri=uri) from error
        except OSError:
            return memoryview(reader.read_object(uri).data)  # which says what is wrong
    token = f"{uri} {reader.head(uri).version}" if digest is None else digest
    name = xxhash.xxh3_128_hexdigest(token.encode()) + ".index.arrow"
    found = kept.load(name)
    if found is None:
        content = reader.read_object(uri)
        if digest is None and f"{uri} {content.version}" != token:  # replaced in between
            return memoryview(content.data)
        kept.keep(name, content.data)
        found = kept.load(name)
        return memoryview(content.data) if found is None else found
    return found
