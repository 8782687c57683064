"""Memory files in large pages, and maps of them.

A page of 2 MiB is mapped, looked up and unmapped at the price of one of 4 KiB, and filled at no higher price, so a
reader of 4 MiB pays for two pages where it paid for a thousand. The kernel gives large pages to a file only on request
(MADV_COLLAPSE, Linux 6.1), and only to ranges that already have a page; where it refuses, small ones do.

A virtual machine may give its free memory back to its host, nothing smaller than a large page. Then each one that is
taken has to come from the host again, which costs as much as its readers save in a dozen epochs: little for a daemon,
too much for the server of one job, which does without while that is so (`leave_dear_pages`).
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import time
from collections.abc import Callable

import numpy as np

__all__ = ["LARGE_PAGE_BYTES", "leave_dear_pages", "map_memory", "take_large_pages"]

LARGE_PAGE_BYTES = 2 << 20

_MADV_COLLAPSE = 25
_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value
# A kernel that looked for large pages in vain has worked hard for it, and so has one that found them dear: so many
# blocks go without before the next try.
_PAUSE_BLOCKS = 256
# CPU seconds: one from memory at hand takes 0.6 ms, one from a host 6.
_DEAR_PAGE_S = 0.002

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

# Of the calling thread, so that what others do meanwhile is not counted.
_cpu_s = time.thread_time
# Of this process. Threads that count at once may count wrong, which only moves the next try.
_paused_blocks = 0
_max_page_s = math.inf


def leave_dear_pages() -> None:
    """From now on this process takes large pages only where they are cheap; it looks again now and then."""
    global _max_page_s
    _max_page_s = _DEAR_PAGE_S


def take_large_pages(fd: int, length: int) -> None:
    """Let an empty memfd that will hold `length` bytes have large pages, as far as they fill some. May wait for memory.

    What is not written afterwards is zeros, and the file may be as long as `length` already.

    Raises:
        OSError: No memory is left even for small ones.
    """
    global _paused_blocks
    whole = length // LARGE_PAGE_BYTES * LARGE_PAGE_BYTES
    if not whole:
        return
    if _paused_blocks:
        _paused_blocks -= 1
        return
    began_s = _cpu_s()
    for begin in range(0, whole, LARGE_PAGE_BYTES):
        os.pwrite(fd, b"\0", begin)
    os.truncate(fd, whole)
    address = _map(fd, whole, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED)
    refused = _libc.madvise(address, whole, _MADV_COLLAPSE)
    if refused or (_cpu_s() - began_s) * LARGE_PAGE_BYTES > _max_page_s * whole:
        _paused_blocks = _PAUSE_BLOCKS
    _libc.munmap(address, whole)


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
        self._address: int | None = None
        # Private: older kernels refuse a shared map of a memfd that is sealed against writing.
        address = self._address = _map(fd, length, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_POPULATE)
        # https://numpy.org/doc/stable/reference/arrays.interface.html; True: read-only
        self.__array_interface__ = {"shape": (length,), "typestr": "|u1", "data": (address, True), "version": 3}

    def __del__(self, unmap: Callable[[int, int], int] = _libc.munmap) -> None:
        if self._address is not None:
            unmap(self._address, self._length)


def _map(fd: int, length: int, protection: int, flags: int) -> int:
    """Map the file's first bytes at an address where large pages can be."""
    if length < LARGE_PAGE_BYTES:
        return _call_mmap(None, length, protection, flags, fd)
    # Room for an address at which a large page begins; what it leaves over on both sides goes back.
    size_bytes = -(-length // mmap.PAGESIZE) * mmap.PAGESIZE
    begin = _call_mmap(None, size_bytes + LARGE_PAGE_BYTES, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    address = -(-begin // LARGE_PAGE_BYTES) * LARGE_PAGE_BYTES
    before = address - begin
    if before:
        _libc.munmap(begin, before)
    _libc.munmap(address + size_bytes, LARGE_PAGE_BYTES - before)
    try:
        return _call_mmap(address, length, protection, flags | _MAP_FIXED, fd)
    except OSError:
        _libc.munmap(address, size_bytes)
        raise


def _call_mmap(address: int | None, length: int, protection: int, flags: int, fd: int) -> int:
    found: int = _libc.mmap(address, length, protection, flags, fd, 0)
    if found == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), f"cannot map {length} bytes: {os.strerror(ctypes.get_errno())}")
    return found
