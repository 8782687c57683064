"""The door to bytes: picks the reader for a URL and a wish about caching.

Who reads what:

    file:// on a local disk     mapped, in this process, unless a cache is asked for
    memory://                   in this process; nobody else has it
    everything else             through a server, since native clients of stores do not survive a fork

What stands behind a server is a ladder: the daemon, then a private server, then, for files, reading in place.
"""

from __future__ import annotations

import logging
import os
from functools import cache as once

from cache.address import ENVIRONMENT, answers, daemon_addresses, private_address, unused_address
from cache.client import CacheClient
from cache.config import CacheConfig, TierConfig
from cache.connection import Connection, ServerGoneError
from cache.direct import DirectReader
from cache.fallback import FallbackReader
from cache.in_place import InPlaceReader
from cache.reader import BlockData, BlockReader, ObjectData
from connectors.errors import BadInputError, DataError
from connectors.filesystems import is_local
from connectors.objects import normalise_url, split_uri

__all__ = ["DEFAULT_RAM_BYTES", "BlockData", "BlockReader", "ObjectData", "open_reader"]

_log = logging.getLogger(__name__)

DEFAULT_RAM_BYTES = 1 << 30
"""Memory for blocks of a private server that nobody configured."""

_GREETING_S = 1.0


def open_reader(
    url: str | os.PathLike[str], cache: str | CacheConfig | None = "auto", *, verify: bool = True
) -> BlockReader:
    """Open the right reader for everything below `url`. Before the first read it contacts nothing but a daemon.

    Args:
        url: Where the data lies; a plain path means `file://`.
        cache: `"auto"`: a local disk is read in place; for other data the daemon that `DATAFLOW_CACHE` names, or one
            that listens at a default address and takes this user, else a private server with `DEFAULT_RAM_BYTES`.
            None: a private server that keeps nothing (a local disk is read in place). A `CacheConfig`: a private server
            with those tiers. Any other string: a daemon's address.
        verify: Check `crc32c` of the references that carry one where no server does it.

    Raises:
        BadInputError: `cache` is none of these, or a server cannot reach the data.
    """
    url = normalise_url(url)
    root, key = split_uri(url)
    if not (cache is None or isinstance(cache, str | CacheConfig)):
        raise BadInputError(f'cache is "auto", None, an address or a CacheConfig; got {cache!r}')
    if root.startswith("memory:"):
        if isinstance(cache, CacheConfig):
            raise BadInputError("memory:// lives in this process, where no cache server can reach it; leave cache out")
        return DirectReader(url, verify=verify)
    is_file = root == "file:///"
    if is_file and cache in ("auto", None) and is_local("/" + key):
        return InPlaceReader(verify=verify)
    rungs = _servers(cache)
    if is_file:
        rungs.append(("reading in place", InPlaceReader(verify=verify)))
    return FallbackReader(rungs) if len(rungs) > 1 else rungs[0][1]


def _servers(cache: str | CacheConfig | None) -> list[tuple[str, BlockReader]]:
    """Return the rungs that are servers, each with what the log calls it."""
    if cache is None:
        return [("a private server", CacheClient(unused_address(), private=CacheConfig()))]
    if isinstance(cache, CacheConfig):
        return [("a private server", CacheClient(private_address(cache), private=cache))]
    address = _daemon() if cache == "auto" else cache
    private = (
        f"a private server with {DEFAULT_RAM_BYTES >> 20} MiB of memory",
        CacheClient(_process_address(), private=CacheConfig((TierConfig("ram", DEFAULT_RAM_BYTES),))),
    )
    return [private] if address is None else [(f"the cache server at {address}", CacheClient(address)), private]


def _daemon() -> str | None:
    """Return the address of the daemon to use: the one that was named, whether it answers or not, or one that does."""
    addresses = daemon_addresses()
    if os.environ.get(ENVIRONMENT):
        return addresses[0]
    return next((address for address in addresses if answers(address) and _takes_us(address)), None)


def _takes_us(address: str) -> bool:
    """Say whether a daemon that nobody named is one for this user, and speaks our protocol."""
    try:
        Connection(address, timeout_s=_GREETING_S).close()
    except ServerGoneError:
        pass  # slow or just leaving, of which the ladder takes care
    except DataError as error:
        _log.warning("%s; going on without it", str(error))
        return False
    return True


@once
def _process_address() -> str:
    """One unconfigured server a process, however many readers, so that its limit is a limit."""
    return unused_address()
