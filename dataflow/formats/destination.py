"""Where a dataset is written to: one prefix of a store, seen synchronously."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING

from connectors.bridge import run_sync
from connectors.errors import BadInputError, NotFoundError
from connectors.objects import normalise_url
from connectors.registry import open_store

if TYPE_CHECKING:
    import os
    from types import TracebackType

    from connectors.protocols import Buffer, Store

__all__ = ["Destination"]


class Destination:
    """A prefix to write to. Used by one thread; opened per process and never inherited.

    Args:
        url: The prefix.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = normalise_url(url)
        self._store: Store = open_store(self.url)

    def __enter__(self) -> Destination:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back connections."""
        run_sync(self._store.close())

    def put(self, name: str, chunks: Iterable[Buffer]) -> None:
        """Write one object: all chunks in order, atomically."""
        run_sync(self._store.put_stream(name, _stream(chunks)))

    def get(self, name: str) -> Buffer:
        """Read one object whole."""
        return run_sync(self._store.get(name))

    def names(self) -> list[str]:
        """Return what lies below the prefix; nothing where it does not exist."""
        return run_sync(self._names())

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; those that are gone already are fine."""
        for name in names:
            try:
                run_sync(self._store.delete(name))
            except NotFoundError:
                continue

    def insist_on_empty(self, *, overwrite: bool, manifest: str) -> None:
        """Refuse a prefix that holds something, or clear it, manifest first: a dataset is gone before its parts are.

        Raises:
            BadInputError: There is something and `overwrite` is False.
        """
        found = self.names()
        if found and not overwrite:
            raise BadInputError(
                f"{self.url} is not empty: {len(found)} objects ({found[0]}, ...); choose another place, or overwrite",
                uri=self.url,
            )
        self.delete(sorted(found, key=lambda name: name != manifest))

    async def _names(self) -> list[str]:
        try:
            return [meta.key async for meta in self._store.list()]
        except NotFoundError:
            return []


async def _stream(chunks: Iterable[Buffer]) -> AsyncIterator[Buffer]:
    for chunk in chunks:
        yield chunk
