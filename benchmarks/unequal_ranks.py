"""What two ranks of unequal speed do together: equal parts, and parts weighted by measured speed.

    python benchmarks/unequal_ranks.py [--rounds 9]

Two processes (gloo), each on a core of its own, train one model on a native dataset; rank 1 computes each of its steps
twice, so it is half as fast. Each rank first trains alone; then both together, in equal parts and in parts weighted by
what `calibrate` makes of the step times measured there. The figure is the throughput of both together over the sum of
what each does alone. All phases are repeated in turn, and medians are shown with their spread.

Foreign load stretches wall times, on one core more than on the other. So steps are also timed by the processor time
that each rank spends: a step of both lasts as long as the rank that spends more, which is what a machine to itself
shows. Weights are measured in processor time.

Before, on the model as it is, the averaged weighted gradient is compared with that of the whole global batch.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
import torch.multiprocessing

from dataflow import DataLoader
from dataflow.dataset import Dataset, open_dataset
from dataflow.formats.arrow import ShardWriter
from dataflow.loaders import ElasticBatchSampler
from dataflow.order import Calibration, Division, EqualParts, WeightedParts, calibrate

WORLD_SIZE = 2
TIMES_COMPUTED = (1, 2)  # by rank
GLOBAL_BATCH = 12288
FEATURES, HIDDEN = 64, 256
STEPS = 6


@dataclass
class Trained:
    """What some steps of training took this rank.

    Attributes:
        wall_s: Seconds of all steps together.
        step_s: Processor seconds of each step. busy_s: The same up to where it waits for the other rank.
        samples: Samples of this rank in each step.
    """

    wall_s: float
    step_s: list[float]
    busy_s: list[float]
    samples: list[int]


class Rank:
    """One process: a model, the dataset, and how to train some steps on it."""

    def __init__(self, rank: int, url: str) -> None:
        torch.manual_seed(0)
        self.rank = rank
        self.dataset: Dataset = open_dataset(url)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(FEATURES, HIDDEN),
            torch.nn.Tanh(),
            torch.nn.Linear(HIDDEN, HIDDEN),
            torch.nn.Tanh(),
            torch.nn.Linear(HIDDEN, 1),
        ).double()
        self.parameters = list(self.model.parameters())

    def gradient(self, batch: dict[str, torch.Tensor], weight: float) -> torch.Tensor:
        """Return the gradient of the weighted mean loss, computed as often as this rank is slow."""
        for _ in range(TIMES_COMPUTED[self.rank]):
            loss = weight * torch.nn.functional.mse_loss(self.model(batch["x"]).squeeze(1), batch["y"])
            gradients = torch.autograd.grad(loss, self.parameters)
        return torch.cat([gradient.ravel() for gradient in gradients])

    def sampler(self, world_size: int, division: Division) -> ElasticBatchSampler:
        """Return the sampler of this rank among `world_size`, all of them on the same global batches."""
        rank = self.rank if world_size > 1 else 0
        return ElasticBatchSampler(
            self.dataset, GLOBAL_BATCH, rank=rank, world_size=world_size, drop_last=True, division=division
        )

    def train(self, world_size: int, division: Division) -> Trained:
        """Train some steps."""
        sampler = self.sampler(world_size, division)
        found = Trained(0.0, [], [], [])
        began_s, step_began_s = time.perf_counter(), time.process_time()
        for step, batch in enumerate(islice(DataLoader(self.dataset, batch_sampler=sampler), STEPS)):
            gradient = self.gradient(batch, sampler.part_at(step).gradient_weight)
            found.busy_s.append(time.process_time() - step_began_s)
            found.samples.append(len(batch["y"]))
            if world_size > 1:
                dist.all_reduce(gradient)
            with torch.no_grad():
                for parameter, piece in zip(
                    self.parameters, gradient.split([p.numel() for p in self.parameters]), strict=True
                ):
                    parameter -= 1e-4 / world_size * piece.view_as(parameter)
            step_ended_s = time.process_time()
            found.step_s.append(step_ended_s - step_began_s)
            step_began_s = step_ended_s
        found.wall_s = time.perf_counter() - began_s
        return found

    def gradient_error(self, division: Division) -> float:
        """Return how far the averaged gradient of one step is from the global batch's, over its largest entry."""
        sampler, whole = self.sampler(WORLD_SIZE, division), self.sampler(1, EqualParts())
        (batch,) = islice(DataLoader(self.dataset, batch_sampler=sampler), 1)
        mean = self.gradient(batch, sampler.part_at(0).gradient_weight)
        dist.all_reduce(mean)
        (batch,) = islice(DataLoader(self.dataset, batch_sampler=whole), 1)
        expected = self.gradient(batch, 1.0)
        return float((mean / WORLD_SIZE - expected).abs().max() / expected.abs().max())


