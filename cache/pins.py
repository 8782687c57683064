"""What operators have pinned. Pure: knows no clock but the seconds it is told.

A pin is for all that lies at or below a URL, whether it is in the cache already or comes later, until it expires or is
taken back. It says how many bytes that is, so that pins which cannot be kept together are refused: the largest tier
could hold all of them, within the share of it that pins may take.

A set of pins has a generation, and every directory of the cache keeps a copy: at a start the newest one is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from cache.prefixes import fold, longest
from connectors.errors import BadInputError, NotFoundError

__all__ = ["MAX_PINS", "Pin", "PinSet", "Pins"]

MAX_PINS = 1024


@dataclass(frozen=True, slots=True)
class Pin:
    """One of them.

    Attributes:
        prefix: The URL, in its normal form.
        size_bytes: What lies there, as whoever pinned it said.
        expires_s: When it ends, in seconds of the wall clock; None: when it is taken back.
        uid: Who pinned it.
    """

    prefix: str
    size_bytes: int
    expires_s: float | None
    uid: int

    def ended(self, now_s: float) -> bool:
        """Say whether it holds nothing any more."""
        return self.expires_s is not None and self.expires_s <= now_s


@dataclass(frozen=True, slots=True)
class PinSet:
    """All pins at one time.

    Attributes:
        generation: Grows with each change.
        pins: By prefix.
    """

    generation: int = 0
    pins: tuple[Pin, ...] = ()


class Pins:
    """The pins of a cache.

    Attributes:
        current: What there is now.
    """

    def __init__(self) -> None:
        self._table: dict[str, Pin] = {}
        self.current = PinSet()

    def add(self, pin: Pin, *, limit_bytes: int, now_s: float) -> None:
        """Pin something, or pin it anew. What is refused changes nothing.

        Args:
            pin: Replaces one for the same prefix.
            limit_bytes: Most bytes of all pins.
            now_s: The time.

        Raises:
            BadInputError: It does not fit beside the others, would have ended already, or there are too many.
        """
        others = [other for other in self.current.pins if other.prefix != pin.prefix and not other.ended(now_s)]
        if pin.ended(now_s):
            raise BadInputError(f"a pin of {pin.prefix} that has ended already holds nothing")
        if len(others) >= MAX_PINS:
            raise BadInputError(f"there are {MAX_PINS} pins already; take back what nobody needs")
        taken_bytes = sum(other.size_bytes for other in others)
        if taken_bytes + pin.size_bytes > limit_bytes:
            raise BadInputError(
                f"{pin.prefix} has {pin.size_bytes} bytes and cannot be pinned: pins may take {limit_bytes} bytes, "
                f"{taken_bytes} are promised to {len(others)} others; unpin some of them, pin less, or enlarge a tier"
            )
        self._set(PinSet(self.current.generation + 1, (*others, pin)))

    def remove(self, prefix: str) -> None:
        """Take a pin back.

        Raises:
            NotFoundError: There is none for exactly this prefix.
        """
        others = tuple(pin for pin in self.current.pins if fold(pin.prefix) != fold(prefix))
        if len(others) == len(self.current.pins):
            raise NotFoundError(f"{prefix} is not pinned; the pins stand in the status", uri=prefix)
        self._set(replace(self.current, generation=self.current.generation + 1, pins=others))

    def expire(self, now_s: float) -> bool:
        """Let go of pins that have ended; say whether there were some."""
        left = tuple(pin for pin in self.current.pins if not pin.ended(now_s))
        if len(left) == len(self.current.pins):
            return False
        self._set(PinSet(self.current.generation + 1, left))
        return True

    def restore(self, found: PinSet, now_s: float) -> bool:
        """Take over what a directory has kept, if it is newer; say whether it was."""
        if found.generation <= self.current.generation:
            return False
        self._set(found)
        self.expire(now_s)
        return True

    def cover(self, uri: str) -> bool:
        """Say whether an object is pinned."""
        return longest(self._table, uri) is not None

    def __len__(self) -> int:
        return len(self._table)

    def stats(self) -> list[dict[str, Any]]:
        """Return the pins as plain values."""
        return [
            {"prefix": pin.prefix, "size_bytes": pin.size_bytes, "expires_unix_s": pin.expires_s, "uid": pin.uid}
            for pin in self.current.pins
        ]

    def _set(self, pins: PinSet) -> None:
        self.current = replace(pins, pins=tuple(sorted(pins.pins, key=lambda pin: pin.prefix)))
        self._table = {pin.prefix.rstrip("/"): pin for pin in pins.pins}
