"""The heart of a cache server: look up, join or fetch, place.

    get_many -> Stack.find / open       in memory at once; directories in one job each
             -> SingleFlight.join       somebody fetches it already
             -> Origin.fetch            one task a request; ends in Stack.place, then every waiter gets the block
    plans    -> Prefetcher.pump         the same fetches, begun before anybody waits for them

A fetched block goes to its waiters from memory, whatever becomes of its placement. The tasks belong to the engine, not
to the callers: one that gives up changes nothing for the others. Everything runs on one event loop; only blocking file
calls and the checking of what was fetched run in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

from cache.administration import Administration
from cache.budget import Budget, Errand
from cache.catalogue import Catalogue
from cache.config import CacheConfig, PolicyName, TierConfig
from cache.disk import DiskLimits
from cache.handle import Block, Handle
from cache.keys import BlockRef, block_key
from cache.memory_shelf import raise_open_file_limit, split_open_files
from cache.opening import limits_of, memory_level, open_levels
from cache.origin import MAX_REQUEST_BYTES, Fetch, Origin
from cache.plan import Futures
from cache.policy import Auto, Detector, DropBehind, Guarded, KeptSet, Lru, NextUse, Policy, S3Fifo
from cache.prefetch import Prefetcher, Work
from cache.singleflight import SingleFlight
from cache.stack import Stack, Stored
from cache.tier import Tier
from cache.window import Window
from connectors.errors import BadInputError, DataError, TransientError
from connectors.objects import ObjectMeta
from connectors.protocols import Store
from connectors.registry import open_store as open_registered_store

__all__ = ["Engine", "Handle"]

_log = logging.getLogger(__name__)

_POLICIES: dict[str, Callable[[], Policy]] = {"kept": KeptSet, "lru": Lru, "s3fifo": S3Fifo, "drop_behind": DropBehind}
_CHECKING_THREADS = 2
_CLOSE_TIMEOUT_S = 10.0
_RESIZE_ROUNDS = 4
_RESIZE_PAUSE_S = 10.0
# The rest of the ring is for what nobody announced.
_WINDOW_SHARE = 0.75
_MIN_WINDOW_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class _Request:
    """One call of `get_many`: by position, what is answered and what is being fetched; and where it looked in vain."""

    refs: Sequence[BlockRef]
    job: str
    results: dict[int, Handle | DataError] = field(default_factory=dict)
    flights: dict[int, asyncio.Future[Block | DataError]] = field(default_factory=dict)
    missed: set[tuple[Tier, bytes]] = field(default_factory=set)


class Engine:
    """One cache in one process. Every method belongs to the event loop that ran `start`.

    Args:
        config: Tiers and limits.
        open_store: Opens the store for a root URL such as `s3://bucket`.
        system: The module of system calls that directories are written with; tests give one that fails or dies.
        disk_limits: When a disk is distrusted and trusted again.
        clock: Seconds of the wall clock, for what has an age or an end.

    Attributes:
        administration: Pins, evictions and what is held, for operators.
    """

    def __init__(
        self,
        config: CacheConfig,
        *,
        open_store: Callable[[str], Store] = open_registered_store,
        system: Any = os,
        disk_limits: DiskLimits = DiskLimits(),  # noqa: B008  frozen
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._open_store = open_store
        self._system = system
        self._disk_limits = disk_limits
        self._running = False
        self._blocks_requested = 0
        self._flights: SingleFlight[bytes, Block | DataError] = SingleFlight()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ahead: dict[Work, asyncio.Task[None]] = {}
        self._futures = Futures()
        self._detector = Detector()
        # Those of quotas come and go.
        self._planned_policies: weakref.WeakSet[NextUse] = weakref.WeakSet()
        self._catalogue = Catalogue(config, clock)
        self._sweeping: asyncio.Task[None] | None = None
        self._resizing = asyncio.Lock()
        self._checkers = ThreadPoolExecutor(_CHECKING_THREADS, thread_name_prefix="cache-check")

    async def start(self) -> None:
        """Open the tiers. Directories are scanned behind; blocks in them are found meanwhile, but none is let in.

        Raises:
            BadInputError: Another server has a directory, or more blocks are asked for than files may be open.
            PermissionDeniedError: A directory cannot be written.
        """
        config = self._config
        shelves = 1 + sum(tier.path is None for tier in config.tiers)
        in_memory, arriving = split_open_files(raise_open_file_limit())
        self._memory_blocks = memory_blocks = in_memory // shelves
        levels = await open_levels(
            config,
            policy=self._guarded,
            catalogue=self._catalogue,
            max_memory_blocks=memory_blocks,
            system=self._system,
            disk_limits=self._disk_limits,
        )
        ring_config = TierConfig("none", config.ring_bytes, policy="lru")
        ring = memory_level("ring", ring_config, self._policy("ring"), max_blocks=memory_blocks)
        self._stack = Stack(levels, ring, max_promoting_bytes=config.max_inflight_bytes)
        self.administration = Administration(self._stack, self._catalogue, self._flights.__contains__)
        self._origin = Origin(
            self._open_store,
            budget=Budget(max_bytes=config.max_inflight_bytes, max_requests=config.max_inflight_requests),
            executor=self._checkers,
            max_request_bytes=min(MAX_REQUEST_BYTES, config.max_inflight_bytes),
            max_request_blocks=arriving,
            hedge=config.hedge,
        )
        self.prefetcher = Prefetcher(
            self,
            futures=self._futures,
            window=Window(min_bytes=_MIN_WINDOW_BYTES, max_bytes=int(_WINDOW_SHARE * config.ring_bytes)),
            clock=time.monotonic,
            spare_bytes=self._stack.spare_bytes,
        )
        self._stack.on_passing = self.prefetcher.passing
        self._running = True
        self._sweeping = asyncio.create_task(self.administration.sweep_again_and_again())

    async def scanned(self) -> None:
        """Wait until every directory is known, and so lets blocks in."""
        for level in self._stack.levels:
            for tier in level.members:
                await tier.scanned()

    async def settle(self) -> None:
        """Wait until every fetched block lies where it is kept; meanwhile it is found in memory, as if in the ring."""
        await self._stack.settle()

    async def close(self) -> None:
        """End the fetches with an error for their waiters, finish the placements, let go of everything.

        Handles already given out stay valid. Closing twice is harmless.
        """
        if not self._running:
            return
        self._running = False
        self.prefetcher.stop()
        if self._sweeping is not None:
            self._sweeping.cancel()
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(list(self._tasks))
        await self._stack.close(_CLOSE_TIMEOUT_S)
        await self._origin.close()
        await asyncio.to_thread(self._checkers.shutdown)

    async def get_many(self, refs: Sequence[BlockRef], *, job: str = "") -> list[Handle | DataError]:
        """Find or fetch blocks; one result each, in the order of `refs`.

        A block that several callers miss at once is fetched once. A failed fetch is reported to all who wait for it and
        is not remembered. The caller owns the handles. What is fetched falls under the quotas of `job`.
        """
        self._blocks_requested += len(refs)
        request = _Request(refs, job)
        todo = [(position, block_key(ref)) for position, ref in enumerate(refs)]
        if self._running:
            self.prefetcher.demand([(key, refs[position]) for position, key in todo])
            for position, key in todo:
                self._detector.observe(key, refs[position])
            if self._catalogue.retention.watchful:
                stale = [key for position, key in todo if self._catalogue.stale(key, refs[position].uri)]
                await self.administration.refuse([key for key in stale if self._stack.holds(key)])
        # A second round looks again for what a directory was thought to hold.
        while todo:
            stored = self._look_up(request, todo)
            todo = []
            for tier, entries in stored.items():
                todo += await self._open(request, tier, entries)
        if self._running:
            self.prefetcher.pump()
        if request.flights:
            self.prefetcher.missed()
            await asyncio.wait(set(request.flights.values()))
        for position, flight in request.flights.items():
            result = flight.result()
            if isinstance(result, Block):
                request.results[position] = Handle(result.memory, result.length, "origin")
            else:
                request.results[position] = result
        return [request.results[position] for position in range(len(refs))]

    async def report_bad(self, ref: BlockRef) -> None:
        """A reader found the bytes of a block to be wrong. Where they are, the next one gets it from the origin."""
        if self._running:
            await self._stack.check(block_key(ref), ref.length)

    async def resize(self, name: str, *, capacity_bytes: int, capacity_blocks: int | None = None) -> None:
        """Change the limits of a tier while it is in use. A smaller one evicts, as its policy likes, and offers below.

        The limit in force sinks with what is evicted and is never exceeded; several directories get their parts. The
        next start takes the limits of the configuration again.

        Args:
            name: The tier's.
            capacity_bytes: As in `TierConfig`.
            capacity_blocks: As in `TierConfig`.

        Raises:
            BadInputError: There is no such tier, or the limits cannot be.
            TransientError: A disk does not let go of enough; the limit in force is as low as it could be made.
        """
        self._check_running()
        config = next((tier for tier in self._config.tiers if tier.name == name), None)
        if config is None:
            known = ", ".join(tier.name for tier in self._config.tiers) or "none"
            raise BadInputError(f"there is no tier {name!r}; there are: {known}")
        config = replace(config, capacity_bytes=capacity_bytes, capacity_blocks=capacity_blocks)
        limits = limits_of(config, max_memory_blocks=self._memory_blocks)
        self._check_pins(name, limits)
        # A tier that is to shrink takes nothing, so it is not left half-way when who asked has gone.
        await asyncio.shield(self._begin(self._resize(config, limits)))

    async def get_object(self, uri: str) -> tuple[bytes, str]:
        """Return content and version of the newest version of a small object, past all tiers; see `Origin`."""
        self._check_running()
        return await self._origin.get_object(uri)

    async def head(self, uri: str) -> ObjectMeta:
        """Return size and version of an object, its key relative to its store."""
        self._check_running()
        return await self._origin.head(uri)

    async def list_objects(self, url: str) -> list[ObjectMeta]:
        """Return all objects below `url`, sorted, their keys relative to it."""
        self._check_running()
        return await self._origin.list_objects(url)

    def stats(self) -> dict[str, Any]:
        """Return what happened since `start`, as JSON types."""
        return {
            "tiers": [level.stats() for level in self._stack.levels],
            "ring": self._stack.ring.stats(),
            "origin": self._origin.stats(),
            "blocks_requested": self._blocks_requested,
            "joined": self._flights.joined,
            "prefetch": self.prefetcher.stats(),
            "pattern": asdict(self._detector.pattern()),
            "retention": self.administration.stats(),
        }

    def has(self, key: bytes) -> bool:
        """See `cache.prefetch.Fetcher`."""
        return key in self._flights or self._stack.holds(key)

    def passes_by(self, key: bytes) -> bool:
        """See `cache.prefetch.Fetcher`."""
        return self._stack.passes_by(key)

    def fetch_ahead(self, wanted: Sequence[tuple[bytes, BlockRef]]) -> list[Work]:
        """See `cache.prefetch.Fetcher`."""
        begun = []
        places = {key: place for place, (key, _) in enumerate(wanted)}
        # In the order of the plan, whatever order puts neighbours together.
        for fetch in sorted(self._origin.plan(wanted), key=lambda fetch: min(places[key] for key, _ in fetch.blocks)):
            for key, ref in fetch.blocks:
                self._flights.begin(key)
                self._catalogue.note(key, ref.uri, self._futures.job_of(key))
            work = Work(fetch, Errand(awaited=False))
            begun.append(work)
            self._begin_fetch(fetch, work)
        self.administration.prune()
        return begun

    def hurry(self, work: Work) -> None:
        """See `cache.prefetch.Fetcher`."""
        self._origin.hurry(work.errand)

    def withdraw(self, work: Work) -> None:
        """See `cache.prefetch.Fetcher`."""
        for key, _ in work.fetch.blocks:
            self._flights.withdraw(key)
        self._ahead.pop(work).cancel()

    def rerank(self, keys: Iterable[bytes]) -> None:
        """See `cache.prefetch.Fetcher`."""
        keys = list(keys)
        for policy in self._planned_policies:
            policy.rerank(keys)

    def measure(self, uri: str) -> None:
        """See `cache.prefetch.Fetcher`."""
        if self._running:
            self._begin(self._measure(uri))

    async def _measure(self, uri: str) -> None:
        # Nobody waits for it: where it fails, nothing is guessed.
        with contextlib.suppress(DataError, asyncio.CancelledError):
            meta = await self._origin.head(uri)
            self.prefetcher.measured(uri, meta.version, meta.size_bytes)

    def _look_up(self, request: _Request, todo: Sequence[tuple[int, bytes]]) -> dict[Tier, list[tuple[int, Stored]]]:
        """Answer what is in memory, join or begin the fetch of what is nowhere, return what directories may hold."""
        refs, missed, find = request.refs, request.missed, self._stack.find
        stale = self._catalogue.stale if self._catalogue.retention.watchful else None
        stored: defaultdict[Tier, list[tuple[int, Stored]]] = defaultdict(list)
        cold: list[tuple[bytes, BlockRef]] = []
        for position, key in todo:
            if not self._running:
                request.results[position] = _closed(refs[position])
                continue
            if stale is not None and stale(key, refs[position].uri):
                found = None
            else:
                found = find(key, refs[position].length, missed)
            if isinstance(found, Handle):
                request.results[position] = found
            elif found is not None:
                stored[found.tier].append((position, found))
            else:
                flight = self._flights.join(key)
                if flight is None:
                    flight = self._flights.begin(key)
                    self._catalogue.note(key, refs[position].uri, request.job)
                    cold.append((key, refs[position]))
                else:
                    self.prefetcher.joined(key)
                request.flights[position] = flight
        # No await since `find`: nobody else has begun to fetch these.
        for fetch in self._origin.plan(cold) if cold else ():
            self._begin_fetch(fetch)
        if cold:
            self.administration.prune()
        return stored

    async def _open(
        self, request: _Request, tier: Tier, entries: Sequence[tuple[int, Stored]]
    ) -> list[tuple[int, bytes]]:
        """Answer what a directory holds; return what it does not."""
        if not self._running:
            # The next look-up says so.
            return [(position, entry.key) for position, entry in entries]
        try:
            handles = await self._stack.open(tier, [entry for _, entry in entries])
        except OSError as error:
            for position, _ in entries:
                request.results[position] = _no_files(request.refs[position], error)
            return []
        absent: list[tuple[int, bytes]] = []
        for (position, entry), handle in zip(entries, handles, strict=True):
            if handle is not None:
                request.results[position] = handle
            else:
                request.missed.add((tier, entry.key))
                absent.append((position, entry.key))
        return absent

    def _begin_fetch(self, fetch: Fetch, work: Work | None = None) -> None:
        task = self._begin(self._fetch(fetch, work))
        task.add_done_callback(partial(self._fetch_ended, fetch, work))
        if work is not None:
            self._ahead[work] = task

    def _fetch_ended(self, fetch: Fetch, work: Work | None, task: asyncio.Task[None]) -> None:
        # Only a task that was cancelled before its first step ends as cancelled: nothing in it has told the waiters.
        if task.cancelled() and (work is None or work in self._ahead):
            for key, ref in fetch.blocks:
                self._flights.land(key, _closed(ref))

    async def _fetch(self, fetch: Fetch, work: Work | None) -> None:
        results: Sequence[Block | DataError]
        try:
            results = await self._origin.fetch(fetch, None if work is None else work.errand)
        except asyncio.CancelledError:
            if work is not None and work not in self._ahead:
                return  # withdrawn: nobody waits, and others may fetch the same blocks by now
            results = [_closed(ref) for _, ref in fetch.blocks]
        except Exception as error:  # noqa: BLE001  whatever went wrong, the waiters are told
            _log.exception("a fetch failed in an unknown way")
            results = [DataError(f"the fetch of {ref.uri} failed: {error!r}", uri=ref.uri) for _, ref in fetch.blocks]
        for (key, _), result in zip(fetch.blocks, results, strict=True):
            self._flights.land(key, result)
        for result in results:
            if isinstance(result, Block):
                self._stack.place(result)
        if work is not None:
            del self._ahead[work]
            self.prefetcher.landed(work, [isinstance(result, Block) for result in results])

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _resize(self, config: TierConfig, limits: Sequence[tuple[int, int]]) -> None:
        async with self._resizing:
            for _ in range(_RESIZE_ROUNDS):
                if await self._stack.resize(config.name, limits):
                    break
                # What was on its way in could not be evicted yet.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.settle(), _RESIZE_PAUSE_S)
            else:
                reason = "the disk does not let go of enough; see its state and try again"
                raise TransientError(f"tier {config.name}: {reason}")
            for guard, (limit_bytes, _) in self._guards(config.name, limits):
                guard.max_pinned_bytes = self._catalogue.pinnable_bytes(limit_bytes)
            tiers = tuple(config if tier.name == config.name else tier for tier in self._config.tiers)
            self._config = replace(self._config, tiers=tiers)

    def _check_pins(self, name: str, limits: Sequence[tuple[int, int]]) -> None:
        for guard, (limit_bytes, _) in self._guards(name, limits):
            if guard.pinned_bytes > limit_bytes:
                raise BadInputError(
                    f"tier {name} holds {guard.pinned_bytes} pinned bytes where {limit_bytes} would be left; "
                    "unpin something first"
                )

    def _guards(self, name: str, limits: Sequence[tuple[int, int]]) -> Iterator[tuple[Guarded, tuple[int, int]]]:
        level = next(level for level in self._stack.levels if level.name == name)
        for tier, limit in zip(level.members, limits, strict=True):
            if tier.guard is not None:
                yield tier.guard, limit

    def _guarded(self, name: PolicyName, capacity_bytes: int) -> Policy:
        return self._catalogue.guard(partial(self._policy, name), capacity_bytes)

    def _policy(self, name: PolicyName | Literal["ring"]) -> Policy:
        policy: Policy
        match name:
            case "ring" | "next_use":
                is_ring = name == "ring"
                use = self._futures.near_use if is_ring else self._futures.next_use
                policy = NextUse(use, otherwise="recent" if is_ring else "lowest_key")
                self._planned_policies.add(policy)
            case "auto":
                policy = Auto(self._detector.pattern)
            case _:
                policy = _POLICIES[name]()
        return policy

    def _check_running(self) -> None:
        if not self._running:
            raise TransientError("the cache is closed")


def _closed(ref: BlockRef) -> DataError:
    return TransientError(
        f"the cache closed before it had {ref.length} bytes at offset {ref.offset} of {ref.uri}", uri=ref.uri
    )


def _no_files(ref: BlockRef, error: OSError) -> DataError:
    return TransientError(
        f"cannot open a cached block of {ref.uri}: {error}; ask for fewer blocks at once", uri=ref.uri
    )
