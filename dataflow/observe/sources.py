"""Where blocks come from, by the names of `BlockData.source`: which of them are near. Pure."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["find_farthest", "is_near"]

# In this machine's memory, or on a disk of its own that is read in place.
_NEAR = ("direct", "in_place", "ring", "ram")


def is_near(source: str) -> bool:
    """Whether blocks of a source are in memory, or on a disk that is read in place; a tier on a disk is not near."""
    return source in _NEAR


def find_farthest(sources: Iterable[str]) -> str:
    """Return the source that a read of blocks from several of them waited for."""
    return max(sources, key=_distance)


def _distance(source: str) -> tuple[int, str]:
    return (2 if source == "origin" else 0 if is_near(source) else 1), source
