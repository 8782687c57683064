"""One configured tier: one place for blocks, or several directories that share its blocks among them.

A block is written to the directory that weighted rendezvous hashing names: each directory draws a number from its path
and the block's key, and the best one wins, in the long run as often as its weight says (C. Schindelhauer and G.
Schomaker, "Weighted distributed hash tables", SPAA 2005). A directory that is lost moves only its own share to the
others, one that is added takes an equal part of each. Where a block lies is asked of all of them, so what moved, or was
placed under other weights, is still found.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from xxhash import xxh3_64_intdigest

from cache.ledger import Counters
from cache.tier import Tier

__all__ = ["Level", "place"]

_SUMMED = ("capacity_bytes", "used_bytes", "blocks", *Counters.__slots__)


def place(key: bytes, weights: Sequence[tuple[str, float]]) -> int:
    """Return which of the named places, each with its weight, the block belongs to. Pure."""
    best, best_score = 0, -math.inf
    for number, (name, weight) in enumerate(weights):
        # In (0, 1), so that its logarithm is finite and below 0.
        draw = (xxh3_64_intdigest(key, seed=xxh3_64_intdigest(name.encode())) + 1) / (2**64 + 2)
        score = -weight / math.log(draw)
        if score > best_score:
            best, best_score = number, score
    return best


class Level:
    """Belongs to the event loop's thread.

    Args:
        members: What blocks are written to, each with the name and the weight that its share of them follows.

    Attributes:
        name: As in the configuration.
        members: The places themselves; owned.
        in_memory: Nothing here ever waits; there is one member then.
    """

    def __init__(self, members: Sequence[tuple[Tier, str, float]]) -> None:
        self.members = tuple(tier for tier, _, _ in members)
        self.name = self.members[0].name
        self.in_memory = self.members[0].in_memory
        self._weights = [(name, weight) for _, name, weight in members]

    def find(self, key: bytes, missed: Collection[tuple[Tier, bytes]]) -> Tier | None:
        """Return who has the block, else who may have it, leaving out where it was `missed`."""
        for tier in self.members:
            if tier.holds(key) and not (missed and (tier, key) in missed):
                return tier
        for tier in self.members:
            if tier.scanning and tier.may_hold(key) and (tier, key) not in missed:
                return tier
        return None

    def holds(self, key: bytes) -> bool:
        """Say whether the block is here and can be read."""
        return any(tier.holds(key) for tier in self.members)

    def member_for(self, key: bytes) -> Tier:
        """Return where the block is written, among the places that are well."""
        if len(self.members) == 1:
            return self.members[0]
        well = [number for number, tier in enumerate(self.members) if tier.well] or range(len(self.members))
        return self.members[well[place(key, [self._weights[number] for number in well])]]

    def wants(self, key: bytes, length: int) -> bool:
        """Say whether the block would be let in. Changes nothing."""
        return not self.holds(key) and self.member_for(key).ledger.wants(key, length)

    def stats(self) -> dict[str, Any]:
        """Return the sums over all members, and each directory's own numbers where there are several."""
        each = [tier.stats() for tier in self.members]
        if len(each) == 1:
            return each[0]
        total = dict(each[0])
        for name in _SUMMED:
            total[name] = sum(one[name] for one in each)
        blocks = [one["capacity_blocks"] for one in each]
        total["capacity_blocks"] = None if None in blocks else sum(blocks)
        total["scanning"] = any(one["scanning"] for one in each)
        # As ill as the worst of them.
        worst = max(each, key=lambda one: ("normal", "unstable", "down").index(one["state"]))
        total |= {name: worst[name] for name in ("state", "state_since_unix_s", "state_reason")}
        for name in ("fault", "full"):
            total[name] = next((one[name] for one in each if one[name] is not None), None)
        if "quotas" in total:
            total |= {name: sum(one[name] for one in each) for name in ("pinned_bytes", "max_pinned_bytes")}
            total["quotas"] = _add_up([quota for one in each for quota in one["quotas"]])
        total.pop("path")
        total["directories"] = each
        return total


def _add_up(quotas: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one entry for each name, with the sums of all that have it."""
    total: dict[str, dict[str, Any]] = {}
    for quota in quotas:
        whole = total.setdefault(quota["name"], {"name": quota["name"], "limit_bytes": 0, "used_bytes": 0})
        for name in ("limit_bytes", "used_bytes"):
            whole[name] += quota[name]
    return [total[name] for name in sorted(total)]
