"""Blocks from where they come from: planned into few requests, fetched within a budget, checked, sealed into memory."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from crc32c import crc32c

from cache.aimd import Aimd
from cache.budget import Budget, Errand
from cache.handle import Block, seal_block
from cache.keys import BlockRef
from cache.open_stores import OpenStores
from connectors.errors import (
    BadInputError,
    ChangedError,
    DataError,
    ErrorKind,
    ThrottledError,
    TransientError,
    error_from_kind,
)
from connectors.objects import ObjectMeta, Span
from connectors.protocols import Buffer, Store

__all__ = [
    "MAX_LISTED_OBJECTS",
    "MAX_OBJECT_BYTES",
    "MAX_OPEN_STORES",
    "MAX_REQUEST_BYTES",
    "Fetch",
    "Origin",
    "plan_fetches",
]

_log = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 8 * 1024 * 1024
"""Adjacent blocks share a request up to here: more would only make one connection carry what several carry faster."""

MAX_OBJECT_BYTES = 256 * 1024 * 1024
"""Largest object that `get_object` reads: it is meant for manifests."""

MAX_LISTED_OBJECTS = 10_000_000

MAX_OPEN_STORES = 64
"""Buckets, hosts and the like that stay open while nobody reads them."""

_OBJECT_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Fetch:
    """One request: adjacent blocks of one version of one object, in the order of their offsets."""

    blocks: tuple[tuple[bytes, BlockRef], ...]

    @property
    def size_bytes(self) -> int:
        """All blocks together."""
        return sum(ref.length for _, ref in self.blocks)


def plan_fetches(
    wanted: Sequence[tuple[bytes, BlockRef]], *, max_request_bytes: int, max_request_blocks: int | None = None
) -> list[Fetch]:
    """Group keyed blocks into requests. Pure.

    Blocks go together where one begins where the other ends, in one object and under one version rule, and while they
    stay within `max_request_bytes` and `max_request_blocks`.
    """
    runs: list[list[tuple[bytes, BlockRef]]] = []
    size_bytes = 0
    for key, ref in sorted(wanted, key=lambda item: (item[1].uri, _store_version(item[1]) or "", item[1].offset)):
        fits = size_bytes + ref.length <= max_request_bytes and runs and len(runs[-1]) != max_request_blocks
        if fits and _adjacent(runs[-1][-1][1], ref):
            runs[-1].append((key, ref))
            size_bytes += ref.length
        else:
            runs.append([(key, ref)])
            size_bytes = ref.length
    return [Fetch(tuple(run)) for run in runs]


def _adjacent(left: BlockRef, right: BlockRef) -> bool:
    return (
        left.uri == right.uri
        and _store_version(left) == _store_version(right)
        and left.offset + left.length == right.offset
    )


def _store_version(ref: BlockRef) -> str | None:
    """Return the version that the store must insist on: with a checksum, `ref.version` only names the content."""
    return ref.version if ref.crc32c is None else None


class Origin:
    """All requests to stores. Belongs to the event loop's thread.

    Args:
        open_store: Opens the store for a root URL; see `OpenStores`.
        budget: Limit on what is under way.
        executor: Threads in which bodies are checked and copied.
        max_request_bytes: Most bytes of several blocks in one request.
        max_request_blocks: Most blocks in one request, each of which is an open file once it is here; None: any number.
        hedge: See `OpenStores`.
    """

    def __init__(
        self,
        open_store: Callable[[str], Store],
        *,
        budget: Budget,
        executor: Executor,
        max_request_bytes: int,
        max_request_blocks: int | None = None,
        hedge: bool,
    ) -> None:
        self.requests = 0
        self.blocks = 0
        self.bytes = 0
        self.errors = 0
        self.throttled = 0
        self._stores = OpenStores(open_store, hedge=hedge, max_open=MAX_OPEN_STORES)
        self._budget = budget
        self._executor = executor
        self._max_request_bytes = max_request_bytes
        self._max_request_blocks = max_request_blocks
        self._aimd = Aimd(budget.max_requests)

    def plan(self, wanted: Sequence[tuple[bytes, BlockRef]]) -> list[Fetch]:
        """See `plan_fetches`."""
        return plan_fetches(
            wanted, max_request_bytes=self._max_request_bytes, max_request_blocks=self._max_request_blocks
        )

    async def fetch(self, fetch: Fetch, errand: Errand | None = None) -> list[Block | DataError]:
        """Fetch, check and seal; one result a block, in order. Never raises but for cancellation."""
        try:
            async with self._budget.spend(fetch.size_bytes, errand):
                bodies = await self._read(fetch)
                return await self._seal(fetch, bodies)
        except DataError as error:
            if len(fetch.blocks) > 1 and isinstance(error, BadInputError):
                # One span past the end of the object fails the request; the others are innocent.
                return [result for one in fetch.blocks for result in await self.fetch(Fetch((one,)), errand)]
            return [_blame(ref, error) for _, ref in fetch.blocks]

    def hurry(self, errand: Errand) -> None:
        """Somebody waits for this fetch now."""
        self._budget.hurry(errand)

    async def get_object(self, uri: str) -> tuple[bytes, str]:
        """Return content and version of the newest version of a small object.

        Raises:
            DataError: As the store says; `BadInputError` past `MAX_OBJECT_BYTES`.
        """
        for attempt in range(1, _OBJECT_ATTEMPTS + 1):
            meta = await self.head(uri)
            if meta.size_bytes > MAX_OBJECT_BYTES:
                raise BadInputError(
                    f"{uri} has {meta.size_bytes} bytes; only objects up to {MAX_OBJECT_BYTES} are read whole", uri=uri
                )
            try:
                async with self._budget.spend(meta.size_bytes), self._request(uri) as (store, key):
                    data = bytes(await store.get(key, version=meta.version))
            except ChangedError:
                # Replaced between the two requests: the new one is as good.
                if attempt == _OBJECT_ATTEMPTS:
                    raise
            else:
                self.bytes += len(data)
                return data, meta.version
        raise AssertionError("the loop returns or raises")

    async def head(self, uri: str) -> ObjectMeta:
        """Return what the store says about an object; its key is relative to the store."""
        async with self._budget.spend(0), self._request(uri) as (store, key):
            return await store.head(key)

    async def list_objects(self, url: str) -> list[ObjectMeta]:
        """Return all objects below `url`, sorted, with keys relative to it."""
        found: list[ObjectMeta] = []
        async with self._budget.spend(0), self._request(url) as (store, folder):
            prefix = f"{folder}/" if folder else ""
            async for meta in store.list(prefix):
                if len(found) == MAX_LISTED_OBJECTS:
                    raise BadInputError(f"{url} holds more than {MAX_LISTED_OBJECTS} objects", uri=url)
                found.append(replace(meta, key=meta.key.removeprefix(prefix)))
        return found

    async def close(self) -> None:
        """Close every store that was opened."""
        await self._stores.close()

    def stats(self) -> dict[str, int]:
        """Return requests, blocks, bytes, failed requests, the limit on requests at once, and hedges."""
        hedges_sent, hedges_won = self._stores.hedges()
        return {
            "requests": self.requests,
            "blocks": self.blocks,
            "bytes": self.bytes,
            "errors": self.errors,
            "throttled": self.throttled,
            "max_requests": self._budget.max_requests,
            "hedges_sent": hedges_sent,
            "hedges_won": hedges_won,
        }

    async def _read(self, fetch: Fetch) -> Sequence[Buffer]:
        first = fetch.blocks[0][1]
        spans = [Span(ref.offset, ref.length) for _, ref in fetch.blocks]
        async with self._request(first.uri) as (store, key):
            if len(spans) == 1:
                return [await store.get_range(key, spans[0], version=_store_version(first))]
            return await store.get_ranges(key, spans, version=_store_version(first))

    async def _seal(self, fetch: Fetch, bodies: Sequence[Buffer]) -> list[Block | DataError]:
        if len(bodies) != len(fetch.blocks):
            raise DataError(f"the store answered {len(fetch.blocks)} spans with {len(bodies)} bodies")
        self.blocks += len(bodies)
        self.bytes += sum(len(body) for body in bodies)
        return await asyncio.get_running_loop().run_in_executor(self._executor, _check_and_seal, fetch, bodies)

    @contextlib.asynccontextmanager
    async def _request(self, uri: str) -> AsyncIterator[tuple[Store, str]]:
        """Give the store and the key; count the request and its failure; what is not a `DataError` becomes one."""
        self.requests += 1
        try:
            async with self._stores.use(uri) as found:
                yield found
        except DataError as error:
            self.errors += 1
            if isinstance(error, ThrottledError):
                self.throttled += 1
                self._aimd.refused(asyncio.get_running_loop().time())
                self._budget.max_requests = self._aimd.max_requests
            raise
        except Exception as error:
            self.errors += 1
            _log.exception("the store of %s failed in an unknown way", uri)
            raise DataError(f"the store of {uri} failed: {error!r}", uri=uri) from error
        else:
            self._aimd.answered()
            self._budget.max_requests = self._aimd.max_requests


def _check_and_seal(fetch: Fetch, bodies: Sequence[Buffer]) -> list[Block | DataError]:
    return [_check_and_seal_one(key, ref, body) for (key, ref), body in zip(fetch.blocks, bodies, strict=True)]


def _check_and_seal_one(key: bytes, ref: BlockRef, body: Buffer) -> Block | DataError:
    if len(body) != ref.length:
        return TransientError(
            f"{ref.uri}: asked for {ref.length} bytes at offset {ref.offset}, the store gave {len(body)}",
            kind=ErrorKind.SHORT_BODY,
            uri=ref.uri,
        )
    if ref.crc32c is not None and crc32c(body) != ref.crc32c:
        return ChangedError(
            f"{ref.uri}: the {ref.length} bytes at offset {ref.offset} are not those that the index describes "
            f"(crc32c); the object was overwritten or damaged: convert it again, or open the index that fits it",
            uri=ref.uri,
        )
    try:
        return seal_block(key, body)
    except OSError as error:
        advice = "; raise its hard limit (ulimit -Hn)" if error.errno == errno.EMFILE else ""
        message = f"{ref.uri}: the cache has no memory for a block of {ref.length} bytes: {error}{advice}"
        return TransientError(message, uri=ref.uri)


def _blame(ref: BlockRef, error: DataError) -> DataError:
    """Give each block an error of its own, which says which bytes are concerned."""
    return error_from_kind(error.kind, f"{ref.length} bytes at offset {ref.offset} of {ref.uri}: {error}", ref.uri)
