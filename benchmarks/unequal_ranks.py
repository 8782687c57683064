"""What two ranks of unequal speed do together: equal parts, and parts weighted by measured speed.

    python benchmarks/unequal_ranks.py [--rounds 9]

Two processes (gloo), each on a core of its own, train one model on a native dataset; rank 1 computes each of its steps
twice, so it is half as fast. Each rank first trains alone; then both together, in equal parts and in parts weighted by
what `calibrate` makes of the step times measured there. The figure is the throughput of both together over the sum of
what each does alone. All phases are repeated in turn, and medians are shown: a noisy machine disturbs all of them.

Before, on the model as it is, the averaged weighted gradient is compared with that of the whole global batch.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from itertools import islice
from pathlib import Path

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

    def train(self, world_size: int, division: Division) -> tuple[float, list[int], list[float]]:
        """Train some steps; return samples a second of all ranks, and this rank's samples and busy time by step."""
        sampler = self.sampler(world_size, division)
        samples, busy_s = [], []
        began_s = step_began_s = time.perf_counter()
        for step, batch in enumerate(islice(DataLoader(self.dataset, batch_sampler=sampler), STEPS)):
            gradient = self.gradient(batch, sampler.part_at(step).gradient_weight)
            busy_s.append(time.perf_counter() - step_began_s)
            samples.append(len(batch["y"]))
            if world_size > 1:
                dist.all_reduce(gradient)
            with torch.no_grad():
                for parameter, piece in zip(
                    self.parameters, gradient.split([p.numel() for p in self.parameters]), strict=True
                ):
                    parameter -= 1e-4 / world_size * piece.view_as(parameter)
            step_began_s = time.perf_counter()
        return STEPS * GLOBAL_BATCH / (time.perf_counter() - began_s), samples, busy_s

    def gradient_error(self, division: Division) -> float:
        """Return how far the averaged gradient of one step is from the global batch's, over its largest entry."""
        sampler, whole = self.sampler(WORLD_SIZE, division), self.sampler(1, EqualParts())
        (batch,) = islice(DataLoader(self.dataset, batch_sampler=sampler), 1)
        mean = self.gradient(batch, sampler.part_at(0).gradient_weight)
        dist.all_reduce(mean)
        (batch,) = islice(DataLoader(self.dataset, batch_sampler=whole), 1)
        expected = self.gradient(batch, 1.0)
        return float((mean / WORLD_SIZE - expected).abs().max() / expected.abs().max())


def calibrated(samples: list[int], busy_s: list[float]) -> Calibration:
    """Gather what every rank measured, and fit the weights."""
    measured: list[tuple[list[int], list[float]]] = [([], [])] * WORLD_SIZE
    dist.all_gather_object(measured, (samples, busy_s))
    units, seconds = (np.array([of_rank[which] for of_rank in measured]).T for which in (0, 1))
    return calibrate(units, seconds)


def run(number: int, folder: str, num_rounds: int) -> None:
    """Be one of the ranks."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[number % len(os.sched_getaffinity(0))]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=number, world_size=WORLD_SIZE)
    rank = Rank(number, f"{folder}/set")
    error = rank.gradient_error(WeightedParts((2.0, 1.0)))
    rows, together = [], Calibration((1.0, 1.0), 0.0, 0.0)
    for _ in range(num_rounds + 1):
        alone = [0.0] * WORLD_SIZE
        for turn in range(WORLD_SIZE):
            dist.barrier()  # the others wait there
            if turn == number:
                alone[turn], _, _ = rank.train(1, EqualParts())
        dist.barrier()
        gathered = [alone] * WORLD_SIZE
        dist.all_gather_object(gathered, alone)
        equal, samples, busy_s = rank.train(WORLD_SIZE, EqualParts())
        together = calibrated(samples, busy_s)
        weighted, _, _ = rank.train(WORLD_SIZE, WeightedParts(together.weights))
        solo = [gathered[which][which] for which in range(WORLD_SIZE)]
        rows.append([*solo, equal, weighted, together.weights[0] / together.weights[1]])
    dist.destroy_process_group()
    if number == 0:
        report(np.array(rows[1:]), error)  # the first round warms up


def report(rows: np.ndarray, error: float) -> None:
    """Print the medians."""
    fast, slow, equal, weighted, ratio = np.median(rows, axis=0).tolist()
    totals = rows[:, :2].sum(axis=1)
    print(f"alone: {fast:,.0f} and {slow:,.0f} samples/s; measured weights {ratio:.2f} : 1\n")
    print("| parts | samples/s | over the sum of both alone | by round |\n|---|---|---|---|")
    for name, median, column in (("equal", equal, 2), ("weighted", weighted, 3)):
        shares = rows[:, column] / totals
        rounds = ", ".join(f"{share:.2f}" for share in shares)
        print(f"| {name} | {median:,.0f} | {np.median(shares):.3f} | {rounds} |")
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
