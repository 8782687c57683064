"""Whether the blocks of an index lie beside each other: none over another, and none missing between two. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from dataflow.index import Index

__all__ = ["layout_problems"]


def layout_problems(index: Index, *, seamless: bool) -> Iterator[str]:
    """Yield what is wrong with the places of shards and blocks, one sentence each.

    Blocks of several pieces are left out: those may share what they are made of.

    Args:
        index: The index.
        seamless: Whether the format leaves no bytes between the blocks of a shard.
    """
    names = index.shards.names.to_pylist()
    if len(set(names)) < len(names):
        seen: set[str] = set()
        for name in names:
            if name in seen:
                yield f"the index of {index.url} lists the shard {name} twice: its samples would come twice"
            seen.add(name)
    if index.pieces is not None or not index.num_blocks:
        return
    blocks = index.blocks
    order = np.lexsort((blocks.offset, blocks.shard))
    begin, shard = blocks.offset[order], blocks.shard[order]
    end = begin + blocks.length[order]
    gap = np.where(shard[1:] == shard[:-1], begin[1:] - end[:-1], 0)
    for place in np.flatnonzero(gap < 0 if not seamless else gap != 0).tolist():
        one, other = (int(block) for block in order[place : place + 2])
        uri = index.shard_uri(int(shard[place]))
        if gap[place] < 0:
            yield f"blocks {one} and {other} of {uri} overlap at offset {begin[place + 1]}: samples would come twice"
        else:
            yield f"{gap[place]} bytes of {uri} at offset {end[place]} belong to no block: samples may be missing"
