"""`dataflow convert`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

import dataflow.convert as conversion
from dataflow.cli.sizes import SIZE, format_size
from dataflow.formats.writable import WRITABLE

__all__ = ["convert"]


@click.command()
@click.argument("src")
@click.argument("dst")
@click.option("--to", type=click.Choice(WRITABLE), default="arrow", show_default=True, help="Format to write.")
@click.option("--shard-size", type=SIZE, default="128MiB", show_default=True, help="About the size of a shard.")
@click.option("--block-size", type=SIZE, default="1MiB", show_default=True, help="What readers fetch and caches keep.")
@click.option(
    "--compression",
    type=click.Choice(["none", "lz4", "zstd"]),
    default="none",
    show_default=True,
    help="Of the buffers.",
)
@click.option("--fields", help="Fields to keep, separated by commas. All by default.")
@click.option("--workers", type=click.IntRange(0), help="Processes; 0 and 1 mean this one. By default one per core.")
@click.option("--overwrite", is_flag=True, help="Replace a dataset at DST.")
@click.option("--resume", is_flag=True, help="Go on with a conversion that broke off.")
@click.option("--dry-run", is_flag=True, help="Plan and check, write nothing.")
@click.option("--quiet", is_flag=True, help="No progress and no summary.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON per step of progress, then the result.")
def convert(
    *,
    src: str,
    dst: str,
    to: str,
    shard_size: int,
    block_size: int,
    compression: str,
    fields: str | None,
    workers: int | None,
    overwrite: bool,
    resume: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write the dataset at SRC to DST, as native shards or in another format.

    SRC is anything that Dataflow reads, such as a folder of images in class folders; DST is a folder or a prefix of any
    store, and must be empty. Nothing is visible at DST before all of it is: what breaks off is finished with --resume.
    """
    with _progress(quiet=quiet or dry_run, as_json=as_json) as progress:
        result = conversion.convert(
            src,
            dst,
            to=to,
            shard_size_bytes=shard_size,
            block_size_bytes=block_size,
            compression=compression,
            fields=None if fields is None else [name.strip() for name in fields.split(",")],
            workers=workers,
            overwrite=overwrite,
            resume=resume,
            dry_run=dry_run,
            progress=progress,
        )
    if as_json:
        click.echo(json.dumps({"event": "planned" if dry_run else "done"} | asdict(result)))
    elif dry_run:
        click.echo(
            f"would write {result.num_samples:,} samples ({format_size(result.source_bytes)} in the source) in "
            f"{result.num_shards - result.num_resumed:,} shards to {result.url}"
        )
    elif not quiet:
        kept = f", {result.num_resumed} of them kept from before" if result.num_resumed else ""
        click.echo(
            f"{result.num_samples:,} samples in {result.num_shards:,} shards{kept}: "
            f"{format_size(result.size_bytes)} at {result.url}"
        )


@contextmanager
def _progress(*, quiet: bool, as_json: bool) -> Iterator[Callable[[conversion.Progress], None] | None]:
    """Yield what receives progress: JSON lines on stdout, a bar on stderr, or nothing."""
    if as_json:
        yield lambda state: click.echo(json.dumps({"event": "progress"} | asdict(state)))
        return
    if quiet:
        yield None
        return
    columns = (
        TextColumn("{task.fields[samples]} samples"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("convert", total=None, samples="0")

        def show(state: conversion.Progress) -> None:
            samples = f"{state.samples:,} of {state.num_samples:,}"
            bar.update(task, completed=state.source_bytes, total=state.num_source_bytes, samples=samples)

        yield show
