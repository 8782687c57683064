"""`dataflow plan`."""

from __future__ import annotations

import json
import operator
import re
from dataclasses import asdict
from typing import Any, Literal

import click
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from connectors.errors import BadInputError
from dataflow.cli.sizes import format_size
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
    PackedBatches,
    Schedule,
    Selection,
    Shuffle,
    Source,
    WeightedParts,
)
from dataflow.order.plan import BlockTable, EpochPlan, plan_epoch

__all__ = ["plan"]

MAX_REPLICAS_SHOWN = 16
COMPARISONS = {
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    ">": operator.gt,
}


@click.command()
@click.argument("url")
@click.option(
    "--batch", required=True, type=click.IntRange(1), help="Samples in one step over all ranks; of packs, packs."
)
@click.option("--world-size", type=click.IntRange(1), default=1, show_default=True, help="Number of ranks.")
@click.option("--mesh", help="Axes of the ranks and their sizes, e.g. pp=2,dp=4,tp=2; instead of --world-size.")
@click.option("--data-axes", default="dp", show_default=True, help="The axes of --mesh that divide the data.")
@click.option("--weights", help="Speed of each replica, e.g. 1,1,2; equal by default.")
@click.option("--lengths", help="Field with the length of each sample: a number, or a text or list that is counted.")
@click.option("--capacity", type=click.IntRange(1), help="Pack samples into rows of so much length.")
@click.option(
    "--budget", type=click.IntRange(1), help="Group by length; a step has at most this much, padding counted."
)
@click.option("--window", type=click.IntRange(1), default=65_536, show_default=True, help="Samples packed together.")
@click.option("--balance", is_flag=True, help="Deal each batch so that all replicas get like sums of lengths.")
@click.option("--where", multiple=True, help="Keep samples for which this holds, e.g. 'length <= 2048'; may repeat.")
@click.option("--shuffle", type=click.Choice(["block", "full", "none"]), default="block", show_default=True)
@click.option("--window-blocks", type=click.IntRange(1), default=64, show_default=True, help="Blocks mixed together.")
@click.option("--tail", type=click.Choice(["short", "drop", "pad"]), default="short", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--epoch", type=int, default=0, show_default=True)
@click.option("--steps", type=click.IntRange(1), help="Look at the first steps only; all by default.")
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object.")
def plan(
    *,
    url: str,
    batch: int,
    world_size: int,
    mesh: str | None,
    data_axes: str,
    weights: str | None,
    lengths: str | None,
    capacity: int | None,
    budget: int | None,
    window: int,
    balance: bool,
    where: tuple[str, ...],
    shuffle: str,
    window_blocks: int,
    tail: Literal["short", "drop", "pad"],
    seed: int,
    epoch: int,
    steps: int | None,
    as_json: bool,
) -> None:
    """Say what each rank will read from the dataset at URL, and check that nothing is lost or repeated."""
    num_replicas = world_size if mesh is None else _mesh(mesh, data_axes).num_replicas
    if batch < num_replicas:
        raise BadInputError(f"a global batch of {batch} samples cannot feed {num_replicas} replicas")
    if lengths is None and (capacity or budget or balance):
        raise BadInputError("--capacity, --budget and --balance need --lengths")
    if capacity and budget:
        raise BadInputError("--capacity packs samples and --budget groups them; give one")
    if weights and balance:
        raise BadInputError("--weights and --balance are two ways to divide a batch; give one")
    dataset = open_dataset(url, cache=None)
    try:
        blocks = dataset.index.blocks
        kind: Literal["block", "full", False] = False if shuffle == "none" else "full" if shuffle == "full" else "block"
        stored = Shuffle(len(dataset), blocks.first_sample, kind, seed, window_blocks)
        source: Source = stored
        measures = None if lengths is None else _measure(url, lengths)
        if where:
            keep = np.logical_and.reduce([_kept(url, condition) for condition in where])
            source = Filtered(stored, Selection(keep))
            # Nobody asks for the length of a sample that is left out; it may be above what a batch holds.
            measures = None if measures is None else np.where(keep, measures, 1)
        batching: Batching = FixedBatches(batch, tail)
        if measures is not None and capacity:
            batching = PackedBatches(measures, capacity, batch, window, seed)
        elif measures is not None and budget:
            batching = BucketBatches(measures, budget, num_replicas, batch, None, window, seed)
        division: Division = EqualParts() if weights is None else WeightedParts(_numbers(weights))
        if measures is not None and balance:
            division = BalancedParts(measures)
        table = BlockTable(blocks.first_sample, blocks.length)
        schedule = Schedule(source, batching)
        found = plan_epoch(schedule, division, num_replicas, table, epoch=epoch, max_steps=steps, costs=measures)
    finally:
        dataset.reader.close()
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
    else:
        _show(found, tail, "packs" if capacity else "samples", Console())


def _mesh(text: str, data_axes: str) -> Mesh:
    try:
        sizes = {name.strip(): int(size) for name, size in (axis.split("=") for axis in text.split(","))}
    except ValueError:
        raise BadInputError(f"--mesh names axes and sizes such as pp=2,dp=4,tp=2, got {text!r}") from None
    return Mesh.from_sizes(sizes, tuple(axis.strip() for axis in data_axes.split(",") if axis.strip()))


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise BadInputError(f"--weights are numbers with commas between, got {text!r}") from None


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


def _show(found: EpochPlan, tail: str, units: str, console: Console) -> None:
    facts = Table.grid(padding=(0, 2))
    walked = "" if found.walked_steps == found.num_steps else f", the first {found.walked_steps:,} below"
    facts.add_row(f"epoch {found.epoch}", f"{found.num_samples:,} samples in {found.num_steps:,} steps{walked}")
    facts.add_row("global batch", f"{_span(found.batch_units)} {units}, {_span(found.part_units)} a replica")
    lengths = "" if found.balance_costs is None else f", {found.balance_costs:.3f} in lengths"
    facts.add_row(
        "largest / mean part", f"{found.balance_units:.3f} in {units}, {found.balance_bytes:.3f} in bytes{lengths}"
    )
    if found.num_dropped is None:
        facts.add_row("check", f"{found.num_repeated:,} samples repeated in the steps above")
    else:
        wrong = found.num_repeated or (found.num_dropped and tail != "drop")
        verdict = "[red]WRONG[/red]" if wrong else "[green]each sample once[/green]"
        facts.add_row("check", f"{verdict}: {found.num_dropped:,} left out, {found.num_repeated:,} repeated")
    console.print(facts)
    shares = Table("replica", "samples", "padding", "bytes of samples", "blocks", "bytes of blocks")
    for number, share in enumerate(found.replicas[:MAX_REPLICAS_SHOWN]):
        shares.add_row(
            str(number),
            f"{share.num_samples:,}",
            f"{share.num_padding:,}",
            format_size(share.sample_bytes),
            "?" if share.num_blocks is None else f"{share.num_blocks:,}",
            "?" if share.block_bytes is None else format_size(share.block_bytes),
        )
    if (hidden := len(found.replicas) - MAX_REPLICAS_SHOWN) > 0:
        shares.add_row(f"and {hidden:,} more", *[""] * 5)
    console.print(shares)


def _span(bounds: tuple[int, int]) -> str:
    low, high = bounds
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
