"""`dataflow convert`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import click
from click.core import ParameterSource

import dataflow.convert as conversion
from dataflow.cli.sizes import SIZE, counted, format_size
from dataflow.cli.transfer_bar import transfer_bar
from dataflow.formats.writable import WRITABLE

__all__ = ["convert"]

EXIT_INCOMPLETE = 3  # done, and samples are missing because something is wrong with them


class _Split(click.ParamType[dict[str, float]]):
    name = "name=weight,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, float]:
        if isinstance(value, dict):
            return value
        parts = [part.partition("=") for part in value.split(",")]
        try:
            weights = {name.strip(): float(weight) for name, _, weight in parts}
        except ValueError:
            self.fail(f"{value!r} is no split; write train=.9,val=.1", param, ctx)
        if len(weights) < len(parts):
            self.fail(f"{value!r} names a part twice", param, ctx)
        return weights


@click.command()
@click.argument("src")
@click.argument("dst")
@click.option("--from", "format", help="Format of SRC, with its options: `zarr:window=16`. By default it is found out.")
@click.option("--to", type=click.Choice(WRITABLE), default="arrow", show_default=True, help="Format to write.")
@click.option("--shard-size", type=SIZE, default="128MiB", show_default=True, help="About the size of a shard.")
@click.option("--block-size", type=SIZE, default="1MiB", show_default=True, help="What readers fetch and caches keep.")
@click.option(
    "--compression",
    type=click.Choice(["none", "lz4", "zstd", "auto"]),
    default="none",
    show_default=True,
    help="Of the buffers; `auto` measures on the first samples which one is worth it.",
)
@click.option("--fields", help="Fields to keep, separated by commas. All by default.")
@click.option("--filter", help="Samples to keep: `label == 3 and len(text) > 10`, or module:function.")
@click.option("--map", help="module:function from a sample to a sample.")
@click.option("--clean", type=click.Path(), help="A TOML file of cleaning rules.")
@click.option("--rule", multiple=True, help="A cleaning rule: `range field=age min=0 max=120`. May be repeated.")
@click.option("--sample-fraction", type=float, default=1.0, show_default=True, help="Write this part of the samples.")
@click.option("--split", type=_Split(), help="Write several datasets below DST: `train=.9,val=.1`.")
@click.option(
    "--shuffle",
    type=click.Choice(["full", "block"]),
    is_flag=False,
    flag_value="full",
    help="Write in random order; `block` mixes 64 blocks at a time and reads the source once.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Decides what is drawn and in which order.")
@click.option(
    "--on-error",
    type=click.Choice(["raise", "skip", "quarantine"]),
    default="raise",
    show_default=True,
    help="What happens to bad samples.",
)
@click.option("--max-errors", type=click.IntRange(0), help="With more bad samples, it fails. Any number by default.")
@click.option("--quarantine", help="Where rejected samples go. By default DST.quarantine.")
@click.option("--workers", type=click.IntRange(0), help="Processes, or tasks of a cluster. By default one per core.")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Who works: processes of this machine, or the Ray cluster of RAY_ADDRESS or of this machine.",
)
@click.option("--overwrite", is_flag=True, help="Replace a dataset at DST.")
@click.option("--append", is_flag=True, help="Add samples to the native dataset at DST, as a new version of it.")
@click.option("--resume", is_flag=True, help="Go on with a conversion that broke off.")
@click.option("--verify", is_flag=True, help="Read it again and compare every value with what was to be written.")
@click.option("--dry-run", is_flag=True, help="Plan and check, write nothing.")
@click.option("--quiet", is_flag=True, help="No progress and no summary.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON per step of progress, then the result.")
@click.pass_context
def convert(
    ctx: click.Context,
    /,
    *,
    shard_size: int,
    block_size: int,
    fields: str | None,
    clean: str | None,
    rule: tuple[str, ...],
    append: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Write the dataset at SRC to DST, as native shards or in another format.

    SRC is anything that Dataflow reads, such as a folder of images in class folders, or files by name, as in
    `s3://bucket/data/train-*.parquet`; DST is a folder or a prefix of any store, and must be empty but for --append.
    Nothing is visible at DST before all of it is: what breaks off is finished with --resume. Functions are looked for
    in this folder too. Exit code 3: it is done, and bad samples were left out.
    """
    if append:
        for name in ("to", "compression", "split", "overwrite"):
            if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT:
                raise click.UsageError(f"--{name} cannot be chosen with --append: the dataset at DST has it already")
            del settings[name]
    with _functions_of_this_folder(), _progress(quiet=quiet or dry_run, as_json=as_json) as progress:
        rules = [*(conversion.read_rules(clean) if clean else ()), *map(conversion.parse_rule, rule)]
        result = (conversion.append if append else conversion.convert)(
            shard_size_bytes=shard_size,
            block_size_bytes=block_size,
            fields=None if fields is None else [name.strip() for name in fields.split(",")],
            rules=rules,
            dry_run=dry_run,
            progress=progress,
            **settings,
        )
    if as_json:
        click.echo(json.dumps({"event": "planned" if dry_run else "done"} | asdict(result)))
    elif dry_run or not quiet:
        _summarise(result, dry_run=dry_run)
    ctx.exit(EXIT_INCOMPLETE if result.num_errors else 0)


