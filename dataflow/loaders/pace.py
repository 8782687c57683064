"""How many batches a worker makes before it hands them over.

What it costs to hand over small batches is mostly paid per message: two processes are woken, two pickles and two system
calls made. So batches that were asked for together travel together, as many as are made in a moment.
"""

from __future__ import annotations

__all__ = ["MAX_BATCHES", "PARCEL_BYTES", "PARCEL_S", "Pace"]

MAX_BATCHES = 32
# What the first of them waits for the last at most, as far as the past tells.
PARCEL_S = 0.005
# They share a slot, which one of them keeps from being used again.
PARCEL_BYTES = 8 << 20


class Pace:
    """The number, by what the last batches were like. Used by one thread.

    Attributes:
        batches: To be made before the next hand-over.
    """

    def __init__(self) -> None:
        self.batches = 1

    def made(self, batches: int, seconds: float, size_bytes: int) -> None:
        """So many batches took so long together, and so much memory."""
        by_time = PARCEL_S * batches / max(seconds, 1e-9)
        by_size = PARCEL_BYTES * batches / max(size_bytes, 1)
        self.batches = max(1, int(min(by_time, by_size, MAX_BATCHES)))
