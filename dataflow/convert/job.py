"""Writing one shard: the part of a conversion that runs in any process.

The shard goes first, then its part record, both atomically. Killed before the record, the shard is written again by the
next run, with the same bytes; killed after it, it is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from dataflow.formats.destination import PART_SUFFIX, Destination

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow as pa

    from dataflow.convert.plan import ShardJob
    from dataflow.dataset import Dataset
    from dataflow.formats.protocol import Part, Target

__all__ = ["Work", "write_shard"]

# What one request to the reader asks for; enough to hide a round trip, small beside a shard.
FETCH_BYTES = 8 << 20
FETCH_BLOCKS = 256


@dataclass(frozen=True, slots=True)
class Work:
    """What all shards of a conversion share; travels to worker processes once.

    Attributes:
        source: The dataset to read.
        target: How shards are built.
        schema: What they store.
        url: Where they go.
        plan: Digest of the conversion.
    """

    source: Dataset
    target: Target
    schema: pa.Schema
    url: str
    plan: str


class PartRecord(msgspec.Struct):
    """What lies beside a finished shard until the dataset is published."""

    plan: str
    part: dict[str, object]


def write_shard(work: Work, job: ShardJob, destination: Destination) -> Part:
    """Build and write one shard and its record; return the record's content."""
    part, chunks = work.target.build(
        work.schema, read_range(work.source, work.schema.names, job.first, job.last), job.first
    )
    name = work.target.shard_name(job.number)
    destination.put(name, chunks)
    destination.put(name + PART_SUFFIX, [msgspec.json.encode(PartRecord(work.plan, part))])
    return part


def read_range(source: Dataset, names: list[str], first: int, last: int) -> Iterator[pa.RecordBatch]:
    """Yield the samples `[first, last)` as record batches of the fields `names`, reading a few blocks at a time."""
    index = source.index
    first_sample, length = index.blocks.first_sample, index.blocks.length
    begin, end = (int(block) for block in index.locate(np.array([first, last - 1]))[0])
    while begin <= end:
        filled = np.cumsum(length[begin : min(end + 1, begin + FETCH_BLOCKS)])
        stop = begin + max(1, int(np.searchsorted(filled, FETCH_BYTES, side="right")))
        blocks = source.reader.read_blocks([index.block_ref(block) for block in range(begin, stop)])
        for block, data in zip(range(begin, stop), blocks, strict=True):
            batch = source.source.decode(block, data.view).select(names)
            low, high = max(first, int(first_sample[block])), min(last, int(first_sample[block + 1]))
            if high > low:
                yield batch.slice(low - int(first_sample[block]), high - low)
        begin = stop
