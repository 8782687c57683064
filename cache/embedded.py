"""The body of a private server: `python -P -m cache.embedded ADDRESS`, started by `cache.private`.

It reads its settings, one line of standard input, binds, leaves its parent and says on standard output in one line how
that went. Binding comes before everything that takes time: of many that start at once all but one leave here, having
cost little. Their parents connect to the one that stayed.

It belongs to nobody (own session, adopted by init), because its users come and go in any order; what ends it is the end
of its last connection. Standard error is a pipe to the starter, for warnings. It never blocks: when nobody reads it any
more, or not fast enough, lines are lost and the server goes on.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys

from cache.address import listen
from cache.ending import end_process
from connectors.errors import BadInputError, DataError

__all__ = ["main"]

EXIT_FAILED = 1


def main() -> int:
    """Run the server; returns its exit status."""
    settings = json.loads(sys.stdin.readline())
    address = settings["address"]
    try:
        listener = listen(address)
    except BadInputError:
        _say({"state": "taken"})
        return 0
    except DataError as error:
        _say({"state": "failed", "kind": error.kind.value, "message": str(error)})
        return EXIT_FAILED
    if os.fork():
        os._exit(0)
    _detach()
    listener.listen(socket.SOMAXCONN)  # once more: clients are told the process that did it last
    # Imported only by the one that stays.
    from cache.config import CacheConfig
    from cache.memory_map import leave_dear_pages
    from cache.server import run_server

    leave_dear_pages()
    logging.basicConfig(level=settings["log_level"], format="%(name)s: %(message)s")
    logging.raiseExceptions = False  # a lost line is no reason to write more of them
    try:
        config = CacheConfig.from_json(settings["config"])
        run_server(config, listener, grace_s=settings["grace_s"], on_ready=lambda: _say({"state": "listening"}))
    except DataError as error:
        _say({"state": "failed", "kind": error.kind.value, "message": str(error)})
        return EXIT_FAILED
    return 0


def _detach() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.chdir("/")
    os.set_blocking(sys.stderr.fileno(), False)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), sys.stdin.fileno())


def _say(line: dict[str, str]) -> None:
    """Tell the starter how it went, once; it reads to the end of the pipe."""
    answer = json.dumps(line).encode() + b"\n"
    with open(os.devnull, "wb") as nothing:
        try:
            os.write(sys.stdout.fileno(), answer)
        except OSError:
            logging.getLogger(__name__).info("the starter is gone; serving whoever connects")
        os.dup2(nothing.fileno(), sys.stdout.fileno())


if __name__ == "__main__":
    end_process(main())
