"""A plan as tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dataflow.cli.sizes import format_size
from dataflow.order.plan import EpochPlan, SourcePlan

__all__ = ["show_plan"]

MAX_REPLICAS_SHOWN = 16


def show_plan(found: EpochPlan, urls: Sequence[str], *, may_drop: bool, units: str, console: Console) -> None:
    """Print a plan: facts, what comes from which dataset where there are several, and what each replica reads."""
    console.print(_facts(found, may_drop=may_drop, units=units))
    if len(urls) > 1:
        console.print(_sources(found.sources, urls))
    console.print(_replicas(found))


def _facts(found: EpochPlan, *, may_drop: bool, units: str) -> Table:
    facts = Table.grid(padding=(0, 2))
    walked = "" if found.walked_steps == found.num_steps else f", the first {found.walked_steps:,} below"
    facts.add_row(f"epoch {found.epoch}", f"{found.num_samples:,} samples in {found.num_steps:,} steps{walked}")
    facts.add_row("global batch", f"{_span(found.batch_units)} {units}, {_span(found.part_units)} a replica")
    balance = f"{found.balance_units:.3f} in {units}, {found.balance_bytes:.3f} in bytes"
    if found.balance_costs is not None:
        balance += f", {found.balance_costs:.3f} in costs ({found.equal_costs:.3f} with equal parts in order)"
    facts.add_row("largest / mean part", balance)
    if found.num_dropped is None:
        facts.add_row("check", f"{found.num_repeated:,} samples repeated in the steps above")
    else:
        wrong = found.num_repeated or (found.num_dropped and not may_drop)
        verdict = "[red]WRONG[/red]" if wrong else "[green]each sample once[/green]"
        if not wrong and any(source.own_epochs > 1 for source in found.sources):
            verdict = "[green]each sample once in each epoch of its own dataset[/green]"
        facts.add_row("check", f"{verdict}: {found.num_dropped:,} left out, {found.num_repeated:,} repeated")
    return facts


def _sources(sources: Sequence[SourcePlan], urls: Sequence[str]) -> Table:
    table = Table("dataset", "samples", "reads", "share", "own epochs", "left out", "repeated")
    for url, source in zip(urls, sources, strict=True):
        table.add_row(
            Text(url),
            f"{source.num_samples:,}",
            f"{source.num_reads:,}",
            f"{source.share:.4f}",
            f"{source.own_epochs:,}",
            "?" if source.num_dropped is None else f"{source.num_dropped:,}",
            f"{source.num_repeated:,}",
        )
    return table


def _replicas(found: EpochPlan) -> Table:
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
    return shares


def _span(bounds: tuple[int, int]) -> str:
    low, high = bounds
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
