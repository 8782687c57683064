"""What operators do with a running cache, and what it does by itself with time: look, pin, evict, expire.

Nothing is kept for it: each call walks over the blocks that the tiers hold, a slice at a time so that readers are not
held up, which takes a second or so for a million of them. Blocks that come or go meanwhile are seen or not.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable
from typing import Any

from cache.catalogue import Catalogue
from cache.labels import Label
from cache.orders import Evicted, Usage
from cache.pins import Pin
from cache.prefixes import covers, fold
from cache.stack import Stack
from cache.tier import Tier
from connectors.errors import DataError
from connectors.objects import normalise_url, split_uri

__all__ = ["MAX_ROWS", "Administration"]

MAX_ROWS = 4096
"""Names in one answer."""

_log = logging.getLogger(__name__)

# The end of a pin is noticed so late.
_SWEEP_EVERY_S = 60.0
_MAX_NAME_BYTES = 2 * 1024 * 1024
_SLICE = 4096
_EVICTIONS_AT_ONCE = 16
# Labels of blocks that are gone which are put up with.
_SLACK_LABELS = 8192


class Administration:
    """Belongs to the event loop's thread.

    Args:
        stack: The tiers.
        catalogue: What is known of their blocks.
        in_flight: Whether a block is being fetched.

    Attributes:
        expired: Blocks that were removed because they were too old.
        failed_sweeps: Sweeps that ended by an error which nobody expected.
    """

    def __init__(self, stack: Stack, catalogue: Catalogue, in_flight: Callable[[bytes], bool]) -> None:
        self.expired = self.failed_sweeps = 0
        self._stack = stack
        self._catalogue = catalogue
        self._in_flight = in_flight
        self._tiers = [tier for level in (*stack.levels, stack.ring) for tier in level.members]
        self._asking = asyncio.Lock()
        self._swept_s = -math.inf
        self._pruning = False
        self._prune_at = _SLACK_LABELS
        catalogue.on_pins = self._refresh_behind

    async def usage(
        self, prefix: str, *, depth: int = 1, after: str = "", limit: int = MAX_ROWS, visible: Callable[[str], bool]
    ) -> tuple[list[Usage], bool]:
        """Sum up what the tiers hold at and below a URL. One asker at a time; the others wait.

        Args:
            prefix: The URL; empty: everything.
            depth: 0 for one sum, 1 for one a name directly below.
            after: Leave out names up to this one.
            limit: Most names.
            visible: Which objects the asker may hear of.

        Returns:
            Names in their order with what is held of them, and whether there are more.
        """
        prefix = normalise_url(prefix) if prefix else ""
        names: dict[Label | None, str | None] = {}
        rows: dict[str, Usage] = {}
        more = False
        async with self._asking:
            async for tier, keys in self._slices():
                guard = tier.guard
                for key in keys:
                    label = self._catalogue.labels.get(key)
                    if label not in names:
                        if len(names) > _SLICE:
                            names.clear()
                        names[label] = _name(label, prefix, depth, visible)
                    name = names[label]
                    size_bytes = None if guard is None else guard.size_of(key)
                    if name is None or size_bytes is None or (after and name <= after):
                        continue
                    row = rows.get(name)
                    if row is None:
                        row = rows[name] = Usage(name)
                    row.blocks[tier.name] = row.blocks.get(tier.name, 0) + 1
                    row.size_bytes[tier.name] = row.size_bytes.get(tier.name, 0) + size_bytes
                    row.pinned_bytes += size_bytes if guard is not None and guard.protects(key) else 0
                if len(rows) > 2 * limit:
                    # Whatever comes, what is behind so many names stays behind them.
                    more = True
                    for name in sorted(rows)[limit:]:
                        del rows[name]
        found: list[Usage] = []
        size_bytes = 0
        for name in sorted(rows):
            size_bytes += len(name)
            if len(found) == limit or (found and size_bytes > _MAX_NAME_BYTES):
                more = True
                break
            found.append(rows[name])
        return found, more

    async def pin(self, prefix: str, *, size_bytes: int, expires_s: float | None, uid: int) -> bool:
        """Pin all that lies at or below a URL, and what comes later; see `cache.pins`.

        Args:
            prefix: The URL.
            size_bytes: What lies there.
            expires_s: After how many seconds it ends; None: when it is taken back.
            uid: Who wants it.

        Returns:
            Whether a directory has written it down, so that it survives a restart.

        Raises:
            BadInputError: It cannot be kept beside what is pinned already.
        """
        await self._scanned()
        now_s = self._catalogue.clock()
        pin = Pin(normalise_url(prefix), size_bytes, None if expires_s is None else now_s + expires_s, uid)
        self._catalogue.pins.add(pin, limit_bytes=self.pinnable_bytes, now_s=now_s)
        return await asyncio.shield(self._stack.begin(self._pins_changed()))

    async def unpin(self, prefix: str) -> bool:
        """Take a pin back; returns as `pin`.

        Raises:
            NotFoundError: There is none for exactly this URL.
        """
        await self._scanned()
        self._catalogue.pins.remove(prefix)
        return await asyncio.shield(self._stack.begin(self._pins_changed()))

    async def evict(self, prefix: str) -> Evicted:
        """Remove what the tiers hold at and below a URL, but for what is pinned."""
        root, done = fold(prefix), Evicted()
        await self._scanned()
        async for tier, keys in self._slices():
            chosen = []
            for key in keys:
                label = self._catalogue.labels.get(key)
                if label is None or not covers(root, label.uri):
                    continue
                if self._catalogue.is_pinned(key):
                    done.pinned += tier.guard is not None
                else:
                    chosen.append(key)
            await self._evict(tier, chosen, done)
        return done

    async def sweep_again_and_again(self) -> None:
        """Sweep until cancelled. One that fails is counted, the first in a row logged, and the next one tried."""
        failing = False
        while True:
            await asyncio.sleep(min(self._catalogue.retention.sweep_every_s or _SWEEP_EVERY_S, _SWEEP_EVERY_S))
            try:
                if await self.sweep():
                    failing = False
            except Exception:  # noqa: BLE001  else nothing would be swept any more
                self.failed_sweeps += 1
                if not failing:
                    _log.exception("a sweep of what is too old failed in an unknown way; the next one is tried")
                failing = True

    async def sweep(self) -> bool:
        """Remove what is too old, let go of pins that have ended; return False if too early for the former."""
        now_s, every_s = self._catalogue.clock(), self._catalogue.retention.sweep_every_s
        if self._catalogue.pins.expire(now_s):
            await self._pins_changed()
        if every_s is None or 0 <= now_s - self._swept_s < every_s:
            return every_s is None
        self._swept_s = now_s
        done = Evicted()
        async for tier, keys in self._slices():
            await self._evict(tier, [key for key in keys if self._catalogue.expired(key)], done)
        self.expired += done.blocks
        return True

    async def refuse(self, keys: list[bytes]) -> None:
        """Remove blocks that are asked for and must not be served any more."""
        for key in keys:
            for tier in self._tiers:
                removed = await tier.evict(key)
                self.expired += removed

    def prune(self) -> None:
        """Forget, behind, labels of blocks that are gone, where they have become many. To be called now and then."""
        if len(self._catalogue.labels) > self._prune_at and not self._pruning:
            self._pruning = True
            self._stack.begin(self._prune())

    @property
    def pinnable_bytes(self) -> int:
        """Most bytes of all pins: what they may take of the largest tier."""
        sizes = [sum(tier.ledger.capacity_bytes for tier in level.members) for level in self._stack.levels]
        return self._catalogue.pinnable_bytes(max(sizes, default=0))

    def stats(self) -> dict[str, Any]:
        """Return pins, and what has expired and how often looking for that failed, as plain values."""
        return {
            "pins": self._catalogue.pins.stats(),
            "pinnable_bytes": self.pinnable_bytes,
            "expired": self.expired,
            "failed_sweeps": self.failed_sweeps,
            "labels": len(self._catalogue.labels),
        }

    async def _evict(self, tier: Tier, keys: list[bytes], done: Evicted) -> None:
        for begin in range(0, len(keys), _EVICTIONS_AT_ONCE):
            some = keys[begin : begin + _EVICTIONS_AT_ONCE]
            sizes = [0 if tier.guard is None else tier.guard.size_of(key) or 0 for key in some]
            for size_bytes, removed in zip(sizes, await asyncio.gather(*map(tier.evict, some)), strict=True):
                done.blocks += removed
                done.size_bytes += size_bytes if removed else 0
                done.failed += not removed

    async def _scanned(self) -> None:
        """Wait until what lies in the directories is known, pins included: what is changed is then all there is."""
        for tier in self._tiers:
            await tier.scanned()

    async def _pins_changed(self) -> bool:
        await self._refresh()
        pins = self._catalogue.pins.current
        # One after the other: a disk that does not answer is found out by the first.
        kept = [await tier.keep_pins(pins) for tier in self._tiers]
        return any(kept)

    async def _refresh(self) -> None:
        # What the first round lets go of makes room for what it came to before.
        for _ in range(2):
            async for tier, keys in self._slices():
                if tier.guard is not None:
                    tier.guard.refresh(keys)

    def _refresh_behind(self) -> None:
        self._stack.begin(self._refresh())

    async def _prune(self) -> None:
        labels = self._catalogue.labels
        try:
            keys = labels.keys()
            for begin in range(0, len(keys), _SLICE):
                for key in keys[begin : begin + _SLICE]:
                    if not (self._in_flight(key) or self._stack.holds(key) or self._lies_somewhere(key)):
                        labels.forget(key)
                await asyncio.sleep(0)
        finally:
            self._prune_at = 2 * len(labels) + _SLACK_LABELS
            self._pruning = False

    def _lies_somewhere(self, key: bytes) -> bool:
        """Say whether a tier knows the block, also one whose disk is left alone for a while."""
        return any(tier.ledger.knows(key) for tier in self._tiers)

    async def _slices(self) -> AsyncIterator[tuple[Tier, list[bytes]]]:
        for tier in self._tiers:
            keys = tier.ledger.keys() if tier.guard is None else tier.guard.keys()
            for begin in range(0, len(keys), _SLICE):
                yield tier, keys[begin : begin + _SLICE]
                await asyncio.sleep(0)


def _name(label: Label | None, prefix: str, depth: int, visible: Callable[[str], bool]) -> str | None:
    """Return under which name a block is summed up; None where it is left out. Pure."""
    if label is None:
        return None if prefix else ""
    uri = label.uri
    if not covers(prefix.rstrip("/"), uri) or not visible(uri):
        return None
    if not depth:
        return prefix
    if not prefix:
        try:
            store, key = split_uri(uri)
        except DataError:
            return uri
        return f"{store}/" if key and not store.endswith("/") else store
    if uri == prefix:
        return uri
    folder = prefix if prefix.endswith("/") else f"{prefix}/"
    first, slash, _ = uri[len(folder) :].partition("/")
    return f"{folder}{first}{slash}"
