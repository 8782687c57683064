"""How long blocks are kept and how many of them, by the rules of the configuration. Pure.

A quota concerns all tiers together and is dealt to their places by their size, as the blocks themselves are: what takes
part of one quota in one place knows nothing of the others, and their sum is the quota.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import lru_cache

from cache.config import CacheConfig, JobConfig, PrefixConfig
from cache.labels import Label
from cache.prefixes import fold, longest

__all__ = ["Retention"]

_REMEMBERED = 1 << 12
# How exactly the age of a block is known, as a part of what it may become.
_GRAIN_SHARE = 64
_GRAIN_S = 3600


class Retention:
    """The rules of a cache.

    Args:
        config: Has them.
    """

    def __init__(self, config: CacheConfig) -> None:
        self._prefixes: dict[str, PrefixConfig] = {fold(rule.prefix): rule for rule in config.prefixes}
        self._jobs: tuple[JobConfig, ...] = config.jobs
        self._ttls_s = [rule.ttl_s for rule in config.prefixes if rule.ttl_s is not None]
        self._rule = lru_cache(maxsize=_REMEMBERED)(self._find_rule)
        self._quotas = lru_cache(maxsize=_REMEMBERED)(self._find_quotas)

    @property
    def watchful(self) -> bool:
        """Whether a block may have to go that is asked for: it may have become too old, or be without a label."""
        return bool(self._prefixes)

    @property
    def sweep_every_s(self) -> float | None:
        """How often to look for what is too old; None: nothing ever is."""
        return max(1.0, min(_GRAIN_S, min(self._ttls_s) / _GRAIN_SHARE)) if self._ttls_s else None

    def grain_s(self, uri: str) -> int:
        """Return how exactly the age of an object's blocks has to be known."""
        rule = self._rule(uri)
        return _GRAIN_S if rule is None or rule.ttl_s is None else max(1, int(rule.ttl_s) // _GRAIN_SHARE)

    def expired(self, label: Label, now_s: float) -> bool:
        """Say whether a block is too old; one that comes from the future, since a clock was set back, is as well."""
        rule = self._rule(label.uri)
        return rule is not None and rule.ttl_s is not None and not 0 <= now_s - label.born_s < rule.ttl_s

    def ruled(self, uri: str) -> bool:
        """Say whether there is a rule for an object, so that blocks of it without a label cannot be kept."""
        return self._rule(uri) is not None

    def quotas(self, label: Label) -> Sequence[tuple[str, int]]:
        """Return names and bytes of the quotas that a block falls under."""
        return self._quotas(label.uri, label.job)

    def _find_rule(self, uri: str) -> PrefixConfig | None:
        return longest(self._prefixes, uri)

    def _find_quotas(self, uri: str, job: str) -> Sequence[tuple[str, int]]:
        found = []
        rule = self._rule(uri)
        if rule is not None and rule.quota_bytes is not None:
            found.append((rule.prefix, rule.quota_bytes))
        named = next((rule for rule in self._jobs if job and fnmatchcase(job, rule.name)), None)
        if named is not None:
            found.append((f"job {job}", named.quota_bytes))
        return tuple(found)
