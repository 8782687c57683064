"""The cache that a command is about."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import click

from cache.address import answers, daemon_addresses
from cache.client import CacheClient, ClientOptions

__all__ = ["SOCKET", "connected"]

SOCKET = click.option(
    "--socket", "address", help="Where the cache listens. [default: DATAFLOW_CACHE, else where it is found]"
)
TIMEOUT_S = 10.0


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[CacheClient]:
    """Yield a client of the cache that was named, or of the one that is found."""
    candidates = daemon_addresses()
    address = address or next(filter(answers, candidates), candidates[0])
    client = CacheClient(address, options=ClientOptions(silence_timeout_s=TIMEOUT_S))
    with contextlib.closing(client):
        yield client
