"""`dataflow cache ls` and `du`: what the cache holds."""

from __future__ import annotations

import json
from collections.abc import Iterator

import click
from rich.console import Console
from rich.table import Table

from cache.client import CacheClient
from cache.orders import AskUsage, Held, Usage
from connectors.objects import normalise_url
from dataflow.cli.cache_client import SOCKET, connected
from dataflow.cli.sizes import format_size

__all__ = ["du", "held", "ls"]

_UNKNOWN = "(unknown)"
_NUMBERS_WIDTH = 400
AS_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")


def held(client: CacheClient, url: str, *, depth: int) -> Iterator[Usage]:
    """Yield what a server holds at and below a URL, page by page; see `cache.administration.Administration.usage`."""
    after, more = "", True
    while more:
        answer = client.ask(AskUsage(url, depth, after), Held)
        yield from answer.rows
        more = answer.more and bool(answer.rows)
        after = answer.rows[-1].name if more else ""


@click.command()
@click.argument("url", default="")
@SOCKET
@AS_JSON
def ls(*, url: str, address: str | None, as_json: bool) -> None:
    """List what the cache holds directly below URL.

    Names that end in a slash are folders. Without URL, it lists the stores. Sizes are what the blocks take in each
    tier; a block in two tiers counts in both.
    """
    with connected(address) as client:
        url = normalise_url(url) if url else ""
        found = False
        if as_json:
            for row in held(client, url, depth=1):
                found = True
                click.echo(_json(row))
        else:
            tiers = [tier["name"] for tier in client.stats()["tiers"]]
            rows = list(held(client, url, depth=1))
            found = bool(rows)
            _show(rows, tiers)
        if url and not found:
            raise click.ClickException(f"the cache holds nothing at or below {url}")


@click.command()
@click.argument("urls", nargs=-1)
@SOCKET
@AS_JSON
def du(*, urls: tuple[str, ...], address: str | None, as_json: bool) -> None:
    """Show how much of each of URLS the cache holds, tier by tier.

    Without URLS, it shows each store.
    """
    with connected(address) as client:
        tiers = [tier["name"] for tier in client.stats()["tiers"]]
        rows = [] if urls else list(held(client, "", depth=1))
        for url in map(normalise_url, urls):
            rows += list(held(client, url, depth=0)) or [Usage(url)]
    if as_json:
        for row in rows:
            click.echo(_json(row))
    else:
        _show(rows, tiers)


def _json(row: Usage) -> str:
    return json.dumps(
        {
            "name": row.name or None,
            "blocks": sum(row.blocks.values()),
            "size_bytes": sum(row.size_bytes.values()),
            "pinned_bytes": row.pinned_bytes,
            "tiers": {
                name: {"blocks": row.blocks[name], "size_bytes": row.size_bytes[name]} for name in sorted(row.blocks)
            },
        }
    )


def _show(rows: list[Usage], tiers: list[str]) -> None:
    table = Table("name", "blocks", *tiers, "pinned")
    for row in rows:
        sizes = [format_size(row.size_bytes.get(name, 0)) for name in tiers]
        table.add_row(row.name or _UNKNOWN, str(sum(row.blocks.values())), *sizes, format_size(row.pinned_bytes))
    # Names are for copying, so they are never cut.
    longest = max((len(row.name) for row in rows), default=0)
    Console(width=longest + _NUMBERS_WIDTH, markup=False, emoji=False).print(table)
