"""`dataflow cache top`: what the cache does, live."""

from __future__ import annotations

import itertools
import time
from functools import partial
from typing import Any

import click
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dataflow.cli.cache_client import SOCKET, connected
from dataflow.cli.sizes import format_size

__all__ = ["top"]


@click.command()
@SOCKET
@click.option(
    "--interval", "interval_s", type=click.FloatRange(min=0.05), default=1.0, show_default=True, help="Seconds."
)
@click.option("--count", type=click.IntRange(min=1), help="End after so many views. [default: at Ctrl-C]")
def top(*, address: str | None, interval_s: float, count: int | None) -> None:
    """Show hits, fill and origin traffic of the cache, live, as rates."""
    console = Console()
    with connected(address) as client, Live(console=console, auto_refresh=False) as live:
        # Into a file goes each view, where Live would only leave the last.
        show = partial(live.update, refresh=True) if console.is_terminal else console.print
        before, before_s = client.stats(), time.monotonic()
        for number in itertools.count(1):
            time.sleep(interval_s)
            now, now_s = client.stats(), time.monotonic()
            show(view(client.address, before, now, now_s - before_s))
            before, before_s = now, now_s
            if number == count:
                return


def view(address: str, before: dict[str, Any], now: dict[str, Any], seconds: float) -> Group:
    """Return what is shown for two readings of a server's numbers, `seconds` apart. Pure."""
    if before["server"]["pid"] != now["server"]["pid"]:  # another server: its counters began anew
        before = now
    tiers_before = {tier["name"]: tier for tier in [*before["tiers"], before["ring"]]}
    table = Table("tier", "fill", "", "blocks", "hits/s", "read/s", "written/s", "evicted/s", "fault", expand=True)
    hits = 0
    for tier in [*now["tiers"], now["ring"]]:
        earlier = tiers_before.get(tier["name"], tier)

        def rate(name: str, tier: dict[str, Any] = tier, earlier: dict[str, Any] = earlier) -> float:
            return float(tier[name] - earlier[name]) / seconds

        hits += tier["hits"] - earlier["hits"]
        table.add_row(
            tier["name"],
            f"{format_size(tier['used_bytes'])} of {format_size(tier['capacity_bytes'])}",
            ProgressBar(total=max(tier["capacity_bytes"], 1), completed=tier["used_bytes"], width=20),
            str(tier["blocks"]),
            f"{rate('hits'):.0f}",
            format_size(int(rate("hit_bytes"))),
            format_size(int(rate("written_bytes"))),
            f"{rate('evictions'):.0f}",
            Text(tier["fault"] or "", style="red"),
        )
    server = now["server"]
    asked = now["blocks_requested"] - before["blocks_requested"]
    origin, origin_before = now["origin"], before["origin"]
    fetched_bytes = int((origin["bytes"] - origin_before["bytes"]) / seconds)
    return Group(
        Text(
            f"{address}  process {server['pid']}  up {server['uptime_s']:.0f} s  {server['connections']} connections  "
            f"{(server['requests'] - before['server']['requests']) / seconds:.0f} requests/s"
        ),
        table,
        Text(
            f"{asked / seconds:.0f} blocks/s asked for, {hits / asked if asked else 1:.1%} found here; origin: "
            f"{(origin['requests'] - origin_before['requests']) / seconds:.0f} requests/s, "
            f"{format_size(fetched_bytes)}/s, {origin['errors'] - origin_before['errors']} failed"
        ),
    )
