"""What callers ask of a store: one method a Protocol, composed where a caller needs several.

Every method is a coroutine (or an async iterator) and belongs to the event loop that runs it. Buffers that come back
are read-only by contract, may be views of a larger buffer, and live as long as they are referenced. Errors are those of
`connectors.errors` and nothing else.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

from connectors.objects import ObjectMeta, Span

__all__ = [
    "Buffer",
    "Close",
    "Copy",
    "Delete",
    "Get",
    "GetRange",
    "GetRanges",
    "Head",
    "List",
    "Put",
    "PutStream",
    "Readable",
    "Store",
]

Buffer: TypeAlias = bytes | bytearray | memoryview


class Get(Protocol):
    """Read one object whole."""

    async def get(self, key: str, *, version: str | None = None) -> Buffer:
        """Return the whole object.

        Raises:
            NotFoundError: No object has this key.
            ChangedError: `version` was given and the object has another one.
        """
        ...


class GetRange(Protocol):
    """Read one range of an object."""

    async def get_range(self, key: str, span: Span, *, version: str | None = None) -> Buffer:
        """Return exactly `span.length` bytes.

        Raises:
            NotFoundError: No object has this key.
            ChangedError: `version` was given and the object has another one.
            BadInputError: The span reaches past the end of the object.
        """
        ...


class GetRanges(Protocol):
    """Read many ranges of an object at once."""

    async def get_ranges(self, key: str, spans: Sequence[Span], *, version: str | None = None) -> list[Buffer]:
        """Return one buffer per span, in the order of `spans`; near spans share a request. Errors as `get_range`."""
        ...


class Head(Protocol):
    """Describe one object."""

    async def head(self, key: str) -> ObjectMeta:
        """Return size and version; `NotFoundError` where there is nothing."""
        ...


class List(Protocol):
    """Enumerate objects."""

    def list(self, prefix: str = "") -> AsyncIterator[ObjectMeta]:
        """Yield every object whose key begins with `prefix` (a string, not a folder), sorted by key."""
        ...


class Put(Protocol):
    """Write one object from memory."""

    async def put(self, key: str, data: Buffer) -> ObjectMeta:
        """Replace the object atomically: a reader sees the old content or the new, never a part."""
        ...


class PutStream(Protocol):
    """Write one object piece by piece."""

    async def put_stream(self, key: str, chunks: AsyncIterable[Buffer]) -> ObjectMeta:
        """Write the chunks in order; the object appears whole when the last is in, or not at all."""
        ...


class Delete(Protocol):
    """Remove one object."""

    async def delete(self, key: str) -> None:
        """Remove the object; `NotFoundError` where there is nothing."""
        ...


class Copy(Protocol):
    """Copy an object inside one store."""

    async def copy(self, source: str, target: str) -> ObjectMeta:
        """Replace `target` by the content of `source`, atomically."""
        ...


class Close(Protocol):
    """Give back connections and descriptors."""

    async def close(self) -> None:
        """Release what the store holds; closing twice is harmless."""
        ...


@runtime_checkable
class Readable(Get, GetRange, GetRanges, Head, Close, Protocol):
    """What the cache asks of an origin."""


@runtime_checkable
class Store(Readable, List, Put, PutStream, Delete, Copy, Protocol):
    """Everything a store of ours can do.

    Attributes:
        url: The root that keys are relative to.
    """

    url: str
