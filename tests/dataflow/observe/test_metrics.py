import re
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest

from dataflow.loaders import DataLoader
from dataflow.loaders.testing import Numbers
from dataflow.observe import count
from dataflow.observe.metrics import LoaderCollector

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "metrics.md"


class Counting(Numbers):
    def __getitem__(self, index):
        count("samples.read")
        return super().__getitem__(index)


def test_a_scrape_shows_what_the_loader_reports():
    loader = DataLoader(Counting(6), batch_size=2)
    registry = CollectorRegistry()
    registry.register(LoaderCollector(loader.stats))
    list(loader)
    lines = generate_latest(registry).decode().splitlines()
    assert 'dataflow_loader_batches_total{rank="0"} 3.0' in lines
    assert 'dataflow_loader_samples_total{rank="0"} 6.0' in lines
    assert 'dataflow_loader_events_total{event="samples.read",rank="0"} 6.0' in lines
    for name in (
        'seconds_total{rank="0",stage="wait"}',
        'step_seconds{quantile="0.99",rank="0"}',
        'stage_seconds{quantile="0.50",rank="0",stage="fetch"}',
    ):
        assert any(line.startswith(f"dataflow_loader_{name}") for line in lines)


def test_the_metrics_of_a_loader_are_those_that_are_documented():
    loader = DataLoader(Counting(6), batch_size=2)
    list(loader)
    served = {sample.name for family in LoaderCollector(loader.stats).collect() for sample in family.samples}
    assert served == set(re.findall(r"`(dataflow_loader_\w+)`", PAGE.read_text()))
