"""What is known of the blocks of a cache beyond their keys, and what follows from it: labels, pins and rules together.

Pure but for the clock it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from cache.config import CacheConfig
from cache.labels import Label, Labels
from cache.pins import Pins, PinSet
from cache.policy import Guarded, Policy
from cache.prefixes import normal
from cache.retention import Retention

__all__ = ["Catalogue"]


class Catalogue:
    """One for a cache.

    Args:
        config: Has the rules and the sizes of the tiers.
        clock: Seconds of the wall clock, since labels and pins outlive the process.

    Attributes:
        labels: Of blocks.
        pins: Of operators.
        retention: The rules.
        clock: As given.
        on_pins: Called when a directory has brought other pins.
    """

    def __init__(self, config: CacheConfig, clock: Callable[[], float]) -> None:
        self.retention = Retention(config)
        self.labels = Labels(self.retention.grain_s)
        self.pins = Pins()
        self.clock = clock
        self.on_pins: Callable[[], None] = lambda: None
        self.pinned_share = config.pinned_share
        self._tier_bytes = sum(tier.capacity_bytes for tier in config.tiers)

    def guard(self, make_policy: Callable[[], Policy], capacity_bytes: int) -> Guarded:
        """Put pins and quotas around the policy of a place with so many bytes."""
        share = capacity_bytes / max(1, self._tier_bytes)

        def quotas_of(key: bytes) -> Sequence[tuple[str, int]]:
            label = self.labels.get(key)
            found = () if label is None else self.retention.quotas(label)
            return [(name, int(limit_bytes * share)) for name, limit_bytes in found]

        return Guarded(
            make_policy,
            is_pinned=self.is_pinned,
            quotas_of=quotas_of,
            max_pinned_bytes=self.pinnable_bytes(capacity_bytes),
        )

    def pinnable_bytes(self, capacity_bytes: int) -> int:
        """Return what pins may take of a place or tier."""
        return int(self.pinned_share * capacity_bytes)

    def is_pinned(self, key: bytes) -> bool:
        """Say whether a block is part of what is pinned."""
        if not self.pins:
            return False
        label = self.labels.get(key)
        return label is not None and self.pins.cover(label.uri)

    def stale(self, key: bytes, uri: str) -> bool:
        """Say whether a block of an object must not be served from the cache.

        It is too old, or a rule would have to know of it what it does not.
        """
        label = self.labels.get(key)
        return self.retention.ruled(normal(uri)) if label is None else self.retention.expired(label, self.clock())

    def expired(self, key: bytes) -> bool:
        """Say whether a block is too old."""
        label = self.labels.get(key)
        return label is not None and self.retention.expired(label, self.clock())

    def note(self, key: bytes, uri: str, job: str) -> None:
        """A block is fetched now, for a job."""
        self.labels.note(key, uri, job, self.clock())

    def adopt(self, found: Mapping[bytes, Label], keys: Iterable[bytes]) -> None:
        """Blocks lie in a directory; `found` are the labels in its journal."""
        for key in keys:
            label = found.get(key)
            if label is not None:
                self.labels.adopt(key, label)

    def restore(self, pins: PinSet) -> None:
        """A directory has kept these pins."""
        if self.pins.restore(pins, self.clock()):
            self.on_pins()
