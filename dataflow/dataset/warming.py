"""Fill a cache with a whole dataset, and say truthfully what of it stays there."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cache.keys import BlockRef
from cache.reader import BlockReader
from connectors.errors import BadInputError
from dataflow.index import Index

__all__ = ["Warmed", "check_fits", "warm"]

_WINDOW_BYTES = 64 * 1024 * 1024
_WINDOW_BLOCKS = 1024
_PLACEMENT_LOOKS = 10
_PLACEMENT_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class Warmed:
    """How far it is.

    Attributes:
        phase: `load`, then `check`.
        blocks: Blocks that this phase has read, of `num_blocks`.
        num_blocks: Blocks of the dataset.
        size_bytes: Their bytes, of `num_bytes`.
        num_bytes: Bytes of the dataset.
        kept_bytes: Of `size_bytes`, those that were found in a tier.
        fetched_bytes: Of `size_bytes`, those that came from the origin.
    """

    phase: str
    num_blocks: int
    num_bytes: int
    blocks: int = 0
    size_bytes: int = 0
    kept_bytes: int = 0
    fetched_bytes: int = 0


def check_fits(index: Index, stats: dict[str, Any]) -> None:
    """Refuse a dataset that the tiers of a server cannot hold, whatever else they hold.

    Args:
        index: Of the dataset.
        stats: Of the server.

    Raises:
        BadInputError: It needs more bytes or more blocks than all tiers together have.
    """
    tiers = stats["tiers"]
    size_bytes = int(index.blocks.length.sum())
    capacity_bytes = sum(tier["capacity_bytes"] for tier in tiers)
    if size_bytes > capacity_bytes:
        raise BadInputError(
            f"{index.url} has {size_bytes} bytes and the tiers of this cache hold {capacity_bytes}; give it larger "
            "ones, or let the training itself fill it with the part that fits"
        )
    limits = [tier["capacity_blocks"] for tier in tiers]
    if None not in limits and index.num_blocks > sum(limits):
        raise BadInputError(
            f"{index.url} has {index.num_blocks} blocks and the tiers of this cache may hold {sum(limits)}; raise "
            "capacity_blocks or the limit on open files"
        )


def warm(index: Index, reader: BlockReader, *, check: bool = True) -> Iterator[Warmed]:
    """Read every block through a server, so that its tiers keep what they let in; yields as it goes.

    What an earlier run has loaded is found in the tiers and costs no request to the origin. With `check`, everything is
    read once more: checksums are verified, and what comes from no tier then is what they did not keep.

    Raises:
        DataError: A block cannot be had.
    """
    tiers = {tier["name"] for tier in reader.stats()["tiers"]}
    for phase in ("load", "check") if check else ("load",):
        done = Warmed(phase, len(index.ranges), int(index.ranges.length.sum()))
        yield done
        for refs in _windows(index):
            if phase == "check":
                _await_placement(refs, reader, tiers)
            kept_bytes = fetched_bytes = 0
            for block in reader.read_blocks(refs):
                kept_bytes += len(block.view) * (block.source in tiers)
                fetched_bytes += len(block.view) * (block.source == "origin")
            done = replace(
                done,
                blocks=done.blocks + len(refs),
                size_bytes=done.size_bytes + sum(ref.length for ref in refs),
                kept_bytes=done.kept_bytes + kept_bytes,
                fetched_bytes=done.fetched_bytes + fetched_bytes,
            )
            yield done


def _await_placement(refs: Sequence[BlockRef], reader: BlockReader, tiers: set[str]) -> None:
    """Give blocks that are neither in a tier nor at the origin only, but on their way to a disk, time to arrive."""
    for _ in range(_PLACEMENT_LOOKS):
        if all(block.source in tiers or block.source == "origin" for block in reader.read_blocks(refs)):
            return
        time.sleep(_PLACEMENT_PAUSE_S)


def _windows(index: Index) -> Iterator[Sequence[BlockRef]]:
    window: list[BlockRef] = []
    size_bytes = 0
    for row in range(len(index.ranges)):
        ref = index.range_ref(row)
        if window and (size_bytes + ref.length > _WINDOW_BYTES or len(window) == _WINDOW_BLOCKS):
            yield window
            window, size_bytes = [], 0
        window.append(ref)
        size_bytes += ref.length
    if window:
        yield window
