"""Blocks in anonymous memory, one sealed memfd each. Whoever is killed, the kernel takes all of it back."""

from __future__ import annotations

import errno
import mmap
import os
import resource

from cache.handle import Block, Descriptor
from connectors.errors import BadInputError

__all__ = ["MemoryShelf", "raise_open_file_limit", "split_open_files"]

# Connections of readers and to stores, and a few hundred blocks, below which nothing works for long.
_LEAST_FILES = 512


class MemoryShelf:
    """See `cache.shelf.Shelf`. For the event loop's thread; nothing here waits."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, Block] = {}

    def cost_bytes(self, length: int) -> int:
        """Whole pages."""
        return -(-length // mmap.PAGESIZE) * mmap.PAGESIZE

    def write(self, block: Block) -> None:
        """Share the block's descriptor; nothing is copied."""
        self._blocks[block.key] = block

    def open(self, key: bytes, length: int) -> Descriptor:
        """Share the descriptor, which outlives the block's eviction."""
        return self.read(key, length).memory

    def read(self, key: bytes, length: int) -> Block:
        """Share the block."""
        block = self._blocks.get(key)
        if block is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), key.hex())
        return block

    def remove(self, key: bytes, length: int) -> None:
        """Forget the block; its memory is free when the last holder of the descriptor lets go."""
        self._blocks.pop(key, None)

    def close(self) -> None:
        """Forget all blocks."""
        self._blocks.clear()


def raise_open_file_limit() -> int:
    """Raise this process's soft limit on open files to the hard one and return it: every block in memory is a file.

    Raises:
        BadInputError: Not even a small cache can live with it.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < _LEAST_FILES:
        raise BadInputError(
            f"this process may have {hard} files open, and a cache needs {_LEAST_FILES} at least, one for each block "
            "in memory and each connection: raise the hard limit (ulimit -Hn)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else 1 << 20


def split_open_files(max_files: int) -> tuple[int, int]:
    """Return how many files may be blocks of memory shelves, and how many one request to a store may open at once.

    The rest is for files of directories, for sockets, and for blocks that readers hold after eviction: a quarter, and
    where that is less than 1024, up to a half.
    """
    return max_files - max(max_files // 4, min(max_files // 2, 1024)), max_files // 64
