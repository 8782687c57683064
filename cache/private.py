"""Starting a private server: a process that serves everybody who knows its address and ends with the last of them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import time

from cache.config import CacheConfig
from cache.connection import ServerGoneError
from cache.handle import Descriptor
from connectors.errors import error_from_kind

__all__ = ["ServerLog", "start_server"]

_log = logging.getLogger(__name__)

GRACE_S = 30.0
"""A server that nobody has connected to for so long after its start ends again."""

_PIPE_BYTES = 64 * 1024
_LINE_CHARACTERS = 2000


class ServerLog:
    """What a server that this process started has to say. It waits in a pipe, 64 KiB at most, until somebody looks."""

    def __init__(self, descriptor: int) -> None:
        self._pipe: Descriptor | None = Descriptor(descriptor)
        os.set_blocking(descriptor, False)

    def read(self) -> str:
        """Return what has arrived since the last look."""
        pipe = self._pipe  # another thread may close the log meanwhile
        if pipe is None:
            return ""
        try:
            found = os.read(pipe.fd, _PIPE_BYTES)
        except BlockingIOError:
            return ""
        if not found:
            self.close()
        return found.decode(errors="replace")

    def drain(self) -> None:
        """Pass what has arrived to this process's own log."""
        for line in self.read().splitlines():
            _log.warning("private cache server: %s", line[:_LINE_CHARACTERS])

    def close(self) -> None:
        """Stop listening; further lines are lost."""
        self._pipe = None


def start_server(address: str, config: CacheConfig, *, timeout_s: float) -> ServerLog | None:
    """Start a server and wait until it answers at `address`. Returns None when another one has the address already.

    Raises:
        ServerGoneError: It did not come up in time, or died; what it said last is in the message.
        DataError: It refuses the configuration; kind and message are its own.
    """
    settings = {
        "address": address,
        "config": config.to_json(),
        "grace_s": GRACE_S,
        "log_level": max(logging.WARNING, _log.getEffectiveLevel()),
    }
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "cache.embedded", address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(),
            start_new_session=True,  # Ctrl-C is for the trainer, which may still read while it ends
        )
    except OSError as error:
        raise ServerGoneError(f"cannot start a private cache server: {error}") from error
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    log = ServerLog(os.dup(process.stderr.fileno()))
    with process:  # waits for it to end, which is soon: it only binds and forks
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(settings).encode() + b"\n")
                process.stdin.close()
            return _judge(_read_answer(process.stdout.fileno(), timeout_s), log, timeout_s)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and with it the server, which has left it by now
            log.close()
            raise


def _environment() -> dict[str, str]:
    """Let the child import the very packages that this process runs, however it found them.

    It multiplies no matrices: without threads for that, one a core, it starts sooner.
    """
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([root, path] if path else [root])
    return {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}


def _read_answer(descriptor: int, timeout_s: float) -> bytes | None:
    """Return the child's line, an empty one when it died, None when it took too long."""
    deadline_s = time.monotonic() + timeout_s
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    answer = b""
    while not answer.endswith(b"\n"):
        if not poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
            return None
        piece = os.read(descriptor, _PIPE_BYTES)
        if not piece:
            return b""
        answer += piece
    return answer


def _judge(answer: bytes | None, log: ServerLog, timeout_s: float) -> ServerLog | None:
    if answer is None:
        raise ServerGoneError(f"a private cache server did not answer within {timeout_s:g} s of its start")
    if not answer:
        said = log.read().strip()[-_LINE_CHARACTERS:]
        raise ServerGoneError(f"a private cache server died while it started; it said: {said or 'nothing'}")
    line = json.loads(answer)
    if line["state"] == "failed":
        raise error_from_kind(line["kind"], f"the private cache server cannot start: {line['message']}")
    if line["state"] == "taken":
        log.close()
        return None
    return log
