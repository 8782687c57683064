"""`dataflow plan`."""

from __future__ import annotations

import json
import operator
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import numpy.typing as npt
from rich.console import Console

from connectors.errors import BadInputError
from dataflow.cli.plan_report import show_plan
from dataflow.dataset import Dataset, open_dataset, read_measure
from dataflow.order import (
    BalancedParts,
    Batching,
    BucketBatches,
    Division,
    EqualParts,
    Filtered,
    FixedBatches,
    Mesh,
    Mixture,
    PackedBatches,
    Schedule,
    Selection,
    Shuffle,
    Source,
    WeightedParts,
    mixture_weights,
)
from dataflow.order.plan import BlockTable, EpochPlan, plan_epoch

__all__ = ["plan"]

COMPARISONS = {
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    ">": operator.gt,
}


@click.command()
@click.argument("urls", metavar="URL...", nargs=-1, required=True)
@click.option(
    "--batch", required=True, type=click.IntRange(1), help="Samples in one step over all ranks; packs with --capacity."
)
@click.option("--world-size", type=click.IntRange(1), default=1, show_default=True, help="Number of ranks.")
@click.option("--mesh", help="Axes of the ranks and their sizes, e.g. pp=2,dp=4,tp=2; instead of --world-size.")
@click.option("--data-axes", default="dp", show_default=True, help="The axes of --mesh that divide the data.")
@click.option("--weights", help="Speed of each replica, e.g. 1,1,2; equal by default.")
@click.option("--shares", help="Mix several datasets in these shares, e.g. 3,1; by default follow --temperature.")
@click.option(
    "--temperature", type=float, help="Mix by size ** (1 / this): 1, the default, keeps sizes, more lifts small ones."
)
@click.option("--epoch-samples", type=click.IntRange(1), help="Samples in an epoch of a mixture; by default as stored.")
@click.option("--period", type=click.IntRange(1), help="Samples in which shares are exact; by default one batch.")
@click.option("--lengths", help="Field with the length of each sample: a number, or a text or list that is counted.")
@click.option("--capacity", type=click.IntRange(1), help="Pack samples into rows of this length.")
@click.option(
    "--budget", type=click.IntRange(1), help="Group by length; a step has at most this much, padding counted."
)
@click.option("--window", type=click.IntRange(1), default=65_536, show_default=True, help="Samples packed together.")
@click.option("--balance", is_flag=True, help="Deal each batch so that all replicas get like sums of costs.")
@click.option(
    "--costs",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Measured cost of each sample, a .npy file; the lengths by default.",
)
@click.option("--where", multiple=True, help="Keep samples for which this holds, e.g. 'length <= 2048'; may repeat.")
@click.option(
    "--shuffle",
    type=click.Choice(["block", "full", "none"]),
    default="block",
    show_default=True,
    help="Permute blocks and mix within windows of them, permute all samples, or keep the stored order.",
)
@click.option(
    "--window-blocks",
    type=click.IntRange(1),
    help="Blocks mixed together.  [default: those of 64 MiB and 512 samples, at most 64]",
)
@click.option(
    "--tail",
    type=click.Choice(["short", "drop", "pad"]),
    default="short",
    show_default=True,
    help="What becomes of the last batch of an epoch.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Decides the order, with the epoch.")
@click.option("--epoch", type=int, default=0, show_default=True, help="Which epoch, from 0.")
@click.option("--steps", type=click.IntRange(1), help="Look at the first steps only; all by default.")
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object.")
def plan(*, as_json: bool, **options: Any) -> None:
    """Show what each rank will read from the dataset at URL, and check that nothing is lost or repeated.

    Several URLs are mixed: a dataset that is used up begins its next epoch while others still run.
    """
    job = _Job(**options)
    found = job.plan()
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
        return
    units = "packs" if job.capacity else "samples"
    show_plan(found, job.urls, may_drop=job.tail == "drop", units=units, console=Console())


