"""Which blocks have been verified, known to a process and all that it forks.

The workers of one loader need the same blocks, and at the same time. So a block is claimed before it is verified: who
finds it claimed looks after others first, and verifies it only where nobody else has done so by then. By itself each of
W workers would verify all of them.

A table of hashes in anonymous shared memory, eight to a line, without a lock. A hash is written by one store; what is
lost where two write to one place, or a line is full, is verified again, and so is what was claimed by a process that
died. Nothing is wrongly taken for verified but by a collision of 63 bits.
"""

from __future__ import annotations

import mmap
from collections.abc import Hashable

__all__ = ["VerifiedBlocks"]

_LINE = 8
_HASH_BYTES = 8
_ALL_BITS = (1 << 64) - 1
# The lowest bit says that a block has been verified, and not only claimed.
_VERIFIED = 1


class VerifiedBlocks:
    """A set of blocks that forgets some of them when it is full. Thread-safe; shared with forked children.

    Args:
        num_blocks: How many it has room for, a multiple of 8. Memory is taken as it fills, 8 bytes a block.
    """

    def __init__(self, num_blocks: int = 1 << 20) -> None:
        self._num_lines = num_blocks // _LINE
        self._hashes = memoryview(mmap.mmap(-1, num_blocks * _HASH_BYTES)).cast("Q")

    def __contains__(self, block: Hashable) -> bool:
        value, _, line = self._line_of(block)
        return value | _VERIFIED in line

    def claim(self, block: Hashable) -> bool:
        """Say whether the caller is the first who is about to verify the block. Two at once may both be told so."""
        value, start, line = self._line_of(block)
        if value in line or value | _VERIFIED in line:
            return False
        self._write(value, value, start, line)
        return True

    def add(self, block: Hashable) -> None:
        """Note a block that has been verified; where its line is full, in place of another."""
        value, start, line = self._line_of(block)
        self._write(value, value | _VERIFIED, start, line)

    def _line_of(self, block: Hashable) -> tuple[int, int, list[int]]:
        """Return the block's hash, the same in forked children and never 0, where its line begins, and the line."""
        value = hash(block) & _ALL_BITS & ~_VERIFIED or _VERIFIED << 1
        start = (value >> 8) % self._num_lines * _LINE
        return value, start, self._hashes[start : start + _LINE].tolist()

    def _write(self, value: int, entry: int, start: int, line: list[int]) -> None:
        for known in (value, value | _VERIFIED, 0):
            if known in line:
                self._hashes[start + line.index(known)] = entry
                return
        self._hashes[start + (value >> 1) % _LINE] = entry
