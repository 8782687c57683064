"""The C allocator of a server: freed memory stays for the next block."""

from __future__ import annotations

import ctypes

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

_KEPT_BYTES = 64 << 20
_LARGEST_BYTES = 32 << 20  # glibc takes no more
_ARENAS = 2


def keep_freed_memory() -> bool:
    """Let glibc keep up to 64 MiB in each of two arenas; False where the C library is another one.

    What arrives from an origin lies in memory for a moment only. By default glibc gives most of it back each time, and
    the kernel clears new pages for the next block, which takes as long as copying it. Arenas are few because each keeps
    its own.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    options = ((_M_ARENA_MAX, _ARENAS), (_M_MMAP_THRESHOLD, _LARGEST_BYTES), (_M_TRIM_THRESHOLD, _KEPT_BYTES))
    return all(mallopt(option, value) for option, value in options)
