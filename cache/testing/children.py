"""Bodies of child processes, importable so that spawned children find them."""

from __future__ import annotations

import asyncio
import hashlib
import signal
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from crc32c import crc32c

from cache.asynchronous import AsyncReader
from cache.block_table import BlockTable, TablePage
from cache.keys import BlockRef
from cache.reader import BlockReader, TakesPlans

__all__ = ["digest_files", "hold_plan", "read_until_told", "send_awaited_blocks", "send_blocks"]


def hold_plan(reader: TakesPlans, pages: Sequence[TablePage]) -> None:
    """Announce every block of a table, and stay until killed."""
    table = BlockTable(pages)
    plan = reader.open_plan(table)
    assert plan is not None
    plan.extend(np.arange(len(table)))
    while True:
        signal.pause()


def send_blocks(reader: BlockReader, refs: Sequence[BlockRef], answer: Connection) -> None:
    """Read the blocks and send the bytes of each."""
    for block in reader.read_blocks(refs):
        answer.send_bytes(block.view)


def send_awaited_blocks(reader: AsyncReader, refs: Sequence[BlockRef], answer: Connection) -> None:
    """As `send_blocks`, in an event loop."""

    async def send() -> None:
        async with reader:
            for block in await reader.read_blocks(refs):
                answer.send_bytes(block.view)

    asyncio.run(send())


def digest_files(urls: Sequence[str], options: dict[str, Any], channel: Connection) -> None:
    """Say that this process is ready, wait for the word, read the files by fsspec and send the digest of each."""
    import fsspec

    channel.send("ready")
    channel.recv()
    for url in urls:
        with fsspec.open(url, **options) as file:
            channel.send(hashlib.blake2b(file.read()).hexdigest())


def read_until_told(reader: BlockReader, refs: Sequence[BlockRef], channel: Connection) -> None:
    """Read all blocks over and over, in batches, and compare each with its checksum, until the other side says stop.

    Says "ready" after the first round; in the end the number of rounds, or what went wrong.
    """
    rounds = 0
    try:
        while not channel.poll():
            for begin in range(0, len(refs), 8):
                batch = refs[begin : begin + 8]
                for ref, block in zip(batch, reader.read_blocks(batch), strict=True):
                    assert (len(block.view), crc32c(block.view)) == (ref.length, ref.crc32c), (ref, block.source)
            rounds += 1
            if rounds == 1:
                channel.send("ready")
        channel.send(rounds)
    except BaseException:
        channel.send(traceback.format_exc())
        raise
    finally:
        reader.close()
