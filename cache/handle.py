"""Open files that several holders share, and the handle that the engine gives out.

A block in memory is one sealed memfd. The tier, every reader and a placement under way hold the same `Descriptor`; the
file is closed when the last of them lets go, so eviction never breaks a reader and a hit costs no system call.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from connectors.protocols import Buffer

__all__ = ["Block", "Descriptor", "Handle", "map_memory", "seal_block"]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FAILED = ctypes.c_void_p(-1).value

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Descriptor:
    """Owner of one file descriptor, closed when the last reference to this object goes.

    Attributes:
        fd: The number, valid as long as this object is referenced.
    """

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


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
    """Copy `data` (at least one byte) into a memfd that nobody can change, shrink or grow any more.

    Raises:
        OSError: No descriptor or no memory is left.
    """
    memory = Descriptor(os.memfd_create("block", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    with memoryview(data).cast("B") as view:
        written = 0
        while written < len(view):
            written += os.write(memory.fd, view[written:])
        fcntl.fcntl(memory.fd, fcntl.F_ADD_SEALS, _SEALS)
        return Block(key, len(view), memory)


def map_memory(fd: int, length: int) -> memoryview:
    """Map a block's memfd, read-only. The map keeps no descriptor, unlike `mmap.mmap`, and ends with its last view.

    All pages are there at once: touched one by one they cost more, and a file system that copies from memory which is
    not there yet falls back to single pages (on ext4 four times the CPU).

    Raises:
        OSError: No address space or no further map is left.
        ValueError: The file is shorter.
    """
    size_bytes = os.fstat(fd).st_size
    if size_bytes < length:
        raise ValueError(f"a block of {length} bytes is said to be in a file of {size_bytes}")
    return np.asarray(_Map(fd, length)).data


class _Map:
    """Owner of mapped pages. Arrays and views made of it keep it."""

    def __init__(self, fd: int, length: int) -> None:
        self._length = length
        # Private: older kernels refuse a shared map of a memfd that is sealed against writing.
        flags = mmap.MAP_PRIVATE | mmap.MAP_POPULATE
        self._address: int | None = None
        address = _libc.mmap(None, length, mmap.PROT_READ, flags, fd, 0)
        if address == _MAP_FAILED:
            raise OSError(ctypes.get_errno(), f"cannot map {length} bytes: {os.strerror(ctypes.get_errno())}")
        self._address = address
        # https://numpy.org/doc/stable/reference/arrays.interface.html; True: read-only
        self.__array_interface__ = {"shape": (length,), "typestr": "|u1", "data": (address, True), "version": 3}

    def __del__(self, unmap: Callable[[int, int], int] = _libc.munmap) -> None:
        if self._address is not None:
            unmap(self._address, self._length)


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
