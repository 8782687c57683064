"""Who used the time: stages and counters, recorded per thread and free when nobody listens.

    with Recorder() as recorder:
        with stage("fetch"):
            ...
    recorder.seconds["fetch"]

Stages nest: the time of an inner stage is taken out of the outer one, so their sum never exceeds the wall time.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from types import TracebackType

__all__ = ["Recorder", "count", "stage"]


class _Active(threading.local):
    recorder: Recorder | None = None


_active = _Active()


class Recorder:
    """Collects the stages and counts of the thread that entered it, until it is left.

    Attributes:
        seconds: Time spent per stage, without the stages inside it.
        counts: Sum of what was counted, by name.
        inner_s: Time of the finished stages inside the open one; the stages keep it.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.counts: defaultdict[str, int] = defaultdict(int)
        self.inner_s = 0.0
        self._outer: Recorder | None = None

    def __enter__(self) -> Recorder:
        self._outer = _active.recorder
        _active.recorder = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _active.recorder = self._outer


class stage:  # noqa: N801  reads as a statement: `with stage("fetch"):`
    """Account the time inside the block to `name`. Not reusable, not shared between threads.

    Attributes:
        name: May be changed inside the block, where only its end tells what the time went to.
    """

    __slots__ = ("_began_s", "_outer_inner_s", "_recorder", "name")

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> stage:
        recorder = self._recorder = _active.recorder
        if recorder is not None:
            self._outer_inner_s = recorder.inner_s
            recorder.inner_s = 0.0
            self._began_s = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        recorder = self._recorder
        if recorder is not None:
            elapsed_s = time.perf_counter() - self._began_s
            recorder.seconds[self.name] += elapsed_s - recorder.inner_s
            recorder.inner_s = self._outer_inner_s + elapsed_s


def count(name: str, n: int = 1) -> None:
    """Add `n` to the counter `name` of the active recorder, if there is one."""
    recorder = _active.recorder
    if recorder is not None:
        recorder.counts[name] += n
