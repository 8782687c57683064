"""Reading a whole dataset to see whether it is what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from crc32c import crc32c

from connectors.errors import DataError
from dataflow.formats.arrow.manifest import content_digest
from dataflow.formats.pieces import decode_block, fetch_blocks

if TYPE_CHECKING:
    from dataflow.dataset.dataset import Dataset

__all__ = ["Verification", "verify"]

MAX_PROBLEMS = 1000


@dataclass(frozen=True, slots=True)
class Verification:
    """What a pass over a dataset found.

    Attributes:
        num_samples: Samples that could be decoded.
        num_blocks: Blocks that were looked at.
        size_bytes: Bytes of those blocks.
        problems: What is wrong, one sentence each; at most `MAX_PROBLEMS`.
        num_problems: How many there are in all.
    """

    num_samples: int
    num_blocks: int
    size_bytes: int
    problems: list[str]
    num_problems: int


def verify(dataset: Dataset, *, progress: Callable[[int], None] | None = None) -> Verification:
    """Read and decode every block, going on after what is wrong.

    Native shards are read whole and checked against digest, size and the checksum of every block, so that also what
    other Arrow readers need of them is covered. Of other formats every block is decoded, which checks what the format
    has to check. Encoded images are not decoded.

    Args:
        dataset: What to verify; its projection does not matter.
        progress: Called with the number of blocks done, after each shard.
    """
    native = dataset.index.blocks.crc32c is not None
    num_samples, size_bytes, num_problems = 0, 0, 0
    problems: list[str] = []
    for shard in range(len(dataset.index.shards)):
        # Blocks are in the order of their shards.
        blocks = range(*(int(block) for block in np.searchsorted(dataset.index.blocks.shard, [shard, shard + 1])))
        for outcome in (_check_native if native else _check)(dataset, shard, blocks):
            if isinstance(outcome, int):
                num_samples += outcome
            else:
                num_problems += 1
                problems += [outcome] if len(problems) < MAX_PROBLEMS else []
        size_bytes += int(dataset.index.blocks.length[blocks.start : blocks.stop].sum())
        if progress is not None:
            progress(blocks.stop)
    return Verification(num_samples, dataset.index.num_blocks, size_bytes, problems, num_problems)


def _check(dataset: Dataset, shard: int, blocks: range) -> Iterator[int | str]:  # noqa: ARG001
    """Yield the number of samples of every good block, and what is wrong with every other."""
    for block in blocks:
        try:
            (pieces,) = fetch_blocks(dataset.reader, dataset.index, [block])
            yield decode_block(dataset.source, block, pieces).num_rows
        except DataError as error:
            yield str(error)


def _check_native(dataset: Dataset, shard: int, blocks: range) -> Iterator[int | str]:
    """Yield the same for one native shard, and what is wrong with the shard as a whole."""
    index = dataset.index
    uri, size_bytes = index.shard_uri(shard), int(index.shards.size_bytes[shard])
    try:
        content = memoryview(dataset.reader.read_object(uri).data)
    except DataError as error:
        yield str(error)
        return
    if len(content) != size_bytes:
        yield f"{uri} has {len(content)} bytes, the index says {size_bytes}"
    elif content_digest(content) != index.shards.versions[shard].as_py():
        yield f"{uri} does not match its digest"
    for block in blocks:
        ref = index.block_ref(block)
        data = content[ref.offset : ref.offset + ref.length]
        if len(data) != ref.length or crc32c(data) != ref.crc32c:
            yield f"block {block} ({ref.length} bytes at offset {ref.offset} of {uri}) does not match its checksum"
            continue
        try:
            yield dataset.source.decode(block, data).num_rows
        except DataError as error:
            yield str(error)
