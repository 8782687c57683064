"""`dataflow cache verify`: every block on disk against its checksums."""

from __future__ import annotations

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from cache.verification import verify_directory
from dataflow.cli.sizes import counted, format_size

__all__ = ["verify"]


@click.command()
@click.argument("directories", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False))
@click.option("--remove", is_flag=True, help="Remove the bad blocks; they are fetched again when needed.")
def verify(*, directories: tuple[str, ...], remove: bool) -> None:
    """Compare every block in DIRECTORIES with its checksums.

    DIRECTORIES are paths of tiers. The daemon may run meanwhile. The exit code is 1 when a block is bad.
    """
    console = Console(stderr=True)
    bad = 0
    for directory in directories:
        name = TextColumn("{task.description}", markup=False)
        with Progress(name, BarColumn(), MofNCompleteColumn(), TextColumn("folders"), console=console) as progress:
            task = progress.add_task(directory)
            for found in verify_directory(directory, remove=remove):
                progress.update(task, completed=found.folders, total=found.num_folders)
        for path in found.bad:
            click.echo(f"{'removed' if remove else 'bad'}: {path}")
        others = f", {counted(found.foreign, 'other file')}" if found.foreign else ""
        click.echo(
            f"{directory}: {counted(found.blocks, 'block')}, {format_size(found.size_bytes)} right, "
            f"{len(found.bad):,} bad{others}"
        )
        bad += len(found.bad)
    raise SystemExit(1 if bad else 0)
