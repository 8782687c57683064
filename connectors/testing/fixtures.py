"""pytest fixtures that start real servers; a plug-in: `pytest_plugins = ["connectors.testing.fixtures"]`."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from connectors.testing.seaweed import SeaweedServer

__all__ = ["s3_bucket", "s3_server"]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[SeaweedServer]:
    """A real S3 server, started for the first test that asks and stopped with the run. Mark such tests `s3`."""
    with SeaweedServer() as server:
        yield server


@pytest.fixture
def s3_bucket(s3_server: SeaweedServer) -> str:
    """The name of an empty bucket of its own."""
    name = f"bucket-{secrets.token_hex(6)}"
    s3_server.create_bucket(name)
    return name
