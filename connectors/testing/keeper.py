"""Keep a server alive exactly as long as its user: `python -m connectors.testing.keeper FOLDER COMMAND...`.

A server that a test or a demo starts must not outlive it, also when that is killed by SIGKILL and can clean up
nothing. So this small process stands between: its standard input is a pipe that only the user holds open. When the
pipe closes, which the kernel sees to however the user ends, the server is killed and its folder removed. Should this
process be killed itself, the kernel kills the server (`PR_SET_PDEATHSIG`). That signal alone, set by the user, would
not do: it follows the thread that started the server, and setting it needs code between fork and exec, which is
unsafe in a process with threads.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

__all__ = ["keep"]

_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def keep(folder: str, command: Sequence[str]) -> int:
    """Run `command` until it ends or standard input does; then kill it, remove `folder` and return its exit status."""
    # Ctrl-C and a signal to the whole group reach the user too, who closes the pipe when ready.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)

    def kill_at_end_of_input() -> None:
        while os.read(0, 4096):  # not sys.stdin: its lock, held here, would break the end of the interpreter
            pass
        server.kill()

    threading.Thread(target=kill_at_end_of_input, daemon=True).start()
    status = server.wait()
    shutil.rmtree(folder, ignore_errors=True)
    return status


if __name__ == "__main__":
    sys.exit(keep(sys.argv[1], sys.argv[2:]))
