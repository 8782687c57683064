"""Does preprocessing hide behind the model? The step time beside the larger of the two, in one run.

    python benchmarks/overlap.py [--steps 100] [--rounds 5] [--model-ms 20] [--data-ms 15] [--spin] [--json FILE]

A model that takes 20 ms a step and a data set that takes 15 ms a batch: without overlap a step takes 35 ms, with it 20.
Both sleep by default, so that the figure is the loader's own cost, also on a machine that does other things; `--spin`
makes the data set compute instead, for which a core has to be free. Rounds go through all loaders in turn. A figure is
the median of the rounds' mean steps, with the lowest and the highest, and `over` is what it has above the larger of the
two; the bar is 5 %. The first batch of a round is left out: nothing is there to hide it behind.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from dataflow.loaders import DataLoader
from dataflow.loaders.measuring import measure_loader

BAR = 1.05


class Work(torch.utils.data.Dataset[torch.Tensor]):
    """Whole batches that take so long."""

    def __init__(self, data_s: float, *, spins: bool) -> None:
        self.data_s = data_s
        self.spins = spins

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> torch.Tensor:
        if not self.spins:
            time.sleep(self.data_s)
            return torch.zeros(1 << 16)
        until_s = time.thread_time() + self.data_s
        while time.thread_time() < until_s:
            pass
        return torch.zeros(1 << 16)


KINDS: dict[str, dict[str, Any]] = {
    "no workers": {},
    "1 process": {"num_workers": 1},
    "2 processes": {"num_workers": 2},
    "1 thread": {"num_workers": 1, "workers": "thread"},
    "2 threads": {"num_workers": 2, "workers": "thread"},
}


def mean_step_s(dataset: Work, options: dict[str, Any], steps: int, model_s: float) -> float:
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=None, **options)
    stats = measure_loader(loader, steps=steps, model_s=model_s).stats
    return (stats.seconds["wait"] + stats.seconds["model"]) / stats.batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model-ms", type=float, default=20)
    parser.add_argument("--data-ms", type=float, default=15)
    parser.add_argument("--spin", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model_s, data_s = options.model_ms / 1000, options.data_ms / 1000
    dataset = Work(data_s, spins=options.spin)
    steps: dict[str, list[float]] = {kind: [] for kind in KINDS}
    bare: list[float] = []
    for _ in range(options.rounds):
        began_s = time.perf_counter()
        for _ in range(options.steps):
            time.sleep(model_s)
        bare.append((time.perf_counter() - began_s) / options.steps)
        for kind, loader_options in KINDS.items():
            steps[kind].append(mean_step_s(dataset, loader_options, options.steps, model_s))
    larger_s = max(statistics.median(bare), data_s)
    print(f"load {os.getloadavg()[0]:.1f}; a bare model step takes {statistics.median(bare) * 1e3:.2f} ms here")
    for kind, found in steps.items():
        median_s = statistics.median(found)
        verdict = "ok" if median_s <= BAR * larger_s else "above the bar"
        print(
            f"{kind:12} {median_s * 1e3:6.2f} ms ({min(found) * 1e3:.2f} to {max(found) * 1e3:.2f}), "
            f"{median_s / larger_s - 1:+.1%} over  {verdict}"
        )
    if options.json:
        options.json.write_text(json.dumps({"bare_s": bare, "step_s": steps}, indent=2))


if __name__ == "__main__":
    main()
