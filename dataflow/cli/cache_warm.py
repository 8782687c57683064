"""`dataflow cache warm`: a dataset into the cache before it is needed."""

from __future__ import annotations

import click

from connectors.objects import normalise_url
from dataflow.cli.cache_client import SOCKET, connected
from dataflow.cli.sizes import counted, format_size
from dataflow.cli.transfer_bar import transfer_bar
from dataflow.dataset.warming import check_fits
from dataflow.dataset.warming import warm as warm_index
from dataflow.formats import open_source

__all__ = ["warm"]


@click.command()
@click.argument("url")
@SOCKET
@click.option("--check/--no-check", default=True, help="Read everything once more: verify, and count what was kept.")
def warm(*, url: str, address: str | None, check: bool) -> None:
    """Load the dataset at URL into the running cache.

    What the tiers cannot hold is refused at once. You can interrupt it at any time: the next run does not fetch again
    what is there already. The exit code is 1 when not all of it was kept.
    """
    with connected(address) as client:
        index = open_source(normalise_url(url), client).index
        check_fits(index, client.stats())
        with transfer_bar() as progress:
            tasks = {}
            for done in warm_index(index, client, check=check):
                if done.phase not in tasks:
                    tasks[done.phase] = progress.add_task(done.phase, total=done.num_bytes)
                progress.update(tasks[done.phase], completed=done.size_bytes)
                if done.phase == "load":
                    loaded = done
    click.echo(
        f"{counted(loaded.num_blocks, 'block')}, {format_size(loaded.num_bytes)}: "
        f"{format_size(loaded.fetched_bytes)} came from the origin, {format_size(loaded.kept_bytes)} were here"
    )
    if check:
        share = done.kept_bytes / done.num_bytes if done.num_bytes else 1.0
        click.echo(f"checked: the tiers hold {format_size(done.kept_bytes)} of it, {share:.1%}")
        if done.kept_bytes < done.num_bytes:
            raise click.ClickException("the rest was not let in: the tiers hold other data, which has the better right")
