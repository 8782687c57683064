"""From seconds and counts to words: what a training loop waits for. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from dataflow.observe.sources import is_near

__all__ = ["name_bottleneck"]

# A loop that waits for less of its time than this is as fast as its model.
_LATE_SHARE = 0.05
_ADVICE = {
    "decode": "decoding: more workers, or data that is stored closer to how it is used",
    "transform": "the transforms: more workers, or less work for each sample",
    "collate": "making batches of samples: a dataset that reads whole batches, or more workers",
    "handover": "handing batches over: worker threads, or smaller samples",
    "transfer": "copying to the device: pinned memory, or smaller samples",
}


def name_bottleneck(seconds: Mapping[str, float], counts: Mapping[str, int]) -> str:
    """Say what limits a loop, and what would help.

    Args:
        seconds: By stage, as in `LoaderStats`; `fetch.<source>` says what was waited for.
        counts: As in `LoaderStats`; `bytes.<source>` says where blocks came from.
    """
    wait_s, model_s = seconds.get("wait", 0.0), seconds.get("model", 0.0)
    if wait_s + model_s <= 0:
        return "nothing: no batch was asked for yet"
    share = wait_s / (wait_s + model_s)
    if share < _LATE_SHARE:
        return f"the model: it waits for data {share:.0%} of the time"
    stages: defaultdict[str, float] = defaultdict(float)
    reads: dict[str, float] = {}
    for name, value in seconds.items():
        if name not in ("wait", "model") and value > 0:
            what, _, source = name.partition(".")
            stages[what if what == "fetch" else name] += value
            if what == "fetch":
                reads[source] = value
    if not stages:
        return f"the loader: the model waits {share:.0%} of the time, for workers that have not made a batch yet"
    # The slowest stage of all workers together; a copy is made in the loop itself and counts as it is.
    slowest = max(stages, key=lambda name: stages[name])
    advice = (
        _reading(reads, counts) if slowest == "fetch" else _ADVICE.get(slowest, f"the stage {slowest!r} of the dataset")
    )
    return f"{advice} (the model waits {share:.0%} of the time, {slowest} is {_share(stages, slowest):.0%} of the work)"


def _reading(reads: Mapping[str, float], counts: Mapping[str, int]) -> str:
    """Say what reading waits for; `reads` is by source, and "" what no source accounts for."""
    source = max(reads, key=lambda name: reads[name])
    if not source:
        return "reading samples: more workers, or a dataset of whole blocks"
    sizes = {name: size for name, size in counts.items() if name.startswith("bytes.")}
    size = sizes.get(f"bytes.{source}", 0) / max(1, sum(sizes.values()))
    how_much = f"{_share(reads, source):.0%} of the time of reading, {size:.0%} of the bytes"
    if source == "origin":
        return f"reading from the origin ({how_much}): more cache, more bandwidth, or more workers"
    if is_near(source):
        return f"reading blocks that are here, from {source!r} ({how_much}): more workers, smaller blocks"
    return f"reading from the tier {source!r} ({how_much}): a faster or larger tier above it"


def _share(seconds: Mapping[str, float], name: str) -> float:
    return seconds[name] / sum(seconds.values())
