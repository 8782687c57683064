"""Native datasets of which only some fields are read: header and fields of every block, by the ranges in the index.

A range is named by the checksum of its own bytes, so it is checked like a block and cached like one; the block itself
is another entry of a cache, and neither is looked for in the other. Where the wanted fields are most of the bytes,
whole blocks are read: that is one request for two, and everybody shares them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from connectors.errors import CorruptError
from dataflow.formats.arrow.parts import decode_parts
from dataflow.index import Index, Pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dataflow.formats.arrow.reading import ArrowSource
    from dataflow.formats.pieces import CropPlan
    from dataflow.formats.protocol import Source

__all__ = ["SelectedSource", "select_fields"]

# Fields that have a larger part of all bytes are read with the rest of their blocks.
WORTH = 0.75


@dataclass(frozen=True, slots=True, eq=False)
class SelectedSource:
    """Some fields of a native dataset; see `dataflow.formats.pieces.PiecewiseSource`.

    Attributes:
        whole: The dataset.
        schema: The fields.
        index: That of the dataset, with the pieces that are read of every block.
    """

    whole: ArrowSource
    schema: pa.Schema
    index: Index
    format: str = field(default="arrow", init=False)

    @property
    def lineage(self) -> dict[str, Any]:
        """Where the data came from."""
        return self.whole.lineage

    def select(self, names: Sequence[str]) -> Source:
        """Return a source that reads still fewer fields."""
        return select_fields(self.whole, names)

    def can_crop(self, name: str, shape: Sequence[int]) -> bool:
        """As the dataset."""
        return self.whole.can_crop(name, shape)

    def crop(
        self, name: str, sample: int, start: Sequence[int], shape: Sequence[int], version_of: Callable[[int], str]
    ) -> CropPlan:
        """As the dataset."""
        return self.whole.crop(name, sample, start, shape, version_of)

    def decode(self, block: int, data: memoryview) -> pa.RecordBatch:
        """Return the fields of a block that was read whole."""
        return self.whole.decode(block, data).select(self.schema.names)

    def decode_pieces(self, block: int, pieces: Sequence[memoryview]) -> pa.RecordBatch:
        """Return the fields of a block of which only header and fields were read."""
        ref, schema = self.index.block_ref(block), self.whole.schema
        offsets = [piece.offset - ref.offset for piece in self.index.block_refs(block)]
        columns = [schema.get_field_index(name) for name in self.schema.names]
        try:
            batch = decode_parts(schema, columns, zip(offsets, pieces, strict=True), ref.length)
        except (pa.ArrowException, OSError, EOFError) as error:
            raise CorruptError(
                f"fields of block {block} at offset {ref.offset} of {ref.uri} are not readable: {error}", uri=ref.uri
            ) from error
        expected = self.index.blocks.num_samples_in(block)
        if batch.num_rows != expected:
            raise CorruptError(
                f"block {block} at offset {ref.offset} of {ref.uri} has {batch.num_rows} samples, the index says "
                f"{expected}",
                uri=ref.uri,
            )
        return batch


def select_fields(source: ArrowSource, names: Sequence[str]) -> Source:
    """Return a source that reads some fields of a dataset, or the dataset where that saves nothing.

    Raises:
        CorruptError: The index puts fields outside of their blocks.
    """
    schema, blocks = source.schema, source.index.blocks
    if not names:
        nothing = np.zeros(0, np.int64)
        none = Pieces(np.zeros(len(blocks) + 1, np.int64), nothing.astype(np.int32), nothing, nothing)
        return SelectedSource(source, pa.schema([]), replace(source.index, pieces=none))
    if blocks.parts is None or not len(blocks) or blocks.parts.end.shape[1] != len(schema) + 1:
        return source
    columns = sorted(schema.get_field_index(name) for name in names)
    end = blocks.parts.end
    start = np.concatenate([np.zeros((len(blocks), 1), np.int64), end[:, :-1]], axis=1)
    chosen = np.array([0, *(column + 1 for column in columns)])
    if (end < start).any() or (start[:, 0] < 0).any() or (end[:, -1] != blocks.length).any():
        raise CorruptError(f"the index of {source.index.url} has fields outside of their blocks", uri=source.index.url)
    length = (end - start)[:, chosen]
    if length.sum() > WORTH * blocks.length.sum():
        return source
    present = length > 0
    first = np.concatenate([np.zeros(1, np.int64), np.cumsum(present.sum(axis=1))])
    offset = blocks.offset[:, None] + start[:, chosen]
    shard = np.broadcast_to(blocks.shard[:, None], present.shape)
    pieces = Pieces(first, shard[present], offset[present], length[present], blocks.parts.crc32c[:, chosen][present])
    narrow = pa.schema([schema.field(column) for column in columns], metadata=schema.metadata)
    return SelectedSource(source, narrow, replace(source.index, pieces=pieces))
