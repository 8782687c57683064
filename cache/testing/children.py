"""Bodies of child processes, importable so that spawned children find them."""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.connection import Connection

from cache.keys import BlockRef
from cache.reader import BlockReader

__all__ = ["send_blocks"]


def send_blocks(reader: BlockReader, refs: Sequence[BlockRef], answer: Connection) -> None:
    """Read the blocks and send the bytes of each."""
    for block in reader.read_blocks(refs):
        answer.send_bytes(block.view)
