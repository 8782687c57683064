"""The blocks to give up for a newcomer, out of those that a policy would give up first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

__all__ = ["first_enough"]


def first_enough(
    candidates: Iterable[bytes], sizes: Mapping[bytes, int], size_bytes: int, *, free_bytes: int, free_blocks: int
) -> list[bytes] | None:
    """Return the first candidates, as few as make room for a block; None where all of them do not.

    Args:
        candidates: Blocks, the one to give up first at the front; no more of them are looked at than needed.
        sizes: What each takes on the medium.
        size_bytes: What the newcomer takes.
        free_bytes: Room before any of them leaves.
        free_blocks: How many more blocks may come before any of them leaves.
    """
    victims: list[bytes] = []
    remaining = iter(candidates)
    while size_bytes > free_bytes or free_blocks < 1:
        victim = next(remaining, None)
        if victim is None:
            return None
        victims.append(victim)
        free_bytes += sizes[victim]
        free_blocks += 1
    return victims
