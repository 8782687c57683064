"""The policy that fits what is observed, and another one when that changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cache.policy.detect import Pattern
from cache.policy.drop_behind import DropBehind
from cache.policy.kept_set import KeptSet
from cache.policy.protocol import Policy
from cache.policy.s3_fifo import S3Fifo

__all__ = ["Auto", "suited"]


def suited(pattern: Pattern) -> type[KeptSet] | type[S3Fifo] | type[DropBehind] | None:
    """Return the policy for a pattern; None to stay with what there is."""
    if pattern.reuse == "skewed":
        return S3Fifo
    if pattern.reuse == "epochs":
        return KeptSet
    if pattern.reuse == "once" and pattern.order in ("sequential", "strided"):
        return DropBehind
    return None


class Auto:
    """See `cache.policy.Policy`: begins with the kept set and hands its blocks over whenever another one suits better.

    Args:
        pattern: What the stream looks like; asked once in `every` insertions and hits.
        every: See there.
    """

    def __init__(self, pattern: Callable[[], Pattern], *, every: int = 1024) -> None:
        self._pattern = pattern
        self._every = every
        self._events = 0
        self._sizes: dict[bytes, int] = {}
        self._current: Policy = KeptSet()

    @property
    def current(self) -> Policy:
        """The policy in use."""
        return self._current

    def admit(self, key: bytes, size_bytes: int, *, free_bytes: int, free_blocks: int) -> list[bytes] | None:
        """As the policy in use."""
        return self._current.admit(key, size_bytes, free_bytes=free_bytes, free_blocks=free_blocks)

    def insert(self, key: bytes, size_bytes: int) -> None:
        """See `Policy.insert`."""
        self._sizes[key] = size_bytes
        self._current.insert(key, size_bytes)
        self._look()

    def touch(self, key: bytes) -> None:
        """See `Policy.touch`."""
        self._current.touch(key)
        self._look()

    def remove(self, key: bytes) -> None:
        """See `Policy.remove`."""
        self._sizes.pop(key, None)
        self._current.remove(key)

    def leaving(self) -> Iterator[bytes]:
        """See `Policy.leaving`."""
        return self._current.leaving()

    def _look(self) -> None:
        self._events += 1
        if self._events % self._every:
            return
        better = suited(self._pattern())
        if better is not None and not isinstance(self._current, better):
            self._current = better()
            for key, size_bytes in self._sizes.items():
                self._current.insert(key, size_bytes)
