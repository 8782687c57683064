"""Reading blocks of any source: whole, in pieces, or only what some fields need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np

from dataflow.formats.protocol import Source
from dataflow.index import Pieces
from dataflow.observe import stage
from dataflow.observe.sources import find_farthest

if TYPE_CHECKING:
    import numpy.typing as npt
    import pyarrow as pa

    from cache.access import BlockData, BlockReader
    from cache.keys import BlockRef
    from dataflow.index import Blocks, Index

__all__ = [
    "CropPlan",
    "CroppableSource",
    "PiecewiseSource",
    "SelectiveSource",
    "decode_block",
    "fetch_blocks",
    "pieces_of",
    "read_blocks",
    "selected",
]


class PiecewiseSource(Source, Protocol):
    """A source whose index has pieces."""

    def decode_pieces(self, block: int, pieces: Sequence[memoryview]) -> pa.RecordBatch:
        """Return the samples of one block from its pieces, in their order; otherwise as `decode`."""
        ...


@runtime_checkable
class SelectiveSource(Source, Protocol):
    """A source that can read some fields without fetching the bytes of the others."""

    def select(self, names: Sequence[str]) -> Source:
        """Return a source of the same samples in the same blocks, of the same fingerprint, with these fields only.

        Args:
            names: Fields of this source, distinct; in any order.
        """
        ...


@dataclass(frozen=True, slots=True)
class CropPlan:
    """How a box of one field of one sample is read.

    Attributes:
        refs: What has to be read.
        assemble: Puts the bytes of those, in their order, into an array of the box's shape; `CorruptError` where they
            are damaged.
    """

    refs: Sequence[BlockRef]
    assemble: Callable[[Sequence[memoryview], npt.NDArray[Any]], None]


@runtime_checkable
class CroppableSource(Source, Protocol):
    """A source that can read a box of a tensor without the rest of it."""

    def can_crop(self, name: str, shape: Sequence[int]) -> bool:
        """Say whether boxes of a shape, out of this tensor field, are read by less than the whole."""
        ...

    def crop(
        self,
        name: str,
        sample: int,
        start: Sequence[int],
        shape: Sequence[int],
        version_of: Callable[[int], str],
    ) -> CropPlan:
        """Plan the reading of a box of a field for which `can_crop` holds.

        Args:
            name: Of the field.
            sample: Number of the sample.
            start: First place along every axis of the field's shape.
            shape: Number of places along every axis; inside the field's shape.
            version_of: Asks for the version that the store has for a shard of the index, by its number.
        """
        ...


def selected(source: Source, names: Sequence[str]) -> Source:
    """Return what reads these fields of a source, and as little else as its format allows."""
    if isinstance(source, SelectiveSource) and len(names) < len(source.schema):
        return source.select(names)
    return source


def pieces_of(blocks: Blocks, spans: Sequence[Sequence[tuple[int, int]]]) -> Pieces:
    """Return pieces from offset and length of each, block by block; they lie in the shards of their blocks."""
    counts = np.array([len(part) for part in spans], np.int64)
    columns = np.array([span for part in spans for span in part], np.int64).reshape(-1, 2).T
    first = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    return Pieces(first, np.repeat(blocks.shard, counts), columns[0].copy(), columns[1].copy())


def fetch_blocks(reader: BlockReader, index: Index, blocks: Iterable[int]) -> list[list[BlockData]]:
    """Read some blocks by one request; return the pieces of each, in order.

    Raises:
        DataError: As `BlockReader.read_blocks`.
    """
    refs = [index.block_refs(block) for block in blocks]
    found = iter(read_blocks(reader, [ref for pieces in refs for ref in pieces]))
    return [list(_take(found, len(pieces))) for pieces in refs]


def read_blocks(reader: BlockReader, refs: Sequence[BlockRef]) -> list[BlockData]:
    """Read blocks, and account the time to the farthest place that one of them came from, which the read waited for.

    Raises:
        DataError: As `BlockReader.read_blocks`.
    """
    with stage("fetch") as reading:
        found = reader.read_blocks(refs)
        if found:
            reading.name = f"fetch.{find_farthest({data.source for data in found})}"
    return found


def decode_block(source: Source, block: int, pieces: Sequence[BlockData]) -> pa.RecordBatch:
    """Return the samples of a block that `fetch_blocks` read.

    Raises:
        CorruptError: As `Source.decode`.
    """
    views = [piece.view for piece in pieces]
    if source.index.pieces is None:
        return source.decode(block, *views)
    return cast("PiecewiseSource", source).decode_pieces(block, views)


def _take(found: Iterator[BlockData], count: int) -> Iterator[BlockData]:
    for _ in range(count):
        yield next(found)
