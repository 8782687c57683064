"""`dataflow cache pin`, `unpin`, `evict` and `resize`: what the cache keeps."""

from __future__ import annotations

import click
import numpy as np

from cache.block import file_bytes
from cache.client import CacheClient
from cache.frames import Done
from cache.orders import EvictPrefix, PinPrefix, PinsKept, Removed, ResizeTier, UnpinPrefix
from connectors.errors import BadInputError, DataError, NotFoundError
from connectors.objects import normalise_url
from dataflow.cli.cache_client import SOCKET, connected
from dataflow.cli.cache_usage import held
from dataflow.cli.durations import DURATION
from dataflow.cli.sizes import SIZE, counted, format_size
from dataflow.formats import open_source

__all__ = ["evict", "pin", "resize", "unpin"]

_PAGE_BYTES = 4096


@click.command()
@click.argument("url")
@SOCKET
@click.option("--size", "size_bytes", type=SIZE, help="Size of what lies there. [default: found out from the data]")
@click.option("--for", "expires_s", type=DURATION, help="When it ends by itself: 36h, 7d. [default: by unpin]")
def pin(*, url: str, address: str | None, size_bytes: int | None, expires_s: float | None) -> None:
    """Keep what lies at and below URL in the cache.

    URL is a dataset, an object or a prefix. Other blocks never displace its blocks, and its blocks displace others when
    they come. A pin fetches nothing: `warm` does. It is refused where the largest tier could not hold it beside what is
    pinned already. Pinning again changes size and end.
    """
    with connected(address) as client:
        url = normalise_url(url)
        size_bytes = _size_of(url, client) if size_bytes is None else size_bytes
        kept = client.ask(PinPrefix(url, size_bytes, expires_s), PinsKept)
        here = sum(sum(row.size_bytes.values()) for row in held(client, url, depth=0))
    click.echo(f"pinned: {url}, {format_size(size_bytes)}, of which {format_size(here)} are here")
    _warn(kept)


@click.command()
@click.argument("url")
@SOCKET
def unpin(*, url: str, address: str | None) -> None:
    """Take back the pin of exactly URL.

    What it kept stays until something else displaces it.
    """
    with connected(address) as client:
        url = normalise_url(url)
        kept = client.ask(UnpinPrefix(url), PinsKept)
    click.echo(f"no longer pinned: {url}")
    _warn(kept)


@click.command()
@click.argument("url")
@SOCKET
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
def evict(*, url: str, address: str | None, dry_run: bool) -> None:
    """Remove what lies at and below URL, except what is pinned.

    It is fetched again when it is read. The exit code is 1 when something stays.
    """
    with connected(address) as client:
        url = normalise_url(url)
        if dry_run:
            rows = list(held(client, url, depth=0))
            blocks, size_bytes = sum(sum(row.blocks.values()) for row in rows), sum(row.pinned_bytes for row in rows)
            total_bytes = sum(sum(row.size_bytes.values()) for row in rows)
            click.echo(
                f"{counted(blocks, 'block')}, {format_size(total_bytes)}, of which {format_size(size_bytes)} are pinned"
            )
            return
        done = client.ask(EvictPrefix(url), Removed).evicted
    click.echo(f"removed: {counted(done.blocks, 'block')}, {format_size(done.size_bytes)}")
    if done.pinned or done.failed:
        raise click.ClickException(
            f"not removed: {counted(done.pinned, 'pinned block')}, and {done.failed:,} on their way or on a disk that "
            "does not let go of them"
        )


@click.command()
@click.argument("tier")
@click.argument("size", type=SIZE)
@SOCKET
@click.option("--blocks", type=click.IntRange(min=0), help="Most blocks. [default: no limit of its own]")
def resize(*, tier: str, size: int, address: str | None, blocks: int | None) -> None:
    """Let TIER take SIZE, until the cache is started again.

    A smaller tier evicts what its policy would give up first. The command ends when the new limit is in force.
    """
    with connected(address) as client:
        client.ask(ResizeTier(tier, size, blocks), Done)
    click.echo(f"tier {tier} may take {format_size(size)}; the configuration says what the next start gives it")


def _size_of(url: str, client: CacheClient) -> int:
    """Return what the blocks of a dataset, an object or a folder of objects take on a medium."""
    try:
        lengths, counts = np.unique(open_source(url, client).index.blocks.length, return_counts=True)
    except (BadInputError, NotFoundError):
        sizes = [meta.size_bytes for meta in client.list_objects(url)] or _object(url, client)
        lengths, counts = np.unique(np.asarray(sizes, np.int64), return_counts=True)
    costs = [-(-file_bytes(length) // _PAGE_BYTES) * _PAGE_BYTES for length in lengths.tolist()]
    return int(np.dot(costs, counts))


def _object(url: str, client: CacheClient) -> list[int]:
    try:
        return [client.head(url).size_bytes]
    except DataError as error:
        raise BadInputError(f"nothing is found at {url} ({error}); say with --size what will lie there") from error


def _warn(kept: PinsKept) -> None:
    if not kept.survive:
        click.echo("warning: the cache has no directory that could note this; it holds until the cache ends", err=True)
