"""See what happens: where the seconds of a step went."""

from dataflow.observe.bottleneck import name_bottleneck
from dataflow.observe.stages import Recorder, count, stage

__all__ = ["Recorder", "count", "name_bottleneck", "stage"]
