"""What kind of access a stream is, from the stream alone.

Two questions, since they are answered by different things: in which order blocks come (compared with the last one of
the same object), and how often each comes (counts of a sample of the keys).

Every block once an epoch, also by several readers, gives counts that are nearly the same; favourites give counts that
are not. The measure is the squared coefficient of variation, variance / mean^2: at most 1/4 in the middle of a second
epoch and less in each later one, 1/mean for choices with replacement, far above 1 for a Zipf law.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal, TypeAlias

from cache.keys import KEY_BYTES, BlockRef

__all__ = ["Detector", "OrderKind", "Pattern", "ReuseKind"]

OrderKind: TypeAlias = Literal["unknown", "random", "sequential", "strided"]
ReuseKind: TypeAlias = Literal["unknown", "once", "epochs", "skewed"]

_ENOUGH = 64
_MAX_SAMPLED = 4096
_MAX_OBJECTS = 256
_MOSTLY = 0.8
# Old steps count less and less: the half-life is about 180 blocks.
_MEMORY = 1 - 1 / 256
_MAX_MEAN = 16.0
_SKEWED = 1.0


@dataclass(frozen=True, slots=True)
class Pattern:
    """What a stream looks like.

    Attributes:
        order: `sequential` (each block begins where the last one ended), `strided` (equal steps), else `random`.
        reuse: `once` so far, `epochs` (all about equally often) or `skewed` (few of them again and again).
    """

    order: OrderKind = "unknown"
    reuse: ReuseKind = "unknown"


class Detector:
    """Watches a stream of blocks. Memory is bounded: a few thousand keys, however many there are."""

    def __init__(self) -> None:
        self._observed = 0
        # Per object: the last offset, its end, and the step that led there.
        self._last: OrderedDict[str, tuple[int, int, int]] = OrderedDict()
        self._weight = self._sequential = self._strided = 0.0
        self._counts: dict[bytes, int] = {}
        self._total = 0
        # Keys below this are sampled; halved when there are too many.
        self._limit = 1 << (8 * KEY_BYTES)

    def observe(self, key: bytes, ref: BlockRef) -> None:
        """Take note of a block that was asked for."""
        self._observed += 1
        last = self._last.get(ref.uri)
        if last is not None:
            offset, end, step = last
            self._weight = self._weight * _MEMORY + 1
            self._sequential = self._sequential * _MEMORY + (ref.offset == end)
            self._strided = self._strided * _MEMORY + (ref.offset - offset == step != 0)
            self._last.move_to_end(ref.uri)
            self._last[ref.uri] = (ref.offset, ref.offset + ref.length, ref.offset - offset)
        else:
            self._last[ref.uri] = (ref.offset, ref.offset + ref.length, 0)
            if len(self._last) > _MAX_OBJECTS:
                self._last.popitem(last=False)
        self._count(key)

    def pattern(self) -> Pattern:
        """Say what the stream looks like by now."""
        return Pattern(self._order(), self._reuse())

    def _count(self, key: bytes) -> None:
        if int.from_bytes(key, "big") >= self._limit:
            return
        self._counts[key] = self._counts.get(key, 0) + 1
        self._total += 1
        if len(self._counts) > _MAX_SAMPLED:
            self._limit >>= 1
            self._recount({k: n for k, n in self._counts.items() if int.from_bytes(k, "big") < self._limit})
        elif self._total > _MAX_MEAN * max(_ENOUGH, len(self._counts)):
            # Halved, so that what was long ago fades.
            self._recount({k: n // 2 for k, n in self._counts.items() if n > 1})

    def _recount(self, counts: dict[bytes, int]) -> None:
        self._counts = counts
        self._total = sum(counts.values())

    def _order(self) -> OrderKind:
        if self._observed < _ENOUGH:
            return "unknown"
        if self._weight >= 1:
            if self._sequential > _MOSTLY * self._weight:
                return "sequential"
            if self._strided > _MOSTLY * self._weight:
                return "strided"
        return "random"

    def _reuse(self) -> ReuseKind:
        distinct = len(self._counts)
        if self._total < _ENOUGH or not distinct:
            return "unknown"
        mean = self._total / distinct
        if mean < 1.05:
            return "once"
        variance = sum((count - mean) ** 2 for count in self._counts.values()) / distinct
        if variance > _SKEWED * mean * mean:
            return "skewed"
        return "epochs" if mean >= 1.5 else "unknown"
