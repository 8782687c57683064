"""Where a dataset is written to: one prefix of a store, seen synchronously."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING

from connectors.bridge import run_sync
from connectors.errors import BadInputError, NotFoundError
from connectors.folders import sweep_partials
from connectors.objects import Span, normalise_url, split_uri
from connectors.registry import open_store
from dataflow.index.storage import SIDECAR_NAME

if TYPE_CHECKING:
    import os
    from types import TracebackType

    from connectors.protocols import Buffer, Store

__all__ = ["PART_SUFFIX", "Destination"]

PART_SUFFIX = ".part"  # what a conversion remembers of a finished shard until the manifest is written


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

    def get_range(self, name: str, offset: int, length: int) -> Buffer:
        """Read a part of one object."""
        return run_sync(self._store.get_range(name, Span(offset, length)))

    def sizes(self) -> dict[str, int]:
        """Return name and size of what lies below the prefix; nothing where it does not exist."""
        return run_sync(self._sizes())

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; those that are gone already are fine."""
        for name in names:
            try:
                run_sync(self._store.delete(name))
            except NotFoundError:
                continue

    def clear(self, *, overwrite: bool, owns: Callable[[str], bool], is_manifest: Callable[[str], bool]) -> None:
        """Make sure that the prefix is empty: refuse what it holds, or remove it.

        Args:
            overwrite: Remove an older dataset.
            owns: Whether an object of this name is part of such a dataset; nothing else is ever removed.
            is_manifest: Whether an object goes first, so that the old dataset is gone before its parts are.

        Raises:
            BadInputError: It holds something that may not be removed.
        """
        found = self.insist_on_room(overwrite=overwrite, owns=owns)
        # Killed meanwhile, what is left is no dataset and no part of the next: records that vouch for nothing say so.
        marks = {name.rpartition("/")[0]: name + PART_SUFFIX for name in found if owns(name + PART_SUFFIX)}
        for mark in marks.values():
            self.put(mark, [])
        names = {*found, *marks.values()}
        self.delete(sorted(names, key=lambda name: (not is_manifest(name), name.endswith(PART_SUFFIX), name)))
        self.sweep()

    def sweep(self, *, recursive: bool = True) -> None:
        """Remove what killed writers of this machine left half written here, and by default in folders below."""
        if self.url.startswith("file://"):
            sweep_partials("/" + split_uri(self.url)[1], recursive=recursive)

    def insist_on_room(self, *, overwrite: bool, owns: Callable[[str], bool]) -> list[str]:
        """Return what has to be removed before a dataset is written here; change nothing. Errors as `clear`."""
        found = list(self.sizes())
        foreign = [name for name in found if not owns(name) and name != SIDECAR_NAME]
        if foreign and overwrite:
            raise BadInputError(
                f"{self.url} holds what is no part of a dataset of this format ({_told(foreign)}), and only such parts "
                "are overwritten: remove it yourself, or choose another place",
                uri=self.url,
            )
        if found and not overwrite:
            unfinished = any(name.endswith(PART_SUFFIX) for name in found)
            hint = " finish the conversion there with --resume," if unfinished else ""
            raise BadInputError(
                f"{self.url} is not empty: it holds {_told(found)};{hint} choose another place, or overwrite it",
                uri=self.url,
            )
        return found

    async def _sizes(self) -> dict[str, int]:
        try:
            return {meta.key: meta.size_bytes async for meta in self._store.list()}
        except NotFoundError:
            return {}


def _told(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1:,} more" if names[1:] else names[0]


async def _stream(chunks: Iterable[Buffer]) -> AsyncIterator[Buffer]:
    for chunk in chunks:
        yield chunk
