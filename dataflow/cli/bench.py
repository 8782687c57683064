"""`dataflow bench`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

import click
from rich.console import Console
from rich.table import Table

from dataflow.cli.sizes import format_size
from dataflow.dataset import open_dataset

if TYPE_CHECKING:
    from dataflow.loaders.measuring import Measurement

__all__ = ["bench"]


@click.command()
@click.argument("url")
@click.option(
    "--batch", type=click.IntRange(1), default=256, show_default=True, help="Samples in one step over all ranks."
)
@click.option("--steps", type=click.IntRange(1), default=100, show_default=True, help="Steps after the first one.")
@click.option("--workers", type=click.IntRange(0), default=2, show_default=True, help="Workers of the loader.")
@click.option(
    "--worker-kind",
    type=click.Choice(["process", "thread", "auto"]),
    default="process",
    show_default=True,
    help="What they are; `auto` takes threads where the batches allow it.",
)
@click.option(
    "--shuffle", type=click.Choice(["block", "full", "none"]), default="block", show_default=True, help="The order."
)
@click.option("--columns", help="Fields to read, separated by commas. All by default.")
@click.option(
    "--model-ms",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Sleep as long as a step of your model.",
)
@click.option("--no-cache", is_flag=True, help="Read past the cache.")
@click.option("--progress", is_flag=True, help="Print a line a second on stderr.")
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object.")
def bench(
    *,
    url: str,
    batch: int,
    steps: int,
    workers: int,
    worker_kind: Literal["process", "thread", "auto"],
    shuffle: str,
    columns: str | None,
    model_ms: float,
    no_cache: bool,
    progress: bool,
    as_json: bool,
) -> None:
    """Read the dataset at URL as training would, and show where the time goes and what limits it.

    Under torchrun each rank reads its part and reports for itself.
    """
    from dataflow.loaders import DataLoader, ElasticBatchSampler
    from dataflow.loaders.measuring import measure_loader

    fields = None if columns is None else [name.strip() for name in columns.split(",")]
    dataset = open_dataset(url, cache=None if no_cache else "auto", columns=fields)
    try:
        kind: Literal["block", "full", False] = False if shuffle == "none" else "full" if shuffle == "full" else "block"
        loader: Any = DataLoader(
            dataset,
            batch_sampler=ElasticBatchSampler(dataset, batch, shuffle=kind),
            num_workers=workers,
            workers=worker_kind,
        )
        say = (lambda stats: click.echo(stats.progress_line, err=True)) if progress else None
        found = measure_loader(loader, steps=steps, model_s=model_ms / 1000, on_step=say)
    except RuntimeError as error:
        if "equal size" not in str(error):  # as torch says it of tensors and of lists
            raise
        raise click.ClickException(
            "samples differ in size and make no batch as they are: leave fields out with --columns, or convert with a "
            "--map that makes them equal; of a loader of your own, with its transforms, loader.stats() tells the same"
        ) from error
    finally:
        dataset.reader.close()
    if as_json:
        report = {"url": url, "first_batch_s": found.first_batch_s, "samples_per_s": found.samples_per_s}
        click.echo(json.dumps({**report, **found.stats.as_dict()}, indent=2))
    else:
        _show(found, Console())


def _show(found: Measurement, console: Console) -> None:
    stats = found.stats
    facts = Table.grid(padding=(0, 2))
    facts.add_row("rank", str(stats.rank))
    facts.add_row("samples", f"{stats.samples:,} in {stats.batches:,} steps, {found.samples_per_s:,.0f}/s")
    facts.add_row("first batch", f"{found.first_batch_s:.3f} s")
    for name, what in (("step", stats.step_s), ("wait", stats.wait_s)):
        facts.add_row(name, f"p50 {what.p50 * 1e3:.2f} ms, p95 {what.p95 * 1e3:.2f} ms, p99 {what.p99 * 1e3:.2f} ms")
    for name, number in sorted(stats.counts.items()):
        facts.add_row(name, format_size(number) if name.startswith("bytes.") else f"{number:,}")
    facts.add_row("limited by", stats.bottleneck)
    console.print(facts)
    stages = Table("stage", "seconds", "a step", "p50, p95, p99", "of")
    for name, seconds in stats.seconds.items():
        who = "the loop" if name in ("wait", "model", "transfer") else f"{stats.num_workers} workers"
        each_ms = seconds / max(1, stats.batches) * 1e3
        newest = stats.stage_s.get(name)
        percentiles = f"{newest.p50 * 1e3:.2f}, {newest.p95 * 1e3:.2f}, {newest.p99 * 1e3:.2f} ms" if newest else ""
        who = who if stats.num_workers else "the loop"
        stages.add_row(name, f"{seconds:.3f}", f"{each_ms:.2f} ms", percentiles, who)
    console.print(stages)
