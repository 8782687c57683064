"""The main module of a conversion's worker process: `python -P -m dataflow.convert.worker DESCRIPTOR`."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

from dataflow.convert.workers import serve

__all__ = ["main"]


def main(descriptor: int, serve: Callable[[Connection], None]) -> None:
    """Serve the parent at the other end of `descriptor` until it asks to end, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # held back until now by who started it
    threading.Thread(target=_end_with_parent, args=(descriptor,), daemon=True).start()
    with Connection(descriptor) as connection:
        serve(connection)


def _end_with_parent(descriptor: int) -> None:
    """End at once when the parent is gone: a run that replaces it must not meet a shard written late."""
    hangup = select.poll()
    hangup.register(descriptor, select.POLLRDHUP)
    hangup.poll()
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), serve)
