"""The epoch that a thread reads samples for: what makes random transforms differ from epoch to epoch.

A loader sets it around each batch, in whatever process or thread the batch is made, so it needs no way through the
datasets that stand between the loader and a transform. Outside of a loader it is 0.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

__all__ = ["current_epoch", "reading_epoch"]


class _Now(threading.local):
    epoch = 0


_now = _Now()


def current_epoch() -> int:
    """Return the epoch that this thread reads for."""
    return _now.epoch


@contextlib.contextmanager
def reading_epoch(epoch: int) -> Iterator[None]:
    """Let this thread read for `epoch` inside the block."""
    before, _now.epoch = _now.epoch, epoch
    try:
        yield
    finally:
        _now.epoch = before
