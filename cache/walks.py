"""Walks through objects, found in a stream of reads alone: one block behind the other, or in equal steps. Pure.

    reads of an object:   0  1  2  3  4 ...        sequential
                          0  8 16 24 32 ...        strided

Each read either continues a walk of its object or may be the first step of two: one that goes on behind it, and one
that repeats the step from the read before. A walk counts from its fourth equal step on, so that reads in random order
hardly ever look like one. Several readers who go from neighbour to neighbour in one object are told apart.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Literal

from cache.keys import BlockRef

__all__ = ["Object", "Walk", "Walks"]

_MAX_OBJECTS = 256
_MAX_WALKS = 8
_ENOUGH = 4


@dataclass(eq=False, slots=True)
class Walk:
    """One reader's way through an object.

    Attributes:
        kind: Whether blocks are neighbours.
        ref: The block that was read last.
        step: From one offset to the next.
        seen: How many steps of it were seen.
    """

    kind: Literal["sequential", "strided"]
    ref: BlockRef
    step: int
    seen: int = 0

    @property
    def counts(self) -> bool:
        """Whether it is no coincidence."""
        return self.seen >= _ENOUGH

    def ahead(self, count: int, size_bytes: int) -> list[BlockRef]:
        """Return the next blocks, as far as the object of `size_bytes` goes; the last one may be short."""
        ref = self.ref
        offsets = range(ref.offset + self.step, min(size_bytes, ref.offset + self.step * count + 1), self.step)
        return [BlockRef(ref.uri, ref.version, offset, min(ref.length, size_bytes - offset)) for offset in offsets]


@dataclass(eq=False, slots=True)
class Object:
    """One version of an object that is being read.

    Attributes:
        version: See `BlockRef`.
        last: Offset of the newest read.
        walks: Those that may go on, the one that went on last at the end.
    """

    version: str
    last: int | None = None
    walks: list[Walk] = field(default_factory=list)


class Walks:
    """All walks that may go on. Bounded: the objects and walks not heard of for longest are forgotten.

    Attributes:
        ended: Walks that counted and were forgotten; taken by the caller.
    """

    def __init__(self) -> None:
        self.ended: list[Walk] = []
        self._objects: OrderedDict[str, Object] = OrderedDict()

    def observe(self, ref: BlockRef) -> Walk | None:
        """Take note of a read; return the walk that it continues, if that counts."""
        known = self._objects.get(ref.uri)
        if known is None or known.version != ref.version:
            if known is not None:
                self._forget(known.walks)
            known = self._objects[ref.uri] = Object(ref.version)
        self._objects.move_to_end(ref.uri)
        if len(self._objects) > _MAX_OBJECTS:
            self._forget(self._objects.popitem(last=False)[1].walks)
        last, known.last = known.last, ref.offset
        for walk in reversed(known.walks):
            if walk.ref.offset + walk.step == ref.offset:
                walk.ref, walk.seen = ref, walk.seen + 1
                known.walks.remove(walk)
                known.walks.append(walk)
                return walk if walk.counts else None
        known.walks.append(Walk("sequential", ref, ref.length))
        if last is not None and ref.offset > last and ref.offset - last != ref.length:
            known.walks.append(Walk("strided", ref, ref.offset - last, 1))
        while len(known.walks) > _MAX_WALKS:
            self._forget([known.walks.pop(0)])
        return None

    def _forget(self, walks: list[Walk]) -> None:
        self.ended += [walk for walk in walks if walk.counts]
