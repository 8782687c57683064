"""`dataflow index`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import click

from dataflow.cli.sizes import counted, format_size
from dataflow.cli.transfer_bar import transfer_bar
from dataflow.indexing import IndexProgress, build_index

__all__ = ["index"]


@click.command()
@click.argument("src")
@click.option("--out", help="Where to write the index. By default dataflow-index.arrow beside the data.")
@click.option("--format", help="Format of the data. By default it is found out.")
@click.option("--workers", type=click.IntRange(0), help="Processes; 0 and 1 mean this one. By default one per core.")
@click.option(
    "--resume", is_flag=True, help="Scan only what is new or has changed since the last run, finished or not."
)
@click.option("--quiet", is_flag=True, help="No progress and no summary.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON per step of progress, then the result.")
def index(
    *,
    src: str,
    out: str | None,
    format: str | None,  # noqa: A002  the word users know
    workers: int | None,
    resume: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Scan the files at SRC once and keep where their samples lie, so that opening neither scans nor lists.

    For formats without an index of their own: WebDataset, TFRecord, JSONL, CSV and text, also compressed; of folders of
    media files the listing is kept. Where the data cannot be written to, the index goes to this user's cache folder.

    The dataset is what was indexed: files that are added later are left out until this has run again with --resume. Of
    local folders, opening says so in the log; of all others, `dataflow verify` does.
    """
    with _progress(quiet=quiet, as_json=as_json) as progress:
        result = build_index(src, out=out, format=format, workers=workers, resume=resume, progress=progress)
    if as_json:
        click.echo(json.dumps({"event": "done"} | asdict(result)))
    elif not quiet:
        known = result.num_files - result.num_scanned
        samples, blocks = counted(result.num_samples, "sample"), counted(result.num_blocks, "block")
        files = counted(result.num_files, f"{result.format} file")
        click.echo(
            f"{samples} in {blocks} of {files}{f', {known:,} of them known from before' if known else ''}: "
            f"{format_size(result.size_bytes)} at {result.url}"
        )


@contextmanager
def _progress(*, quiet: bool, as_json: bool) -> Iterator[Callable[[IndexProgress], None] | None]:
    """Yield what receives progress: JSON lines on stdout, a bar on stderr, or nothing."""
    if as_json:
        yield lambda state: click.echo(json.dumps({"event": "progress"} | asdict(state)))
        return
    if quiet:
        yield None
        return
    with transfer_bar() as bar:
        task = bar.add_task("index", total=None)
        yield lambda state: bar.update(
            task,
            completed=state.size_bytes,
            total=state.num_bytes,
            description=f"index {state.files:,} of {state.num_files:,} files, {state.samples:,} samples",
        )
