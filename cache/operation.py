"""Operators' requests on one connection: who may, and what the engine makes of it."""

from __future__ import annotations

from typing import Any

from cache.engine import Engine
from cache.frames import Done
from cache.orders import (
    AskUsage,
    EvictPrefix,
    Held,
    Order,
    PinPrefix,
    PinsKept,
    Removed,
    Report,
    ResizeTier,
    UnpinPrefix,
)
from cache.rights import Rights, check_name
from connectors.objects import normalise_url

__all__ = ["Operation"]


class Operation:
    """Belongs to one connection.

    Args:
        engine: Does it.
        rights: What the user at the other end may read and change.
    """

    def __init__(self, engine: Engine, rights: Rights) -> None:
        self._engine = engine
        self._rights = rights

    async def answer(self, request: Order) -> Report | Done:
        """Do what a request says.

        Raises:
            PermissionDeniedError: The user may not.
            DataError: It cannot be done; it says why.
        """
        if isinstance(request, AskUsage):
            return await self._usage(request)
        self._rights.check_change()
        if not isinstance(request, ResizeTier):
            check_name(request.prefix)
        administration = self._engine.administration
        match request:
            case PinPrefix():
                survive = await administration.pin(
                    request.prefix, size_bytes=request.size_bytes, expires_s=request.expires_s, uid=self._rights.uid
                )
                return PinsKept(survive)
            case UnpinPrefix():
                return PinsKept(await administration.unpin(request.prefix))
            case EvictPrefix():
                return Removed(await administration.evict(request.prefix))
            case ResizeTier():
                await self._engine.resize(
                    request.tier, capacity_bytes=request.capacity_bytes, capacity_blocks=request.capacity_blocks
                )
                return Done()

    def visible(self, stats: dict[str, Any]) -> dict[str, Any]:
        """Return statistics without the names of what the user may not read."""
        if not self._rights.limited:
            return stats
        retention = stats["retention"]
        pins = [pin for pin in retention["pins"] if self._rights.sees(pin["prefix"])]
        tiers = [self._visible_tier(tier) for tier in stats["tiers"]]
        return {**stats, "tiers": tiers, "retention": {**retention, "pins": pins}}

    def _visible_tier(self, tier: dict[str, Any]) -> dict[str, Any]:
        seen = {**tier, "quotas": [quota for quota in tier["quotas"] if self._sees_quota(quota["name"])]}
        if "directories" in tier:
            seen["directories"] = [self._visible_tier(one) for one in tier["directories"]]
        return seen

    async def _usage(self, request: AskUsage) -> Held:
        if request.prefix:
            self._rights.check([request.prefix])
        prefix = normalise_url(request.prefix) if request.prefix else ""
        rows, more = await self._engine.administration.usage(
            prefix, depth=request.depth, after=request.after, visible=self._rights.sees
        )
        return Held(rows, more)

    def _sees_quota(self, name: str) -> bool:
        return "://" not in name or self._rights.sees(name)
