"""Which samples go into which job. Pure: source, settings and what is kept decide, never workers or time."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from dataflow.convert.job import ShardJob
from dataflow.formats.protocol import GridTarget

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    import pyarrow as pa

    from dataflow.convert.choice import Choice
    from dataflow.formats.protocol import Target
    from dataflow.index import Index

__all__ = ["cut", "fit_target", "plan_digest", "plan_shards"]


def fit_target(
    target: Target, schema: pa.Schema, index: Index, choices: Sequence[Choice], shard_size_bytes: int
) -> Target:
    """Return the target with what it has to know of the datasets before the first shard is built."""
    if not isinstance(target, GridTarget):
        return target
    sample_bytes = float(index.blocks.length.sum()) / max(1, index.num_samples)
    num_samples = max(map(len, choices), default=0)
    return target.fit(schema, num_samples=num_samples, sample_bytes=sample_bytes, shard_size_bytes=shard_size_bytes)


def plan_shards(index: Index, choices: Sequence[Choice], target: Target, shard_size_bytes: int) -> list[ShardJob]:
    """Cut what every dataset gets into shards of about equal bytes of the source, none much larger than asked for.

    Inside a block of the source, samples count as equally large: nothing but the index is looked at. Where the target
    asks for equally many samples in all shards, they have that.
    """
    if isinstance(target, GridTarget):
        return _regular(index, choices, target)
    jobs = []
    for place, choice in enumerate(choices):
        if choice.shuffled:
            # Any part of a shuffled order holds its share of all bytes.
            total = int(index.blocks.length.sum() * _kept_share(index, choice))
            size_bytes, positions = np.array([total]), np.array([0, len(choice.order)])
        else:
            size_bytes, positions = _stored(index, choice)
        ranges = cut(positions, size_bytes * choice.share, shard_size_bytes) if len(choice) else []
        jobs += [
            ShardJob(place, number, choice.prefix + target.shard_name(number), *bounds)
            for number, bounds in enumerate(ranges)
        ]
    return jobs


def _regular(index: Index, choices: Sequence[Choice], target: GridTarget) -> list[ShardJob]:
    sample_bytes = float(index.blocks.length.sum()) / max(1, index.num_samples)
    jobs = []
    for place, choice in enumerate(choices):
        bounds = choice.bounds(target.shard_rows)
        size_bytes = int(sample_bytes * min(target.shard_rows, len(choice)))
        jobs += [
            ShardJob(place, number, choice.prefix + target.shard_name(number), first, last, size_bytes)
            for number, (first, last) in enumerate(itertools.pairwise(bounds))
        ]
    return jobs


def cut(first_sample: npt.NDArray[Any], size_bytes: npt.NDArray[Any], limit_bytes: int) -> list[tuple[int, int, int]]:
    """Return ranges of about `limit_bytes`: first sample, the one after the last, and about how many bytes it has.

    Args:
        first_sample: int64, of every block, and the number of samples.
        size_bytes: Of every block.
        limit_bytes: At least 1.
    """
    if not first_sample[-1]:
        return []
    ends = np.concatenate([np.zeros(1), np.cumsum(size_bytes)])
    total = float(ends[-1])
    wanted = max(1, -(-round(total) // limit_bytes))
    cuts = np.interp(np.arange(wanted + 1) * (total / wanted), ends, first_sample)
    cuts[0], cuts[-1] = 0, first_sample[-1]
    bounds = np.unique(np.rint(cuts).astype(np.int64))
    offsets = np.interp(bounds, first_sample, ends).astype(np.int64)
    return list(zip(bounds.tolist(), bounds[1:].tolist(), np.diff(offsets).tolist(), strict=False))


def plan_digest(index: Index, settings: object) -> str:
    """Name a conversion: equal digests promise equal bytes, so what a broken-off run finished can be kept.

    Covers the versions of the source's objects: a source that changed in between starts over.

    Args:
        index: Of the source.
        settings: Everything else that decides over the bytes; what it is shows in its `repr`.
    """
    digest = xxhash.xxh3_128(repr((index.url, index.fingerprint, settings)).encode())
    for version in index.shards.versions:
        digest.update(version.as_py().encode() + b"\0")
    return digest.hexdigest()


def _kept_share(index: Index, choice: Choice) -> float:
    return len(choice.order) / max(1, index.num_samples)


def _stored(index: Index, choice: Choice) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return bytes of the kept samples of every block, and their first position."""
    first_sample, length = index.blocks.first_sample, index.blocks.length
    if choice.kept is None:
        return length, first_sample
    positions = choice.kept.count_before(first_sample)
    return length * (np.diff(positions) / np.maximum(1, np.diff(first_sample))), positions
