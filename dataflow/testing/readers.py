"""A reader that remembers what it was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cache.access import BlockData, BlockReader, ObjectData
from cache.keys import BlockRef
from connectors.objects import ObjectMeta

__all__ = ["CountingReader"]


class CountingReader:
    """Wraps a `BlockReader`.

    Args:
        inner: Answers.

    Attributes:
        requests: The references of every `read_blocks` so far, one list a call.
    """

    def __init__(self, inner: BlockReader) -> None:
        self._inner = inner
        self.requests: list[list[BlockRef]] = []

    def read_blocks(self, refs: Sequence[BlockRef]) -> list[BlockData]:
        self.requests.append(list(refs))
        return self._inner.read_blocks(refs)

    def read_object(self, uri: str) -> ObjectData:
        return self._inner.read_object(uri)

    def head(self, uri: str) -> ObjectMeta:
        return self._inner.head(uri)

    def list_objects(self, url: str) -> list[ObjectMeta]:
        return self._inner.list_objects(url)

    def stats(self) -> dict[str, Any]:
        return self._inner.stats()

    def close(self) -> None:
        self._inner.close()
