"""Engines for tests: started, with every directory known, and closed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from cache.config import CacheConfig
from cache.engine import Engine

__all__ = ["running_engine"]


@asynccontextmanager
async def running_engine(config: CacheConfig, **settings: Any) -> AsyncIterator[Engine]:
    """Run an engine until the context ends; `settings` as for `Engine`."""
    engine = Engine(config, **settings)
    await engine.start()
    try:
        await engine.scanned()
        yield engine
    finally:
        await engine.close()
