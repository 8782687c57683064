"""A worker's end when its trainer has died, however that was.

A thread sleeps until the trainer is dead and then ends the process after a short grace, also in the middle of a user's
endless loop. Where a fork server has started the worker, a trainer that was killed leaves the server's socket in a
temporary folder, which nobody else removes: the workers do.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from multiprocessing import forkserver

__all__ = ["Lifeline"]

_GRACE_S = 1.0
# How long after the end of its channels a dead trainer may take to count as dead.
_DYING_S = 0.1


class Lifeline:
    """Ends this process as soon as the trainer has ended.

    Args:
        trainer_pid: The trainer.
    """

    def __init__(self, trainer_pid: int) -> None:
        self._watch: threading.Thread | None = None
        self._socket = _server_socket() if os.getppid() != trainer_pid else None
        try:
            trainer = os.pidfd_open(trainer_pid)
        except ProcessLookupError:
            os._exit(0)
        except OSError:  # a kernel or sandbox without pidfd: an end of file on the channel has to do
            return
        self._watch = threading.Thread(target=self._wait, args=(trainer,), name="dataflow-trainer-watch", daemon=True)
        self._watch.start()

    def let_go(self) -> None:
        """The worker leaves by itself; if that is because the trainer is dead, it tidies up after it."""
        if self._watch is not None and self._socket is not None:
            self._watch.join(_DYING_S)

    def _wait(self, trainer: int) -> None:
        poll = select.poll()
        poll.register(trainer, select.POLLIN)
        poll.poll()
        if self._socket is not None:
            with contextlib.suppress(OSError):  # another worker was first
                os.unlink(self._socket)
                os.rmdir(os.path.dirname(self._socket))
        time.sleep(_GRACE_S)  # an idle worker sees the end of file meanwhile and leaves in order
        os._exit(1)


def _server_socket() -> str | None:
    """Return where the fork server that started this process listens."""
    address = getattr(getattr(forkserver, "_forkserver", None), "_forkserver_address", None)
    return address if isinstance(address, str) and os.path.isabs(address) else None
