"""Which samples go into which shard. Pure: the source's index and the settings decide, never workers or time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xxhash

if TYPE_CHECKING:
    import pyarrow as pa

    from dataflow.formats.protocol import Target
    from dataflow.index import Index

__all__ = ["ShardJob", "plan_digest", "plan_shards"]


@dataclass(frozen=True, slots=True)
class ShardJob:
    """One shard to write.

    Attributes:
        number: Its place among the shards.
        first: First sample of the source that it holds.
        last: First sample that it no longer holds.
        source_bytes: About as many bytes of the source belong to it.
    """

    number: int
    first: int
    last: int
    source_bytes: int


def plan_shards(index: Index, shard_size_bytes: int) -> list[ShardJob]:
    """Cut the source into shards of about equal bytes, none much larger than `shard_size_bytes`.

    Inside a block of the source, samples count as equally large: nothing but the index is looked at.
    """
    if not index.num_samples:
        return []
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(index.blocks.length)])
    total = int(ends[-1])
    wanted = -(-total // shard_size_bytes)
    cuts = np.interp(np.arange(wanted + 1) * (total / wanted), ends, index.blocks.first_sample)
    bounds = np.unique(np.rint(cuts).astype(np.int64))
    offsets = np.interp(bounds, index.blocks.first_sample, ends).astype(np.int64)
    return [
        ShardJob(number, int(bounds[number]), int(bounds[number + 1]), int(offsets[number + 1] - offsets[number]))
        for number in range(len(bounds) - 1)
    ]


def plan_digest(index: Index, schema: pa.Schema, target: Target, jobs: list[ShardJob]) -> str:
    """Name a conversion: equal digests promise equal bytes, so the shards of a broken-off run can be kept.

    Covers the versions of the source's objects: a source that changed in between starts over.
    """
    digest = xxhash.xxh3_128(repr((index.url, index.fingerprint, target, jobs)).encode())
    digest.update(schema.serialize().to_pybytes())
    for version in index.shards.versions:
        digest.update(version.as_py().encode() + b"\0")
    return digest.hexdigest()
