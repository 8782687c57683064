"""Blocks for tests."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from cache.handle import Block, seal_block
from cache.keys import KEY_BYTES

__all__ = ["make_block", "make_key"]


def make_key(number: int) -> bytes:
    """Return the key that has this place in the order of keys."""
    return number.to_bytes(KEY_BYTES, "big")


def make_block(number: int, data: bytes) -> Block:
    """Return a block in memory. May be called on an event loop: the write happens in a thread."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(seal_block, make_key(number), data).result()
