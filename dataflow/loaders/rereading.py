"""A word about samplers that make a native dataset read its blocks again and again.

A block holds many samples and is read whole. Who asks for samples anywhere, as torch's `shuffle=True` does, reads a
block for nearly each of them, unless the cache keeps all blocks. Nothing fails then: it is slow, and nobody would know
why. Files of a local disk are left out: the system keeps them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch.utils.data import DistributedSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from connectors.errors import DataError
from dataflow.loaders.order_state import sampler_length, sampler_parts

__all__ = ["reads_of_a_block", "warn_of_rereading"]

_log = logging.getLogger(__name__)

# A block of a window that ranks share, or of a subset, may well be read twice.
_MAX_READS = 4


def reads_of_a_block(*, samples: int, batch_size: int, num_blocks: int, kept_share: float) -> float:
    """Return how often a block is fetched in an epoch that asks for samples anywhere, on average.

    Args:
        samples: That the epoch asks for.
        batch_size: Samples that are asked for at once: a block that several of them are in is read once.
        num_blocks: Of the dataset, all of one size.
        kept_share: The part of them that is kept after it was read.
    """
    blocks_of_a_batch = num_blocks * (1 - (1 - 1 / num_blocks) ** batch_size)
    return samples / batch_size * blocks_of_a_batch * (1 - kept_share) / num_blocks


def warn_of_rereading(dataset: Any, sampler: Any) -> None:
    """Log a warning, once a process, where blocks will be read some times each in an epoch.

    Args:
        dataset: A native one. The cache behind it is asked what it keeps, where that matters.
        sampler: What a loader draws its indices from.
    """
    if (name := _find_random(sampler)) is None:
        return
    index, given = dataset.index, getattr(sampler, "batch_size", None)
    batch_size = given if isinstance(given, int) and given > 0 else 1
    samples = (sampler_length(sampler) or 0) * batch_size
    data_bytes = max(1, int(index.ranges.length.sum()))
    expected = {"samples": samples, "batch_size": batch_size, "num_blocks": index.num_blocks}
    if reads_of_a_block(**expected, kept_share=0) < _MAX_READS:
        return
    try:
        kept_bytes = dataset.buffer_bytes + _kept_bytes(dataset.reader.stats())
    except DataError:
        return  # who reads will say so
    reads = reads_of_a_block(**expected, kept_share=min(1.0, kept_bytes / data_bytes))
    if reads >= _MAX_READS:
        _warn(
            f"{name} makes this dataset read a block of {index.num_samples / index.num_blocks:,.0f} samples for nearly "
            f"each sample: of {data_bytes / 2**30:,.2f} GiB the cache keeps {kept_bytes / 2**30:,.2f} GiB, so an epoch "
            f"fetches each block some {reads:,.0f} times; ElasticBatchSampler, given as batch_sampler, fetches it once"
        )


def _find_random(sampler: Any) -> str | None:
    """Return the name of what takes samples from anywhere, where it is known to."""
    for part in sampler_parts(sampler):
        is_shuffled = isinstance(part, DistributedSampler) and part.shuffle
        if is_shuffled or isinstance(part, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)):
            return type(part).__qualname__
    return None


def _kept_bytes(stats: Mapping[str, Any]) -> float:
    """Return how much a cache keeps; a reader that has none, since files are read in place, has no limit either."""
    places = [*stats["tiers"], *([stats["ring"]] if "ring" in stats else [])]
    return math.fsum(place.get("capacity_bytes", math.inf) for place in places)


@lru_cache(maxsize=64)
def _warn(text: str) -> None:
    _log.warning("%s", text)
