"""The cache that a command is about."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import click

from cache.address import answers, daemon_addresses
from cache.client import CacheClient, ClientOptions
from cache.connection import ServerGoneError

__all__ = ["SOCKET", "connected"]

SOCKET = click.option(
    "--socket", "address", help="Where the cache listens. [default: DATAFLOW_CACHE, else where it is found]"
)
TIMEOUT_S = 10.0


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[CacheClient]:
    """Yield a client of the cache that was named, or of the one that is found.

    Raises:
        click.ClickException: Nothing listens there.
    """
    candidates = daemon_addresses()
    address = address or next(filter(answers, candidates), candidates[0])
    client = CacheClient(address, options=ClientOptions(silence_timeout_s=TIMEOUT_S))
    with contextlib.closing(client):
        try:
            yield client
        except ServerGoneError as error:
            if not isinstance(error.__cause__, FileNotFoundError | ConnectionRefusedError):
                raise
            raise click.ClickException(
                f"{error}; start one with `dataflow cache serve`, or name another with --socket or DATAFLOW_CACHE"
            ) from error
