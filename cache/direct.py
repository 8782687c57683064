"""Reading from a store in this process, through the bridge: for `memory://`, which lives nowhere else."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from crc32c import crc32c

from cache.keys import BlockRef
from cache.reader import BlockData, ObjectData
from connectors.bridge import run_sync
from connectors.errors import BadInputError, ChangedError
from connectors.objects import ObjectMeta, Span, split_uri
from connectors.protocols import Buffer, Store
from connectors.registry import open_store

__all__ = ["DirectReader"]

SOURCE = "direct"


class DirectReader:
    """A `BlockReader` for one store; a pickled copy opens it again.

    Args:
        url: Anything in the store.
        verify: Check `crc32c` of the references that carry one.
    """

    def __init__(self, url: str, *, verify: bool = True) -> None:
        self._root, _ = split_uri(url)
        self._verify = verify
        self._store: Store = open_store(self._root)
        self._requests = 0
        self._bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self._root, "verify": self._verify}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["url"], verify=state["verify"])  # type: ignore[misc]

    def read_blocks(self, refs: Sequence[BlockRef]) -> list[BlockData]:
        """Return the blocks in the order of `refs`; those of one object by one call of its store."""
        places: defaultdict[tuple[str, str | None], list[int]] = defaultdict(list)
        for place, ref in enumerate(refs):
            places[self._key(ref.uri), ref.version if ref.crc32c is None else None].append(place)
        buffers = run_sync(self._get(refs, places)) if refs else {}
        blocks = [memoryview(buffers[place]).toreadonly() for place in range(len(refs))]
        if self._verify:
            for ref, block in zip(refs, blocks, strict=True):
                _check(ref, block)
        self._requests += len(places)
        self._bytes += sum(ref.length for ref in refs)
        return [BlockData(block, SOURCE) for block in blocks]

    async def _get(
        self, refs: Sequence[BlockRef], places: dict[tuple[str, str | None], list[int]]
    ) -> dict[int, Buffer]:
        async def get(key: str, version: str | None, wanted: list[int]) -> list[Buffer]:
            spans = [Span(refs[place].offset, refs[place].length) for place in wanted]
            return await self._store.get_ranges(key, spans, version=version)

        found = await asyncio.gather(*(get(key, version, wanted) for (key, version), wanted in places.items()))
        return {
            place: buffer
            for wanted, buffers in zip(places.values(), found, strict=True)
            for place, buffer in zip(wanted, buffers, strict=True)
        }

    def read_object(self, uri: str) -> ObjectData:
        """Return the newest content of an object."""

        async def read(key: str) -> ObjectData:
            meta = await self._store.head(key)
            return ObjectData(bytes(await self._store.get(key, version=meta.version)), meta.version)

        return run_sync(read(self._key(uri)))

    def head(self, uri: str) -> ObjectMeta:
        """Return size and version of an object."""
        return run_sync(self._store.head(self._key(uri)))

    def list_objects(self, url: str) -> list[ObjectMeta]:
        """Return every object below `url`, sorted, keys relative to it."""

        async def listed(prefix: str) -> list[ObjectMeta]:
            return [
                ObjectMeta(meta.key.removeprefix(prefix), meta.size_bytes, meta.version)
                async for meta in self._store.list(prefix)
            ]

        key = self._key(url)
        return run_sync(listed(f"{key}/" if key else ""))

    def stats(self) -> dict[str, Any]:
        """Return requests to the store and bytes from it."""
        return {"tiers": [], "origin": {"requests": self._requests, "bytes": self._bytes, "errors": 0}}

    def close(self) -> None:
        """Close the store."""
        run_sync(self._store.close())

    def _key(self, uri: str) -> str:
        root, key = split_uri(uri)
        if root != self._root:
            raise BadInputError(f"{uri} is not in {self._root}, which this reader is for", uri=uri)
        return key


def _check(ref: BlockRef, block: memoryview) -> None:
    if ref.crc32c is not None and crc32c(block) != ref.crc32c:
        raise ChangedError(
            f"{ref.uri}: the {ref.length} bytes at offset {ref.offset} are not those that the index describes; "
            "the object was overwritten or damaged",
            uri=ref.uri,
        )
