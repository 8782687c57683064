"""Which blocks a tier keeps: pure choices, no I/O, no clock."""

from cache.policy.kept_set import KeptSet
from cache.policy.lru import Lru
from cache.policy.protocol import Policy

__all__ = ["KeptSet", "Lru", "Policy"]
