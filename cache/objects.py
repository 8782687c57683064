"""Whole objects over blocks: read through a cache, written straight to their store. What the ways in share.

An object is pinned first: its size and the version that it has now. Every read of it insists on that version, so an
object that is replaced in between is `ChangedError` and never a mix of two contents.

A write goes from this process to the store, which publishes it whole or not at all; the cache needs no word of it, as a
new content has a new version. Readers survive a fork; the native clients that write to object stores do not, and a
forked child of a process that has written says so instead of hanging.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

from cache.access import open_reader
from cache.config import CacheConfig
from cache.keys import BlockRef
from cache.reader import BlockReader
from connectors.bridge import run_sync
from connectors.errors import BadInputError, ChangedError, NotFoundError
from connectors.filesystems import is_local
from connectors.folders import walk_files
from connectors.objects import ObjectMeta, split_uri
from connectors.protocols import Buffer, Store
from connectors.registry import open_store

__all__ = ["ByteRange", "CachedObjects", "ObjectOptions", "PinnedObject"]

_T = TypeVar("_T")

_WINDOW_BYTES = 64 * 1024 * 1024
"""Blocks asked for at once: enough to keep an origin busy, and a bound on what a large read holds beside its result."""

_MAX_REMEMBERED = 65_536
_READ_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class ObjectOptions:
    """How objects are read.

    Attributes:
        cache: As in `cache.open_reader`.
        block_size_bytes: The unit of caching; readers share blocks only where they agree on it. 1 MiB suits random
            access to parts of objects.
        max_age_s: How long a version that was looked up may be taken for the newest. 0 asks the origin each time; where
            objects are never replaced, a longer time saves that request, and what is cached is read without the origin.
    """

    cache: str | CacheConfig | None = "auto"
    block_size_bytes: int = 4 * 1024 * 1024
    max_age_s: float = 0.0

    def __post_init__(self) -> None:
        if not 4096 <= self.block_size_bytes <= _WINDOW_BYTES:
            raise BadInputError(
                f"block_size_bytes must be within 4096 and {_WINDOW_BYTES}, got {self.block_size_bytes}"
            )
        if self.max_age_s < 0:
            raise BadInputError(f"max_age_s must be >= 0, got {self.max_age_s}")


@dataclass(frozen=True, slots=True)
class PinnedObject:
    """One content of one object."""

    uri: str
    size_bytes: int
    version: str


class ByteRange(NamedTuple):
    """The bytes `[begin, end)` of an object; both within it."""

    target: PinnedObject
    begin: int
    end: int


class _Piece(NamedTuple):
    """The bytes `[begin, end)` of a block, which belong to the range at `place`."""

    place: int
    ref: BlockRef
    begin: int
    end: int


class CachedObjects:
    """Objects of any store. Shared by threads, usable after a fork, and pickled with its way to the cache.

    Args:
        options: See there.
    """

    def __init__(self, options: ObjectOptions) -> None:
        self.options = options
        self._readers: dict[tuple[str, bool], BlockReader] = {}
        self._stores: dict[str, Store] = {}
        self._pins: OrderedDict[str, tuple[float, PinnedObject]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options, "readers": self._readers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["options"])  # type: ignore[misc]
        self._readers = state["readers"]

    def pin(self, uri: str) -> PinnedObject:
        """Return the content that the object has now, or had at most `max_age_s` ago.

        Raises:
            NotFoundError: There is no such object.
        """
        expires_s, known = self._pins.get(uri, (0.0, None))
        if known is not None and time.monotonic() < expires_s:
            return known
        if not split_uri(uri)[1]:
            raise NotFoundError(f"{uri} is a whole store and no object", uri=uri)
        meta = self._reader(uri).head(uri)
        pinned = PinnedObject(uri, meta.size_bytes, meta.version)
        if self.options.max_age_s:
            self._pins[uri] = (time.monotonic() + self.options.max_age_s, pinned)
            if len(self._pins) > _MAX_REMEMBERED:
                self._pins.popitem(last=False)
        return pinned

    def read(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """Return the bytes of each range; blocks of all of them are asked for together.

        Raises:
            ChangedError: An object has another content than the one that was pinned.
            DataError: As the origin fails.
        """
        found: list[list[bytes]] = [[] for _ in ranges]
        for window in _windows(self._pieces(ranges)):
            views = self._views(window)
            for place, pieces in groupby(window, key=lambda piece: piece.place):
                found[place].append(b"".join(views[piece.ref][piece.begin : piece.end] for piece in pieces))
        return [b"".join(parts) for parts in found]

    def read_slice(self, uri: str, wanted: slice) -> bytes:
        """Return a slice of an object, all of it from one content; one that is replaced meanwhile is read again.

        Raises:
            NotFoundError: There is no such object.
            ChangedError: It is replaced all the time.
        """
        for attempt in range(1, _READ_ATTEMPTS + 1):
            pinned = self.pin(uri)
            begin, end, _ = wanted.indices(pinned.size_bytes)
            try:
                return self.read([ByteRange(pinned, begin, max(begin, end))])[0]
            except ChangedError:
                if attempt == _READ_ATTEMPTS:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def block(self, target: PinnedObject, number: int) -> memoryview:
        """Return one block whole, as it lies in the cache."""
        ref = self._ref(target, number)
        return self._views([_Piece(0, ref, 0, ref.length)])[ref]

    def list(self, url: str) -> list[ObjectMeta]:
        """Return every object below `url`, sorted, keys relative to it."""
        return self._reader(url).list_objects(url)

    def has_any(self, url: str) -> bool:
        """Say whether there is an object below `url`."""
        root, key = split_uri(url)
        if root == "file:///":
            return next(walk_files(key), None) is not None
        try:
            return bool(self.list(url)) or not key
        except NotFoundError:
            return False

    def put(self, uri: str, data: Buffer) -> None:
        """Replace an object, atomically."""
        store, key = self._store(uri)
        self._run(store.put(key, data), uri)

    def put_stream(self, uri: str, chunks: Iterable[Buffer]) -> None:
        """Replace an object by chunks, atomically. `chunks` is iterated in a thread of its own."""
        store, key = self._store(uri)
        self._run(store.put_stream(key, _in_thread(iter(chunks))), uri)

    def delete(self, uri: str) -> None:
        """Remove an object; `NotFoundError` where there is none."""
        store, key = self._store(uri)
        self._run(store.delete(key), uri)

    def copy(self, source: str, target: str) -> None:
        """Copy an object, inside its store where both lie in one."""
        store, source_key = self._store(source)
        other, target_key = self._store(target)
        if store is other:
            self._run(store.copy(source_key, target_key), target)
        else:
            self.put_stream(target, self.chunks(self.pin(source)))

    def chunks(self, target: PinnedObject) -> Iterator[memoryview]:
        """Yield the blocks of an object in their order."""
        for number in range(-(-target.size_bytes // self.options.block_size_bytes)):
            yield self.block(target, number)

    def close(self) -> None:
        """Hang up. What was read stays valid, and a later call connects again."""
        readers, self._readers = self._readers, {}
        for reader in readers.values():
            reader.close()

    def _reader(self, uri: str) -> BlockReader:
        root, key = split_uri(uri)
        # Two file systems of one machine may be a disk, read in place, and a share, read through the cache.
        place = root, root == "file:///" and _on_disk("/" + key.rpartition("/")[0])
        reader = self._readers.get(place)
        return reader or self._readers.setdefault(place, open_reader(uri, self.options.cache))

    def _store(self, uri: str) -> tuple[Store, str]:
        root, key = split_uri(uri)
        return self._stores.get(root) or self._stores.setdefault(root, open_store(root)), key

    def _run(self, coroutine: Coroutine[Any, Any, object], uri: str) -> None:
        """Wait for a change of the object `uri`."""
        run_sync(coroutine)
        self._pins.pop(uri, None)

    def _ref(self, target: PinnedObject, number: int) -> BlockRef:
        size_bytes = self.options.block_size_bytes
        offset = number * size_bytes
        return BlockRef(target.uri, target.version, offset, min(size_bytes, target.size_bytes - offset))

    def _pieces(self, ranges: Sequence[ByteRange]) -> Iterator[_Piece]:
        size_bytes = self.options.block_size_bytes
        for place, (target, begin, end) in enumerate(ranges):
            for number in range(begin // size_bytes, -(-end // size_bytes) if begin < end else 0):
                ref = self._ref(target, number)
                yield _Piece(place, ref, max(0, begin - ref.offset), min(ref.length, end - ref.offset))

    def _views(self, window: Sequence[_Piece]) -> dict[BlockRef, memoryview]:
        refs = list(dict.fromkeys(piece.ref for piece in window))
        views: dict[BlockRef, memoryview] = {}
        try:
            for _, group in groupby(refs, key=lambda ref: id(self._reader(ref.uri))):
                part = list(group)
                blocks = self._reader(part[0].uri).read_blocks(part)
                views.update((ref, block.view) for ref, block in zip(part, blocks, strict=True))
        except ChangedError:
            for ref in refs:  # the next look-up sees what there is now
                self._pins.pop(ref.uri, None)
            raise
        return views


@lru_cache(maxsize=4096)
def _on_disk(folder: str) -> bool:
    return is_local(folder)


def _windows(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Cut the pieces so that the blocks of each part are at most `_WINDOW_BYTES`, or one. Pure."""
    window: list[_Piece] = []
    size_bytes = 0
    for piece in pieces:
        if window and size_bytes + piece.ref.length > _WINDOW_BYTES:
            yield window
            window, size_bytes = [], 0
        window.append(piece)
        size_bytes += piece.ref.length
    if window:
        yield window


async def _in_thread(chunks: Iterator[Buffer]) -> AsyncIterator[Buffer]:
    """Iterate what may block without standing in the way of the loop."""
    while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
        yield chunk
