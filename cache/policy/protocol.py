"""What a tier asks of a policy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

__all__ = ["Policy"]


class Policy(Protocol):
    """Knows the blocks that a tier holds or is taking in, and chooses among them. Sizes are bytes on the medium."""

    def admit(self, key: bytes, size_bytes: int, *, free_bytes: int, free_blocks: int) -> list[bytes] | None:
        """Say whether to let a block in that the tier does not hold, and at whose cost. Changes nothing.

        Returns:
            The blocks to evict, together with `free_bytes` and `free_blocks` enough for it; None to turn it away.
        """
        ...

    def insert(self, key: bytes, size_bytes: int) -> None:
        """Take note of a block that was let in."""
        ...

    def touch(self, key: bytes) -> None:
        """Take note of a hit; an unknown key (a block that is just leaving) is ignored."""
        ...

    def remove(self, key: bytes) -> None:
        """Forget a block; an unknown key is ignored."""
        ...

    def leaving(self) -> Iterator[bytes]:
        """Go through the blocks, beginning with those to give up first. Changes nothing."""
        ...