@dataclass(frozen=True)
class _Job:
    """The options of the command, and what follows from them."""

    urls: tuple[str, ...]
    batch: int
    world_size: int
    mesh: str | None
    data_axes: str
    weights: str | None
    shares: str | None
    temperature: float | None
    epoch_samples: int | None
    period: int | None
    lengths: str | None
    capacity: int | None
    budget: int | None
    window: int
    balance: bool
    costs: Path | None
    where: tuple[str, ...]
    shuffle: str
    window_blocks: int | None
    tail: Literal["short", "drop", "pad"]
    seed: int
    epoch: int
    steps: int | None

    def __post_init__(self) -> None:
        if self.batch < self.num_replicas:
            raise BadInputError(f"a global batch of {self.batch} samples cannot feed {self.num_replicas} replicas")
        if self.lengths is None and (self.capacity or self.budget):
            raise BadInputError("--capacity and --budget need --lengths")
        if self.lengths is None and self.costs is None and self.balance:
            raise BadInputError("--balance needs --lengths or --costs")
        if self.capacity and self.budget:
            raise BadInputError("--capacity packs samples and --budget groups them; give one")
        if self.weights and self.balance:
            raise BadInputError("--weights and --balance are two ways to divide a batch; give one")
        if self.shares and self.temperature:
            raise BadInputError("--shares and --temperature are two ways to say how datasets are mixed; give one")
        mixes = self.shares or self.temperature or self.epoch_samples or self.period
        if mixes and len(self.urls) == 1:
            raise BadInputError("--shares, --temperature, --epoch-samples and --period mix several datasets; give them")

    @cached_property
    def num_replicas(self) -> int:
        """Parts of each global batch."""
        return self.world_size if self.mesh is None else _mesh(self.mesh, self.data_axes).num_replicas

    def plan(self) -> EpochPlan:
        """Read what is needed, and walk the epoch."""
        datasets = [_open(self, url) for url in self.urls]
        lengths = None if self.lengths is None else np.concatenate([dataset.lengths for dataset in datasets])
        table = BlockTable.joined([dataset.table for dataset in datasets])
        costs = lengths if self.costs is None else _costs(self.costs, int(table.first_sample[-1]))
        return plan_epoch(
            Schedule(self._source(datasets), self._batching(lengths)),
            self._division(costs),
            self.num_replicas,
            table,
            epoch=self.epoch,
            max_steps=self.steps,
            costs=costs,
        )

    def _source(self, datasets: list[_Opened]) -> Source:
        if len(datasets) == 1:
            return datasets[0].source
        sizes = [dataset.source.num_samples for dataset in datasets]
        if self.shares is not None:
            weights = _numbers("--shares", self.shares)
        else:
            weights = tuple(mixture_weights(sizes, 1.0 if self.temperature is None else self.temperature).tolist())
        return Mixture(
            sources=tuple(dataset.source for dataset in datasets),
            num_numbers=tuple(int(dataset.table.first_sample[-1]) for dataset in datasets),
            weights=weights,
            epoch_samples=self.epoch_samples or sum(sizes),
            period=self.period or self.batch,
            seed=self.seed,
        )

    def _batching(self, lengths: npt.NDArray[Any] | None) -> Batching:
        if lengths is not None and self.capacity:
            return PackedBatches(lengths, self.capacity, self.batch, self.window, self.seed)
        if lengths is not None and self.budget:
            return BucketBatches(lengths, self.budget, self.num_replicas, self.batch, None, self.window, self.seed)
        return FixedBatches(self.batch, self.tail)

    def _division(self, costs: npt.NDArray[Any] | None) -> Division:
        if self.balance and costs is not None:
            return BalancedParts(costs)
        return EqualParts() if self.weights is None else WeightedParts(_numbers("--weights", self.weights))


@dataclass(frozen=True)
class _Opened:
    """One dataset: what is read of it, where that lies, and how long its samples are (empty where nobody asks)."""

    source: Source
    table: BlockTable
    lengths: npt.NDArray[Any]


def _open(job: _Job, url: str) -> _Opened:
    dataset = open_dataset(url, cache=None)
    kinds: dict[str, Literal["block", "full", False]] = {"block": "block", "full": "full", "none": False}
    try:
        blocks = dataset.index.blocks
        stored = Shuffle.over(dataset, shuffle=kinds[job.shuffle], seed=job.seed, window_blocks=job.window_blocks)
    finally:
        dataset.reader.close()
    lengths = np.empty(0, np.int64) if job.lengths is None else _measure(url, job.lengths)
    source: Source = stored
    if job.where:
        keep = np.logical_and.reduce([_kept(url, condition) for condition in job.where])
        source = Filtered(stored, Selection(keep))
        # Nobody asks for the length of a sample that is left out; it may be above what a batch holds.
        lengths = lengths if job.lengths is None else np.where(keep, lengths, 1)
    return _Opened(source, BlockTable(blocks.first_sample, blocks.length), lengths)


def _mesh(text: str, data_axes: str) -> Mesh:
    try:
        sizes = {name.strip(): int(size) for name, size in (axis.split("=") for axis in text.split(","))}
    except ValueError:
        raise BadInputError(f"--mesh names axes and sizes such as pp=2,dp=4,tp=2, got {text!r}") from None
    return Mesh.from_sizes(sizes, tuple(axis.strip() for axis in data_axes.split(",") if axis.strip()))


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise BadInputError(f"{option} are numbers with commas between, got {text!r}") from None


def _costs(path: Path, num_samples: int) -> npt.NDArray[Any]:
    try:
        costs = np.load(path, allow_pickle=False, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise BadInputError(f"--costs {path} is no .npy file of numbers: {error}") from None
    if not isinstance(costs, np.ndarray) or costs.shape != (num_samples,) or costs.dtype.kind not in "iuf":
        raise BadInputError(
            f"--costs {path} must hold one number for each of the {num_samples} samples, in their order; "
            f"it has shape {np.shape(costs)}"
        )
    return costs


def _measure(url: str, field: str) -> npt.NDArray[Any]:
    dataset: Dataset = open_dataset(url, cache=None, columns=[field])
    try:
        return read_measure(dataset, field)
    finally:
        dataset.reader.close()


def _kept(url: str, where: str) -> npt.NDArray[np.bool_]:
    """Return for each sample whether `where` holds."""
    parsed = re.fullmatch(r"\s*(.+?)\s*(<=|>=|==|!=|<|>)\s*(-?\d+(?:\.\d+)?)\s*", where)
    if parsed is None:
        raise BadInputError(f"--where compares a field with a number, such as 'length <= 2048', got {where!r}")
    field, comparison, number = parsed.groups()
    return np.asarray(COMPARISONS[comparison](_measure(url, field), float(number)), dtype=np.bool_)
