"""Datasets that show what a loader does with them, for tests of loaders; importable in spawned workers."""

from dataflow.loaders.testing.datasets import (
    Counter,
    Draws,
    Failing,
    Hanging,
    HangsOnce,
    Noisy,
    Numbers,
    Point,
    Records,
    Stream,
    WholeBatches,
    WorkerReport,
)
from dataflow.loaders.testing.processes import children, dies_within, slot_mappings

__all__ = [
    "Counter",
    "Draws",
    "Failing",
    "Hanging",
    "HangsOnce",
    "Noisy",
    "Numbers",
    "Point",
    "Records",
    "Stream",
    "WholeBatches",
    "WorkerReport",
    "children",
    "dies_within",
    "slot_mappings",
]
