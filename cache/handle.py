"""Open files that several holders share, and the handle that the engine gives out.

A block in memory is one sealed memfd. The tier, every reader and a placement under way hold the same `Descriptor`; the
file is closed when the last of them lets go, so eviction never breaks a reader and a hit costs no system call.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from cache.memory_map import map_memory, take_large_pages
from connectors.protocols import Buffer

__all__ = ["Block", "Descriptor", "Handle", "seal_block"]

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Descriptor:
    """Owner of one file descriptor, closed when the last reference to this object goes.

    Attributes:
        fd: The number, valid as long as this object is referenced.
    """

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # at the interpreter's end names go first
        close(self.fd)


@dataclass(frozen=True, slots=True)
class Block:
    """Verified bytes of one block on their way between origin and tiers: a sealed memfd without trailer."""

    key: bytes
    length: int
    memory: Descriptor

    def map(self) -> memoryview:
        """Return the bytes as a read-only view, which keeps its own hold on them."""
        return map_memory(self.memory.fd, self.length)


def seal_block(key: bytes, data: Buffer) -> Block:
    """Copy `data` (at least one byte) into a memfd that nobody can change, shrink or grow any more. It takes a while.

    Raises:
        OSError: No descriptor or no memory is left.
    """
    memory = Descriptor(os.memfd_create("block", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    with memoryview(data).cast("B") as view:
        take_large_pages(memory.fd, len(view))
        written = 0
        while written < len(view):
            written += os.write(memory.fd, view[written:])
        fcntl.fcntl(memory.fd, fcntl.F_ADD_SEALS, _SEALS)
        return Block(key, len(view), memory)


class Handle:
    """One found block: an open file whose first `length` bytes are the block. Close it, or leave its context.

    Attributes:
        fd: Descriptor to read, map or send; valid until `close`.
        length: Bytes of the block; a trailer may follow them in the file.
        source: `origin`, `ring` or the name of the tier.
        verify: The file lies on a disk: read it (a map of a failing disk is SIGBUS) and check it by the trailer
            (`cache.block.verify`), and tell the engine's `report_bad` when it is wrong.
    """

    __slots__ = ("_descriptor", "length", "source", "verify")

    def __init__(self, descriptor: Descriptor, length: int, source: str, *, verify: bool = False) -> None:
        self._descriptor: Descriptor | None = descriptor
        self.length = length
        self.source = source
        self.verify = verify

    @property
    def fd(self) -> int:
        """The descriptor; `ValueError` once closed."""
        if self._descriptor is None:
            raise ValueError("the handle is closed")
        return self._descriptor.fd

    def close(self) -> None:
        """Let go of the file; closing twice is harmless."""
        self._descriptor = None

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Handle(length={self.length}, source={self.source!r}, verify={self.verify})"
