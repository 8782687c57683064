"""How fast batches come, side by side with torch's DataLoader in the same run.

    python benchmarks/loader.py [--rounds 5] [--seconds 2] [--only tokens images] [--json FILE]

The datasets are ordinary map-style ones, read sample by sample and collated by torch's default, so what differs is the
loader alone. Rounds alternate between the loaders; a figure is the median of its rounds, with the lowest and the
highest. CPU seconds are those of the trainer and its workers together while batches flow, and steadier than rates on a
machine that does other things too. `ring` is what the hand-over could reach at best: one copy into memory that is used
again, in one process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.utils.data

from dataflow.loaders import DataLoader

LOADERS = {"torch": torch.utils.data.DataLoader, "dataflow": DataLoader}


class Tokens(torch.utils.data.Dataset):
    """2048 uint16 tokens, widened to int64."""

    name, batch_size = "tokens", 32

    def __init__(self) -> None:
        self.tokens = np.random.default_rng(0).integers(0, 50_000, (16_384, 2048), dtype=np.uint16)

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.tokens[index % len(self.tokens)].astype(np.int64))


class Records(torch.utils.data.Dataset):
    """16 float32 and a label."""

    name, batch_size = "records", 256

    def __init__(self) -> None:
        self.values = torch.rand(1 << 18, 16)

    def __len__(self) -> int:
        return 1 << 23

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.values[index % len(self.values)], index % 10


class Images(torch.utils.data.Dataset):
    """Decoded float32 images, 38.5 MB a batch."""

    name, batch_size = "images", 64

    def __init__(self) -> None:
        self.images = torch.rand(64, 3, 224, 224)

    def __len__(self) -> int:
        return 1 << 18

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index % len(self.images)]


class Scalars(torch.utils.data.Dataset):
    """One number at a time: nothing but the cost of a batch."""

    name, batch_size = "scalars", 1

    def __len__(self) -> int:
        return 1 << 23

    def __getitem__(self, index: int) -> int:
        return index


@dataclass(frozen=True, slots=True)
class Round:
    """One measurement."""

    samples_per_s: float
    cpu_s_per_1000: float
    first_batch_s: float


def cpu_seconds() -> float:
    """CPU seconds of this process and of its living workers."""
    ticks = 0
    for process in multiprocessing.active_children():
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def measure(
    loader_class: Callable[..., torch.utils.data.DataLoader], dataset, num_workers: int, seconds: float
) -> Round:
    """Iterate for some seconds and throw the batches away; what happens once, at the start, is not in the rates."""
    began_s = time.perf_counter()
    iterator: Iterator = iter(loader_class(dataset, batch_size=dataset.batch_size, num_workers=num_workers))
    next(iterator)
    first_batch_s = time.perf_counter() - began_s
    for _ in islice(iterator, 8 * max(1, num_workers)):
        pass
    batches, cpu_s, began_s = 0, cpu_seconds(), time.perf_counter()
    while time.perf_counter() - began_s < seconds:
        for _ in islice(iterator, 16):
            pass
        batches += 16
    elapsed_s, cpu_s = time.perf_counter() - began_s, cpu_seconds() - cpu_s
    samples = batches * dataset.batch_size
    return Round(samples / elapsed_s, cpu_s / samples * 1000, first_batch_s)


def ring_limit(dataset, seconds: float) -> float:
    """Samples per second of one copy of each batch into four places in turn."""
    batch = torch.utils.data.default_collate([dataset[index] for index in range(dataset.batch_size)])
    leaves = [leaf.clone() for leaf in (batch if isinstance(batch, list) else [batch])]
    ring = [[leaf.clone() for leaf in leaves] for _ in range(4)]
    copies, began_s = 0, time.perf_counter()
    while time.perf_counter() - began_s < seconds:
        for place, leaf in zip(ring[copies % 4], leaves, strict=True):
            place.copy_(leaf)
        copies += 1
    return copies * dataset.batch_size / (time.perf_counter() - began_s)


def spread(values: list[float], unit: float = 1.0) -> str:
    """The median, and the lowest and highest."""
    return f"{statistics.median(values) * unit:,.4g} ({min(values) * unit:,.4g} - {max(values) * unit:,.4g})"


def main() -> None:
    """Run and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--only", nargs="*", default=[kind.name for kind in KINDS])
    parser.add_argument("--json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = []
    for kind in KINDS:
        if kind.name not in arguments.only:
            continue
        dataset = kind()
        ring = ring_limit(dataset, 0.5)
        print(f"\n{kind.name}: {kind.__doc__} Batches of {kind.batch_size}. ring {ring:,.4g} samples/s")
        for num_workers in arguments.workers:
            rounds: dict[str, list[Round]] = {name: [] for name in LOADERS}
            for _ in range(arguments.rounds):
                for name, loader_class in LOADERS.items():
                    rounds[name].append(measure(loader_class, dataset, num_workers, arguments.seconds))
            pairs = zip(rounds["dataflow"], rounds["torch"], strict=True)
            ratios = [ours.samples_per_s / theirs.samples_per_s for ours, theirs in pairs]
            for name, measured in rounds.items():
                print(
                    f"  {num_workers} workers  {name:9}"
                    f" samples/s {spread([one.samples_per_s for one in measured]):36}"
                    f" CPU s/1000 {spread([one.cpu_s_per_1000 for one in measured]):34}"
                    f" first batch ms {spread([one.first_batch_s for one in measured], 1000)}"
                )
            pairs = zip(rounds["dataflow"], rounds["torch"], strict=True)
            cpu_ratios = [theirs.cpu_s_per_1000 / ours.cpu_s_per_1000 for ours, theirs in pairs]
            print(
                f"  {num_workers} workers  times torch's {spread(ratios)}, for a CPU second {spread(cpu_ratios)}",
                flush=True,
            )
            report.append(
                {
                    "kind": kind.name,
                    "num_workers": num_workers,
                    "times_torch": statistics.median(ratios),
                    "rounds": {name: [asdict(one) for one in measured] for name, measured in rounds.items()},
                }
            )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=1)


KINDS = [Tokens, Records, Images, Scalars]

if __name__ == "__main__":
    main()
