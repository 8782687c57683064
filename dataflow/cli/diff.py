"""`dataflow diff`."""

from __future__ import annotations

import json
from dataclasses import asdict

import click
from rich.console import Console
from rich.progress import Progress

from dataflow.cli.sizes import counted
from dataflow.convert.comparison import Comparison, compare
from dataflow.dataset import open_dataset

__all__ = ["diff"]


@click.command()
@click.argument("left")
@click.argument("right")
@click.option("--fields", help="Compare these fields only, separated by commas.")
@click.option("--json", "as_json", is_flag=True, help="The result as one JSON object.")
@click.pass_context
def diff(ctx: click.Context, *, left: str, right: str, fields: str | None, as_json: bool) -> None:
    """Compare the datasets at LEFT and RIGHT, whatever their formats: fields, number, every sample in stored order.

    Exit code 1 where they differ.
    """
    one = open_dataset(left, cache=None)
    try:
        other = open_dataset(right, cache=None)
        try:
            names = None if fields is None else [name.strip() for name in fields.split(",")]
            console = Console(stderr=True)
            with Progress(console=console, disable=as_json or not console.is_interactive, transient=True) as bar:
                task = bar.add_task("compare", total=min(len(one), len(other)))
                result = compare(one, other, fields=names, progress=lambda done: bar.update(task, completed=done))
        finally:
            other.reader.close()
    finally:
        one.reader.close()
    if as_json:
        click.echo(json.dumps({"equal": result.equal} | asdict(result)))
    else:
        _show(result)
    ctx.exit(0 if result.equal else 1)


def _show(result: Comparison) -> None:
    for name in result.only_left:
        click.echo(f"field {name}: only in the first")
    for name in result.only_right:
        click.echo(f"field {name}: only in the second")
    for name, one, other in result.other_types:
        click.echo(f"field {name}: {one} in the first, {other} in the second")
    if result.num_left != result.num_right:
        click.echo(f"{counted(result.num_left, 'sample')} in the first, {result.num_right:,} in the second")
    for sample, names in result.examples:
        click.echo(f"sample {sample}: {', '.join(names)}")
    if (hidden := result.num_different - len(result.examples)) > 0:
        click.echo(f"and {counted(hidden, 'more sample')}")
    what = "no differences" if result.equal else f"{result.num_different:,} differ"
    click.echo(f"{counted(result.num_compared, 'sample')} compared: {what}")
