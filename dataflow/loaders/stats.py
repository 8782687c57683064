"""Where the seconds of a training loop went, as the loader sees it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dataflow.observe.stages import Recorder

__all__ = ["LoaderStats", "Meter"]

# In this order in every report; stages that a dataset names itself follow.
_WORKER_STAGES = ("fetch", "decode", "transform", "collate")


@dataclass(frozen=True, slots=True)
class LoaderStats:
    """Sums since the loader was made.

    Attributes:
        batches: Batches handed to the caller.
        samples: Samples in them, where the sampler tells (0 for iterable datasets).
        seconds: By stage. `wait` is the time inside `next()` and `iter()`, `model` the time between two `next()` calls:
            together all of a loop over the loader. `fetch`, `decode`, `transform`, `collate` and `handover` are the
            time of the workers, summed over them and beside the other two; with no workers they happen inside `wait`
            and are part of it.
        counts: What was counted on the way: blocks and bytes by source, workers replaced.
        num_workers: Over how many processes or threads the workers' seconds are summed; 0 for the trainer itself.
    """

    batches: int
    samples: int
    seconds: dict[str, float]
    counts: dict[str, int]
    num_workers: int

    def as_dict(self) -> dict[str, Any]:
        """Return it all as JSON types."""
        return {
            "batches": self.batches,
            "samples": self.samples,
            "seconds": dict(self.seconds),
            "counts": dict(self.counts),
            "num_workers": self.num_workers,
        }


class Meter:
    """Adds up what `LoaderStats` reports. Used by the thread that iterates.

    Attributes:
        recorder: Stages and counts of all workers, or of this process where it makes the batches.
    """

    def __init__(self) -> None:
        self.batches = 0
        self.samples = 0
        self.recorder = Recorder()
        self._wait_s = 0.0
        self._model_s = 0.0
        self._since_s = 0.0
        self._is_in_loop = False

    def enter(self, *, begins: bool = False) -> None:
        """The caller asks for a batch, or (`begins`) for a new iterator; its time until then belonged to no loop."""
        now_s = time.perf_counter()
        if self._is_in_loop and not begins:
            self._model_s += now_s - self._since_s
        self._since_s = now_s

    def leave(self, *, in_loop: bool = True) -> None:
        """The caller goes on: with a batch, or (`in_loop=False`) without."""
        now_s = time.perf_counter()
        self._wait_s += now_s - self._since_s
        self._since_s = now_s
        self._is_in_loop = in_loop

    def add(self, seconds: Mapping[str, float], counts: Mapping[str, int]) -> None:
        """Take over what a worker recorded."""
        for name, value in seconds.items():
            self.recorder.seconds[name] += value
        for name, number in counts.items():
            self.recorder.counts[name] += number

    def stats(self, num_workers: int) -> LoaderStats:
        """Return the sums."""
        stages = dict.fromkeys(_WORKER_STAGES, 0.0) | self.recorder.seconds
        seconds = {**stages, "wait": self._wait_s, "model": self._model_s}
        return LoaderStats(self.batches, self.samples, seconds, dict(self.recorder.counts), num_workers)
