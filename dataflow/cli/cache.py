"""`dataflow cache`: run this node's cache, or ask how it fares."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from cache.address import default_address, listen
from cache.client import CacheClient, ClientOptions
from cache.config import CacheConfig, TierConfig
from cache.daemon_config import DaemonConfig
from cache.ending import end_process
from cache.notify import notify
from cache.rights import AccessConfig
from cache.server import run_server
from dataflow.cli.cache_client import SOCKET, connected
from dataflow.cli.cache_drain import drain
from dataflow.cli.cache_keep import evict, pin, resize, unpin
from dataflow.cli.cache_top import top
from dataflow.cli.cache_usage import du, ls
from dataflow.cli.cache_verify import verify
from dataflow.cli.cache_warm import warm
from dataflow.cli.sizes import SIZE, format_size

__all__ = ["cache"]

DEFAULT_RAM = "4GiB"
HEALTH_TIMEOUT_S = 5.0


@click.group()
def cache() -> None:
    """Run this node's cache daemon, or ask it something."""


for command in (drain, du, evict, ls, pin, resize, top, unpin, verify, warm):
    cache.add_command(command)


@cache.command()
@click.option("--config", "config_path", type=click.Path(dir_okay=False), help="TOML file with tiers and limits.")
@click.option("--socket", "address", help="Where to listen: an absolute path, or @name. [default: found by clients]")
@click.option("--ram", type=SIZE, help=f"Memory for blocks.  [default: {DEFAULT_RAM}]")
@click.option("--disk", type=click.Path(file_okay=False), help="Directory for blocks; it survives a restart.")
@click.option("--disk-size", type=SIZE, help="Most bytes in that directory.")
@click.option("--allow-uid", "allowed_uids", type=int, multiple=True, help="Another user who may ask (repeatable).")
@click.option("--metrics", "endpoint", metavar="HOST:PORT", help="Serve /metrics for Prometheus and /healthz there.")
def serve(
    *,
    config_path: str | None,
    address: str | None,
    ram: int | None,
    disk: str | None,
    disk_size: int | None,
    allowed_uids: tuple[int, ...],
    endpoint: str | None,
) -> None:
    """Serve blocks to the programs of this machine until SIGTERM.

    Requests under way are still answered; a second SIGTERM ends it at once. Either way the next start finds what is in
    the directory.
    """
    access = AccessConfig("0666", allowed_uids=allowed_uids) if allowed_uids else AccessConfig()
    if config_path is None:
        config = _config(ram, disk, disk_size)
    elif (ram, disk, disk_size, allowed_uids) != (None, None, None, ()):
        raise click.UsageError("--config says everything; leave out --ram, --disk, --disk-size and --allow-uid")
    else:
        daemon = DaemonConfig.from_toml(config_path)
        config, access = daemon.cache, daemon.access
    address = address or default_address()
    with _metrics(endpoint, address) as port:
        listener = listen(address, mode=access.mode, group_id=access.group_id())
        run_server(
            config,
            listener,
            access=access,
            on_ready=lambda: _announce(address, config, port),
            on_stop=lambda: notify("STOPPING=1"),
        )
    end_process(0)


@contextlib.contextmanager
def _metrics(endpoint: str | None, address: str) -> Iterator[int | None]:
    """Serve the numbers of the server at `address`, where an endpoint is given; yields the port."""
    if endpoint is None:
        yield None
        return
    try:
        from cache.metrics import serve_metrics
    except ImportError as error:
        raise click.ClickException(str(error)) from error
    client = CacheClient(address, options=ClientOptions(silence_timeout_s=HEALTH_TIMEOUT_S))
    with contextlib.closing(client), serve_metrics(endpoint, client.stats) as port:
        yield port


def _config(ram: int | None, disk: str | None, disk_size: int | None) -> CacheConfig:
    if (disk is None) != (disk_size is None):
        raise click.UsageError("--disk and --disk-size belong together")
    ram_bytes: int = SIZE.convert(DEFAULT_RAM, None, None) if ram is None else ram
    tiers = [TierConfig("ram", ram_bytes)] if ram_bytes else []
    if disk is not None and disk_size is not None:
        tiers.append(TierConfig("disk", disk_size, path=disk, medium="nvme"))
    return CacheConfig(tuple(tiers))


def _announce(address: str, config: CacheConfig, metrics_port: int | None) -> None:
    tiers = ", ".join(f"{tier.name} {format_size(tier.capacity_bytes)}" for tier in config.tiers) or "no tiers"
    metrics = "" if metrics_port is None else f", metrics at port {metrics_port}"
    click.echo(f"listening at {address} ({tiers}){metrics}", err=True)
    notify("READY=1")


@cache.command()
@SOCKET
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object.")
def status(*, address: str | None, as_json: bool) -> None:
    """Show what the running cache holds and how often it was of use."""
    with connected(address) as client:
        stats = client.stats()
        address = client.address
    if as_json:
        click.echo(json.dumps(stats, indent=2))
    else:
        _show(address, stats, Console(markup=False, emoji=False))


def _show(address: str, stats: dict[str, Any], console: Console) -> None:
    server, origin = stats["server"], stats["origin"]
    console.print(
        f"{address}: process {server['pid']}, up {server['uptime_s']:.0f} s, {server['connections']} connections, "
        f"{server['requests']} requests, {stats['blocks_requested']} blocks asked for",
        soft_wrap=True,
        highlight=False,
    )
    table = Table("tier", "holds", "of", "blocks", "hits", "hit bytes", "evicted", "fault")
    for tier in [*stats["tiers"], stats["ring"]]:
        table.add_row(
            tier["name"],
            format_size(tier["used_bytes"]),
            format_size(tier["capacity_bytes"]),
            str(tier["blocks"]),
            str(tier["hits"]),
            format_size(tier["hit_bytes"]),
            str(tier["evictions"]),
            tier["fault"] or "",
        )
    console.print(table)
    console.print(
        f"origin: {origin['requests']} requests, {format_size(origin['bytes'])}, {origin['errors']} failed",
        highlight=False,
    )
    _show_retention(stats, console)


def _show_retention(stats: dict[str, Any], console: Console) -> None:
    pins, quotas = stats["retention"]["pins"], [quota for tier in stats["tiers"] for quota in tier["quotas"]]
    pinned_bytes = sum(tier["pinned_bytes"] for tier in stats["tiers"])
    if pins:
        pinnable = format_size(stats["retention"]["pinnable_bytes"])
        console.print(f"pinned: {format_size(pinned_bytes)} are here; pins may promise {pinnable}", highlight=False)
    for one in pins:
        end = one["expires_unix_s"]
        until = "" if end is None else f" until {datetime.fromtimestamp(end).astimezone():%Y-%m-%d %H:%M %Z}"
        console.print(f"  {one['prefix']}: {format_size(one['size_bytes'])}{until}", soft_wrap=True, highlight=False)
    for name in sorted({quota["name"] for quota in quotas}):
        used_bytes, limit_bytes = (
            sum(quota[what] for quota in quotas if quota["name"] == name) for what in ("used_bytes", "limit_bytes")
        )
        sizes = f"{format_size(used_bytes)} of {format_size(limit_bytes)}"
        console.print(f"quota of {name}: {sizes}", soft_wrap=True, highlight=False)
