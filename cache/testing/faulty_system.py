"""System calls that fail or kill on demand."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

__all__ = ["FaultySystem"]


class FaultySystem:
    """Stands for the module `os` in a directory shelf.

    Args:
        before: Called with the name of each system call before it is made; what it raises (an `OSError` with an errno)
            is how the call fails, and it may kill the process. Called from several threads.
    """

    def __init__(self, before: Callable[[str], None]) -> None:
        self._before = before

    def __getattr__(self, name: str) -> Any:
        function = getattr(os, name)

        def call(*args: Any) -> Any:
            # A descriptor that could not be closed would be a leak of the test, not a fault of the disk.
            if name != "close":
                self._before(name)
            return function(*args)

        return call
