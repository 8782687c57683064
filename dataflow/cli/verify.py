"""`dataflow verify`."""

from __future__ import annotations

import json
from dataclasses import asdict

import click
from rich.console import Console
from rich.progress import Progress

from dataflow.cli.sizes import counted, format_size
from dataflow.dataset import open_dataset
from dataflow.dataset.verification import DEFAULT_KEY
from dataflow.dataset.verification import verify as verify_dataset

__all__ = ["verify"]

MAX_SHOWN = 20


@click.command()
@click.argument("url")
@click.option("--format", help="Format of the data. By default it is found out.")
@click.option("--key", default=DEFAULT_KEY, show_default=True, help="Field whose value no two samples may have.")
@click.option("--no-key", is_flag=True, help="Compare no keys, as where each archive counts from 0.")
@click.option("--json", "as_json", is_flag=True, help="The result as one JSON object.")
@click.pass_context
def verify(
    ctx: click.Context,
    *,
    url: str,
    format: str | None,  # noqa: A002  the word users know
    key: str,
    no_key: bool,
    as_json: bool,
) -> None:
    """Read the whole dataset at URL: every checksum, every count, no sample twice, none missing.

    Files whose index was scanned are scanned again. Exit code 1 where something is wrong.
    """
    dataset = open_dataset(url, cache=None, verify=False, format=format)
    try:
        console = Console(stderr=True)
        with Progress(console=console, disable=as_json or not console.is_interactive, transient=True) as bar:
            task = bar.add_task("verify", total=dataset.index.num_blocks)
            result = verify_dataset(
                dataset, key=None if no_key else key, progress=lambda done: bar.update(task, completed=done)
            )
    finally:
        dataset.reader.close()
    if as_json:
        click.echo(json.dumps(asdict(result)))
    else:
        for problem in result.problems[:MAX_SHOWN]:
            click.echo(problem, err=True)
        if result.num_problems > MAX_SHOWN:
            click.echo(f"and {result.num_problems - MAX_SHOWN:,} more problems", err=True)
        click.echo(
            f"{result.num_samples:,} of {counted(len(dataset), 'sample')} in {counted(result.num_blocks, 'block')}, "
            f"{format_size(result.size_bytes)}: "
            f"{counted(result.num_problems, 'problem') if result.num_problems else 'no problems'}"
        )
    ctx.exit(1 if result.num_problems else 0)
