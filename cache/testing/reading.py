"""Read blocks the way a client does: check what comes from a disk, report what is wrong, ask again."""

from __future__ import annotations

import os
from collections.abc import Sequence

from cache.block import file_bytes, verify
from cache.engine import Engine
from cache.handle import Handle
from cache.keys import BlockRef, block_key
from connectors.errors import CorruptError, DataError

__all__ = ["read_blocks", "read_handle"]


def read_handle(key: bytes, handle: Handle) -> bytes:
    """Return the block's bytes and close the handle; `CorruptError` where they are to be verified and do not."""
    with handle:
        content = os.pread(handle.fd, file_bytes(handle.length) if handle.verify else handle.length, 0)
    data = content[: handle.length]
    if handle.verify:
        verify(key, data, content[handle.length :])
    return data


async def read_blocks(engine: Engine, refs: Sequence[BlockRef], *, job: str = "") -> list[bytes | DataError]:
    """Return the bytes of each block, or why it could not be had. A bad block is reported, and asked for once more."""
    found = await engine.get_many(refs, job=job)
    results: list[bytes | DataError] = []
    for ref, handle in zip(refs, found, strict=True):
        if isinstance(handle, DataError):
            results.append(handle)
            continue
        key = block_key(ref)
        try:
            results.append(read_handle(key, handle))
        except CorruptError:
            await engine.report_bad(ref)
            (again,) = await engine.get_many([ref])
            results.append(again if isinstance(again, DataError) else read_handle(key, again))
    return results
