"""`dataflow cache drain`: let the cache answer what it was asked, and end."""

from __future__ import annotations

import os
import select
import signal
import socket

import click

from cache.address import peer, socket_address
from connectors.errors import BadInputError
from dataflow.cli.cache_client import SOCKET, connected

__all__ = ["drain"]


@click.command()
@SOCKET
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0), default=30.0, show_default=True, help="Seconds.")
def drain(*, address: str | None, timeout_s: float) -> None:
    """Shut the cache down, and wait until it has ended.

    It still answers requests under way, and what is on disk stays. A service manager that would start it again has to
    be told first.
    """
    with connected(address) as client:
        client.stats()  # it lives
        address = client.address
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(socket_address(address))
        pid, _ = peer(connection)
    if pid <= 0:
        raise BadInputError(f"the process at {address} is not visible here (a container?); end it where it runs")
    descriptor = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGTERM)
        if not select.select([descriptor], [], [], timeout_s)[0]:
            raise click.ClickException(f"process {pid} has not ended within {timeout_s:g} s; a second signal ends it")
    except PermissionError as error:
        raise click.ClickException(f"process {pid} belongs to another user: {error.strerror}") from error
    finally:
        os.close(descriptor)
    click.echo(f"process {pid} has ended")
