"""What the layer above asks for bytes: one Protocol.

A reader is synchronous, may be shared by threads, survives a fork and can be pickled: a copy in another process
reconnects by itself. Views that it returns are read-only and live as long as they are referenced, also when the cache
evicts the block behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from cache.block_table import BlockTable
from cache.keys import BlockRef
from connectors.objects import ObjectMeta

__all__ = ["BlockData", "BlockReader", "ObjectData", "PlanHandle", "TakesPlans"]


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


class PlanHandle(Protocol):
    """One reader's future, told to a cache that fetches ahead. Belongs to one thread and one process.

    A plan is a sequence of block numbers that is made longer at its end as its reader goes on. It changes what is
    fetched when, and never what is read. Every method raises `DataError` when the server is gone, and the plan
    with it.
    """

    def extend(self, blocks: npt.NDArray[np.integer[Any]]) -> None:
        """Append block numbers, in the order in which they will be read."""
        ...

    def advance(self, position: int) -> None:
        """Say that all places before `position`, counted from the plan's beginning, are done with."""
        ...

    def replace(self) -> None:
        """Take back all that lies ahead of the last position told; `extend` goes on from there."""
        ...

    def close(self) -> None:
        """End the plan; what only it wanted is no longer fetched."""
        ...


@runtime_checkable
class TakesPlans(Protocol):
    """What a reader with a cache behind it can do as well."""

    def open_plan(self, table: BlockTable) -> PlanHandle | None:
        """Begin a plan over numbered blocks; None where nothing is fetched ahead.

        Raises:
            DataError: No server answers, or it cannot take the plan.
        """
        ...