def gathered(own: object) -> list[Any]:
    """Return what every rank says."""
    said: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(said, own)
    return said


def speeds(of_ranks: list[Trained]) -> np.ndarray:
    """Return samples a second by the wall clock, and by the processor time of the rank that spends most."""
    total = STEPS * GLOBAL_BATCH
    spent_s = np.array([rank.step_s for rank in of_ranks]).max(axis=0).sum()
    return np.array([total / max(rank.wall_s for rank in of_ranks), total / spent_s])


def calibrated(of_ranks: list[Trained]) -> Calibration:
    """Fit the weights."""
    return calibrate(np.array([rank.samples for rank in of_ranks]).T, np.array([rank.busy_s for rank in of_ranks]).T)


def run(number: int, folder: str, num_rounds: int) -> None:
    """Be one of the ranks."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[number % len(os.sched_getaffinity(0))]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=number, world_size=WORLD_SIZE)
    rank = Rank(number, f"{folder}/set")
    error = rank.gradient_error(WeightedParts((2.0, 1.0)))
    rows, ratios = [], []
    for _ in range(num_rounds + 1):
        alone = None
        for turn in range(WORLD_SIZE):
            dist.barrier()  # the others wait there
            if turn == number:
                alone = rank.train(1, EqualParts())
        solo = [speeds([found]) for found in gathered(alone)]
        equal = gathered(rank.train(WORLD_SIZE, EqualParts()))
        fitted = calibrated(equal)
        weighted = gathered(rank.train(WORLD_SIZE, WeightedParts(fitted.weights)))
        rows.append([*solo, speeds(equal), speeds(weighted)])
        ratios.append(fitted.weights[0] / fitted.weights[1])
    dist.destroy_process_group()
    if number == 0:
        report(np.array(rows[1:]), np.array(ratios[1:]), error)  # the first round warms up


def report(rows: np.ndarray, ratios: np.ndarray, error: float) -> None:
    """Print medians and spread; `rows` are rounds by phases by clocks."""
    print(f"{len(rows)} rounds, load {os.getloadavg()[0]:.1f}; measured weights {np.median(ratios):.2f} : 1\n")
    print("| clock | alone, samples/s | parts | together, samples/s | over the sum of both alone | least to most |")
    print("|---|---|---|---|---|---|")
    for clock, name in enumerate(("wall", "processor")):
        fast, slow = np.median(rows[:, :2, clock], axis=0)
        totals = rows[:, :2, clock].sum(axis=1)
        for parts, column in (("equal", 2), ("weighted", 3)):
            speed = rows[:, column, clock]
            shares = speed / totals
            print(
                f"| {name} | {fast:,.0f} and {slow:,.0f} | {parts} | {np.median(speed):,.0f} | {np.median(shares):.3f} "
                f"| {shares.min():.2f} to {shares.max():.2f} |"
            )
    print(
        f"\naveraged weighted gradient against the global batch's: largest difference {error:.1e} of the largest entry"
    )


def write(folder: Path) -> None:
    """Write the dataset."""
    schema = pa.schema([("x", pa.list_(pa.float64(), FEATURES)), ("y", pa.float64())])
    random = np.random.default_rng(0)
    with ShardWriter(folder, schema) as writer:
        for features in random.standard_normal((GLOBAL_BATCH * STEPS, FEATURES)):
            writer.write({"x": features.tolist(), "y": float(features[0])})


def main() -> None:
    """Write the data, start both ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "set")
        torch.multiprocessing.spawn(run, (folder, arguments.rounds), nprocs=WORLD_SIZE)


if __name__ == "__main__":
    main()
