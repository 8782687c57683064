"""Waiting for what another task or thread brings about."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

__all__ = ["until"]

_POLL_S = 0.002


async def until(condition: Callable[[], bool], *, timeout_s: float = 30.0) -> None:
    """Return once `condition` holds; `AssertionError` after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come about"
        await asyncio.sleep(_POLL_S)
