"""The end of a process that was a server and nothing else."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import NoReturn

__all__ = ["end_process"]


def end_process(status: int) -> NoReturn:
    """End this process without taking its interpreter down; everything that matters has been closed.

    A thread of a store's native client may still be on its way out of a request that was given up, and one of a disk
    may never come back. The interpreter would end the first where it wants to go on in Python, which native runtimes
    answer with SIGABRT, and wait for the second.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(status)