@contextmanager
def _functions_of_this_folder() -> Iterator[None]:
    """Let modules be found in the working directory: last, and no longer than the command runs."""
    folder = os.getcwd()
    if folder in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _summarise(result: conversion.Conversion, *, dry_run: bool) -> None:
    for row in result.rules:
        click.echo(f"{row.rule}: {row.kept:,} kept, {row.changed:,} changed, {row.dropped:,} dropped")
    left_out = [
        (result.num_filtered, "filtered"),
        (sum(row.dropped for row in result.rules), "cleaned away"),
        (result.num_not_drawn, "not drawn"),
        (result.num_errors, "bad"),
    ]
    if any(number for number, _ in left_out):
        told = ", ".join(f"{number:,} {why}" for number, why in left_out if number)
        click.echo(f"left out of {counted(result.num_source, 'sample')}: {told}")
    for message in result.errors:
        click.echo(message, err=True)
    if result.quarantine is not None:
        click.echo(f"rejected samples are at {result.quarantine}")
    if dry_run:
        click.echo(
            f"would write {counted(result.num_samples, 'sample')} ({format_size(result.source_bytes)} in the source) "
            f"in {counted(result.num_shards - result.num_resumed, 'shard')} to {result.url}"
        )
        return
    for part in result.splits:
        samples, shards = counted(part.num_samples, "sample"), counted(part.num_shards, "shard")
        click.echo(f"{part.name}: {samples} in {shards} at {part.url}")
    if result.num_compared is not None:
        besides = f", all fields but {', '.join(result.not_compared)}" if result.not_compared else ""
        click.echo(f"read again and compared: {counted(result.num_compared, 'sample')}{besides}")
    kept = f", {result.num_resumed} of them kept from before" if result.num_resumed else ""
    click.echo(
        f"{counted(result.num_samples, 'sample')} in {counted(result.num_shards, 'shard')}{kept}: "
        f"{format_size(result.size_bytes)} at {result.url}"
    )


@contextmanager
def _progress(*, quiet: bool, as_json: bool) -> Iterator[Callable[[conversion.Progress], None] | None]:
    """Yield what receives progress: JSON lines on stdout, bars on stderr, or nothing."""
    if as_json:
        yield _lines()
        return
    if quiet:
        yield None
        return
    with transfer_bar("{task.description} {task.fields[samples]} samples") as bar:
        tasks: dict[str, Any] = {}

        def show(state: conversion.Progress) -> None:
            if state.stage not in tasks:
                tasks[state.stage] = bar.add_task(state.stage, total=None, samples="0")
            samples = f"{state.samples:,} of {state.num_samples:,}"
            task = tasks[state.stage]
            bar.update(task, completed=state.source_bytes, total=state.num_source_bytes, samples=samples)

        yield show


def _lines() -> Callable[[conversion.Progress], None]:
    """Return what prints a line for each step: its numbers, and the stage's pace since this run began with it."""
    begun: dict[str, tuple[float, int]] = {}

    def show(state: conversion.Progress) -> None:
        now_s = time.monotonic()
        began_s, before = begun.setdefault(state.stage, (now_s, state.source_bytes))
        elapsed_s, done = now_s - began_s, state.source_bytes - before
        left = state.num_source_bytes - state.source_bytes
        known = done and elapsed_s
        pace = {
            "elapsed_s": round(elapsed_s, 3),
            "bytes_per_s": round(done / elapsed_s) if known else None,
            "left_s": round(left * elapsed_s / done, 3) if known else None,
        }
        click.echo(json.dumps({"event": "progress"} | asdict(state) | pace))

    return show
