"""Readers that remember what they were asked for, and what they were told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cache.access import BlockData, BlockReader, ObjectData
from cache.block_table import BlockTable
from cache.keys import BlockRef
from connectors.errors import TransientError
from connectors.objects import ObjectMeta

__all__ = ["CountingReader", "PlannedReader", "RecordedPlan"]


class CountingReader:
    """Wraps a `BlockReader`.

    Args:
        inner: Answers.

    Attributes:
        requests: The references of every `read_blocks` so far, one list a call.
        objects: What was read whole.
        heads: Whose version was asked for.
        listed: What was listed.
    """

    def __init__(self, inner: BlockReader) -> None:
        self._inner = inner
        self.requests: list[list[BlockRef]] = []
        self.objects: list[str] = []
        self.heads: list[str] = []
        self.listed: list[str] = []

    def read_blocks(self, refs: Sequence[BlockRef]) -> list[BlockData]:
        self.requests.append(list(refs))
        return self._inner.read_blocks(refs)

    def read_object(self, uri: str) -> ObjectData:
        self.objects.append(uri)
        return self._inner.read_object(uri)

    def head(self, uri: str) -> ObjectMeta:
        self.heads.append(uri)
        return self._inner.head(uri)

    def list_objects(self, url: str) -> list[ObjectMeta]:
        self.listed.append(url)
        return self._inner.list_objects(url)

    def stats(self) -> dict[str, Any]:
        return self._inner.stats()

    def close(self) -> None:
        self._inner.close()


class RecordedPlan:
    """Takes down what a loader announces.

    Attributes:
        table: What the numbers refer to.
        blocks: All that was announced and not taken back.
        position: How much of that is passed.
        calls: The names of all calls.
        is_broken: The server is gone.
    """

    def __init__(self, table: BlockTable) -> None:
        self.table = table
        self.blocks: list[int] = []
        self.position = 0
        self.calls: list[str] = []
        self.is_broken = False

    @property
    def refs(self) -> list[BlockRef]:
        """What was announced, by name."""
        return [self.table.ref(block) for block in self.blocks]

    def extend(self, blocks: npt.NDArray[np.integer[Any]]) -> None:
        self._call("extend")
        self.blocks += blocks.tolist()

    def advance(self, position: int) -> None:
        self._call("advance")
        assert self.position <= position <= len(self.blocks)
        self.position = position

    def replace(self) -> None:
        self._call("replace")
        del self.blocks[self.position :]

    def close(self) -> None:
        self.calls.append("close")

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.is_broken:
            raise TransientError("the server is gone")


class PlannedReader(CountingReader):
    """Takes plans as well.

    Attributes:
        plans: All that were opened.
    """

    def __init__(self, inner: BlockReader) -> None:
        super().__init__(inner)
        self.plans: list[RecordedPlan] = []

    def open_plan(self, table: BlockTable) -> RecordedPlan:
        self.plans.append(RecordedPlan(table))
        return self.plans[-1]
