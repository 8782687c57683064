"""Where the seconds of a training loop went, as the loader sees it."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dataflow.observe.bottleneck import name_bottleneck
from dataflow.observe.stages import Recorder

__all__ = ["LoaderStats", "Meter", "Percentiles"]

# In this order in every report, with the sources of blocks behind `fetch`; stages that a dataset names itself follow.
_WORKER_STAGES = ("decode", "transform", "collate")


# Steps whose times are kept one by one.
_NEWEST_STEPS = 4096


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of the seconds of steps; 0 where there was none."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Percentiles:
        """Return them: of each, the value that so many percent do not exceed."""
        ordered = sorted(values) or [0.0]
        return cls(*(ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] for percent in (50, 95, 99)))


@dataclass(frozen=True, slots=True)
class LoaderStats:
    """Sums since the loader was made, and percentiles of its newest steps.

    Attributes:
        batches: Batches handed to the caller, and errors raised in the place of one.
        samples: Samples that the sampler chose for them (0 for iterable datasets), also bad ones that were left out.
        seconds: By stage. `wait` is the time inside `next()` and `iter()`, `model` the time between two `next()` calls;
            together they are all of a loop over the loader. `fetch`, `decode`, `transform`, `collate` and `handover`
            are the time of the workers, summed over them, while the loop runs; without workers they are part of `wait`.
            A read of blocks counts for `fetch.origin`, `fetch.ram` and so on, by the farthest place that one of its
            blocks came from; other fetching counts for `fetch`. `transfer` is the time of the trainer for copies to a
            device, part of `wait`.
        counts: Blocks and bytes by source, workers replaced, and what datasets count.
        num_workers: Over how many processes or threads the workers' seconds are summed; 0 for the trainer itself.
        rank: Of this process in its job.
        wait_s: How long the newest 4,096 steps waited for their batch.
        step_s: How long they took, waiting and model.
        stage_s: How long each stage took of the newest batches that it was part of; batches that were handed over
            together count once, with their average.
    """

    batches: int
    samples: int
    seconds: dict[str, float]
    counts: dict[str, int]
    num_workers: int
    rank: int
    wait_s: Percentiles
    step_s: Percentiles
    stage_s: dict[str, Percentiles]

    @property
    def bottleneck(self) -> str:
        """What the loop waits for, and what would help, in words."""
        return name_bottleneck(self.seconds, self.counts)

    @property
    def progress_line(self) -> str:
        """How the loop fares, in one line."""
        wait_s, model_s = self.seconds["wait"], self.seconds["model"]
        whole_s = wait_s + model_s
        what = f"{self.samples:,} samples" if self.samples else f"{self.batches:,} batches"
        rate = (self.samples or self.batches) / whole_s if whole_s else 0.0
        return (
            f"rank {self.rank}: {self.batches:,} steps, {what} ({rate:,.0f}/s), waiting "
            f"{wait_s / whole_s if whole_s else 0:.0%}, step p50 {self.step_s.p50 * 1e3:.1f} ms "
            f"p99 {self.step_s.p99 * 1e3:.1f} ms, limited by {self.bottleneck}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return it all as JSON types."""
        return {
            "batches": self.batches,
            "samples": self.samples,
            "seconds": dict(self.seconds),
            "counts": dict(self.counts),
            "num_workers": self.num_workers,
            "rank": self.rank,
            "wait_s": asdict(self.wait_s),
            "step_s": asdict(self.step_s),
            "stage_s": {name: asdict(percentiles) for name, percentiles in self.stage_s.items()},
            "bottleneck": self.bottleneck,
        }


class Meter:
    """Adds up what `LoaderStats` reports, of all iterators of a loader.

    Where several threads iterate at a time, what their steps take is mixed up.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._counts: defaultdict[str, int] = defaultdict(int)
        self._stages: deque[dict[str, float]] = deque(maxlen=_NEWEST_STEPS)
        self._since_s = 0.0
        self._is_in_loop = False
        self._newest_wait_s = 0.0
        # Of whole steps: the wait for the batch, and the model's time after it.
        self._steps: deque[tuple[float, float]] = deque(maxlen=_NEWEST_STEPS)
        self.clear()

    def clear(self) -> None:
        """Forget what was added up."""
        self.batches = 0
        self.samples = 0
        self._seconds.clear()
        self._counts.clear()
        self._stages.clear()
        self._wait_s = 0.0
        self._model_s = 0.0
        self._newest_wait_s = 0.0
        self._steps.clear()

    def enter(self, *, begins: bool = False) -> None:
        """The caller asks for a batch, or (`begins`) for a new iterator; its time until then belonged to no loop."""
        now_s = time.perf_counter()
        if self._is_in_loop and not begins:
            model_s = now_s - self._since_s
            self._model_s += model_s
            self._steps.append((self._newest_wait_s, model_s))
        self._since_s = now_s

    def leave(self, *, in_loop: bool = True) -> None:
        """The caller goes on: with a batch, or (`in_loop=False`) without."""
        now_s = time.perf_counter()
        self._newest_wait_s = now_s - self._since_s
        self._wait_s += self._newest_wait_s
        self._since_s = now_s
        self._is_in_loop = in_loop

    def take(self, recorder: Recorder) -> None:
        """Take over what an iterator recorded of a step in this process, and let it begin anew."""
        if recorder.seconds or recorder.counts:
            self.add(recorder.seconds, recorder.counts, batches=1)
            recorder.seconds.clear()
            recorder.counts.clear()

    def add(self, seconds: Mapping[str, float], counts: Mapping[str, int], *, batches: int = 0) -> None:
        """Take over what was recorded while so many batches were made."""
        for name, value in seconds.items():
            self._seconds[name] += value
        for name, number in counts.items():
            self._counts[name] += number
        if batches:
            self._stages.append({name: value / batches for name, value in seconds.items()})

    def stats(self, num_workers: int, rank: int) -> LoaderStats:
        """Return the sums. May be called by any thread."""
        recorded = dict(self._seconds)
        reads = sorted(name for name in recorded if name.startswith("fetch."))
        stages = dict.fromkeys(("fetch", *reads, *_WORKER_STAGES), 0.0) | recorded
        seconds = {**stages, "wait": self._wait_s, "model": self._model_s}
        steps = list(self._steps)
        times: defaultdict[str, list[float]] = defaultdict(list)
        for made in list(self._stages):
            for name, value in made.items():
                times[name].append(value)
        return LoaderStats(
            batches=self.batches,
            samples=self.samples,
            seconds=seconds,
            counts=dict(self._counts),
            num_workers=num_workers,
            rank=rank,
            wait_s=Percentiles.of(wait_s for wait_s, _ in steps),
            step_s=Percentiles.of(wait_s + model_s for wait_s, model_s in steps),
            stage_s={name: Percentiles.of(values) for name, values in times.items()},
        )
