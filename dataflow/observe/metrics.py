"""What a loader reports, for Prometheus: `REGISTRY.register(LoaderCollector(loader.stats))`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

try:
    from prometheus_client import Metric
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.registry import Collector
except ImportError as missing:
    raise ImportError("metrics need prometheus-client: pip install 'tiered-dataflow[metrics]'") from missing

__all__ = ["LoaderCollector"]

_PREFIX = "dataflow_loader_"


class _Stats(Protocol):
    def as_dict(self) -> dict[str, Any]: ...


class LoaderCollector(Collector):
    """Reads a loader's `stats` at each scrape; register it with a registry of `prometheus_client`.

    Args:
        read_stats: The `stats` method of a loader, which may be called by any thread.
    """

    def __init__(self, read_stats: Callable[[], _Stats]) -> None:
        self._read_stats = read_stats

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics, each labelled with the rank."""
        stats = self._read_stats().as_dict()
        rank = str(stats["rank"])
        for name, help_text in (("batches", "Batches handed to the caller."), ("samples", "Samples in them.")):
            counter = CounterMetricFamily(_PREFIX + name, help_text, labels=["rank"])
            counter.add_metric([rank], stats[name])
            yield counter
        seconds = CounterMetricFamily(
            _PREFIX + "seconds", "Time by stage; of workers, summed over them.", labels=["rank", "stage"]
        )
        for name, value in stats["seconds"].items():
            seconds.add_metric([rank, name], value)
        yield seconds
        events = CounterMetricFamily(_PREFIX + "events", "What was counted on the way.", labels=["rank", "event"])
        for name, number in stats["counts"].items():
            events.add_metric([rank, name], number)
        yield events
        for name in ("step_s", "wait_s"):
            help_text = f"Percentiles of the newest steps: {'whole' if name == 'step_s' else 'the wait for the batch'}."
            gauge = GaugeMetricFamily(f"{_PREFIX}{name[:-2]}_seconds", help_text, labels=["rank", "quantile"])
            for quantile, value in stats[name].items():
                gauge.add_metric([rank, f"0.{quantile[1:]}"], value)
            yield gauge
        stages = GaugeMetricFamily(
            f"{_PREFIX}stage_seconds", "Percentiles of the newest batches.", labels=["rank", "stage", "quantile"]
        )
        for name, percentiles in stats["stage_s"].items():
            for quantile, value in percentiles.items():
                stages.add_metric([rank, name, f"0.{quantile[1:]}"], value)
        yield stages
