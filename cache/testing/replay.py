"""A tier reduced to its policy, for replaying traces of accesses."""

from __future__ import annotations

from collections.abc import Iterable

from cache.policy import Policy

__all__ = ["Replay"]


class Replay:
    """Holds blocks as a tier does, without bytes.

    Attributes:
        blocks: Sizes by key.
        hits: Accesses that found their block.
        writes: Blocks let in.
    """

    def __init__(self, policy: Policy, capacity_bytes: int, capacity_blocks: int = 1 << 62) -> None:
        self.policy = policy
        self.capacity_bytes = capacity_bytes
        self.capacity_blocks = capacity_blocks
        self.blocks: dict[bytes, int] = {}
        self.hits = 0
        self.writes = 0
        self._used_bytes = 0

    def access(self, key: bytes, size_bytes: int = 1) -> bool:
        """Read one block, let it in if the policy likes, and return whether it was there."""
        if key in self.blocks:
            self.hits += 1
            self.policy.touch(key)
            return True
        victims = self.policy.admit(
            key,
            size_bytes,
            free_bytes=self.capacity_bytes - self._used_bytes,
            free_blocks=self.capacity_blocks - len(self.blocks),
        )
        if victims is not None:
            for victim in victims:
                self.policy.remove(victim)
                self._used_bytes -= self.blocks.pop(victim)
            self.policy.insert(key, size_bytes)
            self.blocks[key] = size_bytes
            self._used_bytes += size_bytes
            self.writes += 1
            assert self._used_bytes <= self.capacity_bytes
            assert len(self.blocks) <= self.capacity_blocks
        return False

    def access_all(self, keys: Iterable[bytes]) -> int:
        """Read many blocks of one byte; return how many were there."""
        return sum(self.access(key) for key in keys)
