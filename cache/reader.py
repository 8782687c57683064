"""What the layer above asks for bytes: one Protocol.

A reader is synchronous, may be shared by threads, survives a fork and can be pickled: a copy in another process
reconnects by itself. Views that it returns are read-only and live as long as they are referenced, also when the cache
evicts the block behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from cache.keys import BlockRef
from connectors.objects import ObjectMeta

__all__ = ["BlockData", "BlockReader", "ObjectData"]


class BlockData(NamedTuple):
    """The bytes of one block.

    Attributes:
        view: Read-only bytes, exactly as long as the block.
        source: Where they were found: `in_place`, `direct`, `origin`, or the name of a cache tier.
    """

    view: memoryview
    source: str


@dataclass(frozen=True, slots=True)
class ObjectData:
    """A whole small object and the version it had when it was read."""

    data: bytes
    version: str


@runtime_checkable
class BlockReader(Protocol):
    """What a dataset asks of the layers below."""

    def read_blocks(self, refs: Sequence[BlockRef]) -> list[BlockData]:
        """Return the blocks in the order of `refs`; one request, however many.

        Raises:
            DataError: The first block that could not be had says why, naming URI and offset.
        """
        ...

    def read_object(self, uri: str) -> ObjectData:
        """Return the newest content of a small object (a manifest), never from the cache."""
        ...

    def head(self, uri: str) -> ObjectMeta:
        """Return size and version that an object has now; its key is relative to its store."""
        ...

    def list_objects(self, url: str) -> list[ObjectMeta]:
        """Return every object below `url`, sorted, keys relative to it."""
        ...

    def stats(self) -> dict[str, Any]:
        """Return plain numbers as JSON types: per tier hits, bytes and evictions; origin requests and bytes."""
        ...

    def close(self) -> None:
        """Let go of connections and descriptors. Views already handed out stay valid."""
        ...
