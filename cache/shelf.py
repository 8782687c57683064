"""What a tier asks of the place where its blocks lie. Two places: `memory_shelf` and `directory_shelf`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from cache.handle import Block, Descriptor
from connectors.errors import CorruptError

__all__ = ["Shelf", "open_each"]


class Shelf(Protocol):
    """Holds blocks under their keys. Knows no limits and no order: those are the tier's.

    The methods block. Those of memory take microseconds and are called on the event loop; those of a directory are
    called in threads. For one key, `write` and `remove` never run at the same time; `open` may meet either.
    """

    def cost_bytes(self, length: int) -> int:
        """Return what a block of `length` bytes takes on the medium. Pure."""
        ...

    def write(self, block: Block) -> None:
        """Hold the block, whole or not at all. `OSError` leaves nothing behind, except for `LeftBehindError`."""
        ...

    def open(self, key: bytes, length: int) -> Descriptor:
        """Return an open file that begins with the block; `OSError` or `CorruptError` where that cannot be."""
        ...

    def read(self, key: bytes, length: int) -> Block:
        """Return the block as verified memory; errors as `open`."""
        ...

    def remove(self, key: bytes, length: int) -> None:
        """Give its space back; a missing block is as good as removed. `OSError` where the space stays taken."""
        ...

    def close(self) -> None:
        """Let go of the place."""
        ...


def open_each(
    shelf: Shelf, wanted: Iterable[tuple[bytes, int]], progress: Callable[[], None]
) -> list[Descriptor | OSError | CorruptError]:
    """Open blocks, calling `progress` after each; where one cannot be opened, the error stands in its place."""
    found: list[Descriptor | OSError | CorruptError] = []
    for key, length in wanted:
        try:
            found.append(shelf.open(key, length))
        except (OSError, CorruptError) as error:
            found.append(error)
        progress()
    return found
