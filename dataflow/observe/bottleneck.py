"""From seconds and counts to words: what a training loop waits for. Pure."""

from __future__ import annotations

from collections.abc import Mapping

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
# Sources of blocks that are in this machine's memory or on its disks.
_NEAR = ("direct", "in_place", "ring", "ram")


def name_bottleneck(seconds: Mapping[str, float], counts: Mapping[str, int]) -> str:
    """Say what limits a loop, and what would help.

    Args:
        seconds: By stage, as in `LoaderStats`.
        counts: As in `LoaderStats`; `bytes.<source>` says where blocks came from.
    """
    wait_s, model_s = seconds.get("wait", 0.0), seconds.get("model", 0.0)
    if wait_s + model_s <= 0:
        return "nothing: no batch was asked for yet"
    share = wait_s / (wait_s + model_s)
    if share < _LATE_SHARE:
        return f"the model: it waits for data {share:.0%} of the time"
    stages = {name: value for name, value in seconds.items() if name not in ("wait", "model") and value > 0}
    if not stages:
        return f"the loader: the model waits {share:.0%} of the time, for workers that have not made a batch yet"
    # The slowest stage of all workers together; a copy is made in the loop itself and counts as it is.
    slowest = max(stages, key=lambda name: stages[name])
    advice = _reading(counts) if slowest == "fetch" else _ADVICE.get(slowest, f"the stage {slowest!r} of the data set")
    return f"{advice} (the model waits {share:.0%} of the time, {slowest} is {_share(stages, slowest):.0%} of the work)"


def _reading(counts: Mapping[str, int]) -> str:
    sizes = {name.removeprefix("bytes."): size for name, size in counts.items() if name.startswith("bytes.")}
    if not sum(sizes.values()):
        return "reading samples: more workers, or a data set of whole blocks"
    source = max(sizes, key=lambda name: sizes[name])
    share = sizes[source] / sum(sizes.values())
    if source == "origin":
        return f"reading from the origin ({share:.0%} of the bytes): more cache, more bandwidth, or more workers"
    if source in _NEAR:
        return f"reading blocks that are here ({share:.0%} of the bytes from {source!r}): more workers, smaller blocks"
    return f"reading from the tier {source!r} ({share:.0%} of the bytes): a faster or larger tier above it"


def _share(stages: Mapping[str, float], name: str) -> float:
    return stages[name] / sum(stages.values())
