"""Objects in this process's memory: `memory://name`.

Every store of one name sees the same objects, for as long as the process lives. A forked child begins with a copy.
"""

from __future__ import annotations

import builtins
import itertools
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from typing import NamedTuple

from connectors.errors import BadInputError, ChangedError, ErrorKind, NotFoundError
from connectors.objects import ObjectMeta, Span, check_key, check_prefix, join_uri
from connectors.protocols import Buffer

__all__ = ["MemoryStore"]


class _Object(NamedTuple):
    data: bytes
    version: str


_stores: dict[str, dict[str, _Object]] = {}
_versions = itertools.count(1)


class MemoryStore:
    """The objects that this process keeps under one name.

    Methods never wait, so each is atomic among the tasks of one loop; threads may share a store because each
    operation is one operation on a dict.

    Args:
        url: `memory://name`.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._objects = _stores.setdefault(url, {})

    async def get(self, key: str, *, version: str | None = None) -> Buffer:
        """Return the whole object."""
        return self._find(key, version).data

    async def get_range(self, key: str, span: Span, *, version: str | None = None) -> Buffer:
        """Return exactly the bytes of the span, without a copy."""
        return self._cut(key, self._find(key, version), span)

    async def get_ranges(self, key: str, spans: Sequence[Span], *, version: str | None = None) -> builtins.list[Buffer]:
        """Return one view per span."""
        if not spans:
            return []
        found = self._find(key, version)
        return [self._cut(key, found, span) for span in spans]

    async def head(self, key: str) -> ObjectMeta:
        """Return size and version."""
        return _meta(key, self._find(key, None))

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectMeta]:
        """Yield the objects whose key begins with `prefix`, as they are when the listing begins."""
        check_prefix(prefix)
        for key, found in sorted(self._objects.items()):
            if key.startswith(prefix):
                yield _meta(key, found)

    async def put(self, key: str, data: Buffer) -> ObjectMeta:
        """Replace the object by a copy of `data`."""
        check_key(key)
        found = self._objects[key] = _Object(bytes(data), str(next(_versions)))
        return _meta(key, found)

    async def put_stream(self, key: str, chunks: AsyncIterable[Buffer]) -> ObjectMeta:
        """Collect the chunks, then put them."""
        check_key(key)
        return await self.put(key, b"".join([bytes(chunk) async for chunk in chunks]))

    async def delete(self, key: str) -> None:
        """Remove the object."""
        check_key(key)
        if self._objects.pop(key, None) is None:
            raise self._missing(key)

    async def copy(self, source: str, target: str) -> ObjectMeta:
        """Copy the object."""
        return await self.put(target, self._find(source, None).data)

    async def close(self) -> None:
        """Do nothing: the objects belong to the process."""

    def _find(self, key: str, version: str | None) -> _Object:
        check_key(key)
        found = self._objects.get(key)
        if found is None:
            raise self._missing(key)
        if version is not None and found.version != version:
            uri = join_uri(self.url, key)
            raise ChangedError(f"{uri} was changed since it was opened; open the dataset again", uri=uri)
        return found

    def _cut(self, key: str, found: _Object, span: Span) -> memoryview:
        if span.end > len(found.data):
            uri = join_uri(self.url, key)
            raise BadInputError(
                f"bytes {span.offset} to {span.end} of {uri} reach past its end at {len(found.data)}",
                kind=ErrorKind.BAD_RANGE,
                uri=uri,
            )
        return memoryview(found.data)[span.offset : span.end]

    def _missing(self, key: str) -> NotFoundError:
        uri = join_uri(self.url, key)
        return NotFoundError(f"no object at {uri}", uri=uri)


def _meta(key: str, found: _Object) -> ObjectMeta:
    return ObjectMeta(key, len(found.data), found.version)
