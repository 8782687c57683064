"""Walking a loader for a while, to see how fast it is and why."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from connectors.errors import BadInputError
from dataflow.loaders.dataloader import DataLoader
from dataflow.loaders.stats import LoaderStats

__all__ = ["Measurement", "measure_loader"]


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a walk has found.

    Attributes:
        first_batch_s: From the beginning to the first batch: starting workers, finding blocks.
        stats: Of the steps behind that batch.
    """

    first_batch_s: float
    stats: LoaderStats

    @property
    def samples_per_s(self) -> float:
        """Samples handed out in a second of the loop."""
        whole_s = self.stats.seconds["wait"] + self.stats.seconds["model"]
        return self.stats.samples / whole_s if whole_s else 0.0


def measure_loader(
    loader: DataLoader[Any], *, steps: int, model_s: float, on_step: Callable[[LoaderStats], None] | None = None
) -> Measurement:
    """Walk a loader for so many steps behind its first batch, beginning epochs anew where they end.

    Args:
        loader: A loader over a dataset that is not empty.
        steps: How many.
        model_s: How long a model would work on each batch.
        on_step: Called with the statistics about once a second.

    Raises:
        BadInputError: The loader has no batch.
    """
    began_s = told_s = time.monotonic()
    first_batch_s = 0.0
    batches = _endless(loader)
    for number, _ in enumerate(itertools.islice(batches, steps + 1)):
        if number == 0:
            first_batch_s = time.monotonic() - began_s
            loader._ledger.meter.clear()
        time.sleep(model_s)
        if on_step is not None and time.monotonic() - told_s > 1:
            told_s = time.monotonic()
            on_step(loader.stats())
    loader._ledger.meter.enter()  # the last step ends here
    return Measurement(first_batch_s, loader.stats())


def _endless(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        has_batch = False
        for batch in loader:
            has_batch = True
            yield batch
        if not has_batch:
            raise BadInputError("the loader has no batch: the dataset is empty, or smaller than a batch")
