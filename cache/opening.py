"""From the configuration of tiers to tiers that are open."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from cache.catalogue import Catalogue
from cache.config import CacheConfig, DirectoryConfig, Medium, PolicyName, TierConfig
from cache.directory_shelf import DirectoryShelf
from cache.disk import DiskLimits
from cache.disk_calls import DiskCalls
from cache.ledger import UNLIMITED_BLOCKS
from cache.level import Level
from cache.memory_shelf import MemoryShelf
from cache.policy import Policy
from cache.tier import Tier
from connectors.errors import BadInputError

__all__ = ["limits_of", "memory_level", "open_levels"]

_CLOSE_TIMEOUT_S = 10.0
_THREADS: dict[Medium, int] = {"ram": 2, "nvme": 8, "hdd": 2}


async def open_levels(
    config: CacheConfig,
    *,
    policy: Callable[[PolicyName, int], Policy],
    catalogue: Catalogue,
    max_memory_blocks: int,
    system: Any,
    disk_limits: DiskLimits,
) -> list[Level]:
    """Open every tier, first to last. Directories are scanned behind.

    Args:
        config: Says which.
        policy: Makes the policy of one place, given its bytes.
        catalogue: What is known of blocks.
        max_memory_blocks: What the limit on open files leaves for each tier in memory.
        system: The module of system calls that directories are written with.
        disk_limits: When a disk is distrusted.

    Raises:
        BadInputError: Another server has a directory, or more blocks are asked for than files may be open.
        PermissionDeniedError: A directory cannot be written.
    """
    levels: list[Level] = []
    try:
        for tier in config.tiers:
            if not tier.places:
                chosen = policy(tier.policy, tier.capacity_bytes)
                levels.append(memory_level(tier.name, tier, chosen, max_blocks=max_memory_blocks))
                continue
            members = []
            for place in tier.places:
                chosen = policy(tier.policy, place.capacity_bytes or 0)
                member = _directory(tier, place, chosen, catalogue, config, system, disk_limits)
                members.append((member, place.path, place.weight))
            levels.append(Level(members))
            for member, _, _ in members:
                await member.open()
    except BaseException:
        for level in levels:
            for member in level.members:
                await member.close(_CLOSE_TIMEOUT_S)
        raise
    return levels


def limits_of(config: TierConfig, *, max_memory_blocks: int) -> list[tuple[int, int]]:
    """Return the limits of each place of a tier, in bytes and blocks.

    Raises:
        BadInputError: More blocks in memory are asked for than files may be open.
    """
    if config.places:
        return [
            (place.capacity_bytes or 0, UNLIMITED_BLOCKS if place.capacity_blocks is None else place.capacity_blocks)
            for place in config.places
        ]
    blocks = max_memory_blocks if config.capacity_blocks is None else config.capacity_blocks
    if blocks > max_memory_blocks:
        raise BadInputError(
            f"{blocks} blocks in memory need as many open files, at most {max_memory_blocks} are possible here; "
            "lower capacity_blocks or raise the hard limit (ulimit -Hn)"
        )
    return [(config.capacity_bytes, blocks)]


def memory_level(name: str, config: TierConfig, policy: Policy, *, max_blocks: int) -> Level:
    """Return a tier in anonymous memory.

    Raises:
        BadInputError: More blocks are asked for than files may be open.
    """
    ((capacity_bytes, capacity_blocks),) = limits_of(config, max_memory_blocks=max_blocks)
    tier = Tier(
        name=name,
        medium="ram",
        policy_name=config.policy,
        policy=policy,
        shelf=MemoryShelf(),
        capacity_bytes=capacity_bytes,
        capacity_blocks=capacity_blocks,
        max_queued_bytes=sys.maxsize,  # nothing is ever queued
        calls=None,
    )
    return Level([(tier, name, 1.0)])


def _directory(
    config: TierConfig,
    place: DirectoryConfig,
    policy: Policy,
    catalogue: Catalogue,
    whole: CacheConfig,
    system: Any,
    disk_limits: DiskLimits,
) -> Tier:
    assert place.capacity_bytes is not None
    assert config.medium is not None
    return Tier(
        name=config.name,
        medium=config.medium,
        policy_name=config.policy,
        policy=policy,
        shelf=DirectoryShelf(place.path, medium=config.medium, system=system, label_of=catalogue.labels.get),
        capacity_bytes=place.capacity_bytes,
        capacity_blocks=UNLIMITED_BLOCKS if place.capacity_blocks is None else place.capacity_blocks,
        max_queued_bytes=whole.max_inflight_bytes,
        calls=DiskCalls(config.name, threads=_THREADS[config.medium], limits=disk_limits),
        catalogue=catalogue,
    )
