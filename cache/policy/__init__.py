"""Which blocks a tier keeps: pure choices, no I/O, no clock."""

from cache.policy.auto import Auto
from cache.policy.detect import Detector, Pattern
from cache.policy.drop_behind import DropBehind
from cache.policy.guarded import Account, Guarded
from cache.policy.kept_set import KeptSet
from cache.policy.lru import Lru
from cache.policy.next_use import NextUse
from cache.policy.protocol import Policy
from cache.policy.s3_fifo import S3Fifo

__all__ = [
    "Account",
    "Auto",
    "Detector",
    "DropBehind",
    "Guarded",
    "KeptSet",
    "Lru",
    "NextUse",
    "Pattern",
    "Policy",
    "S3Fifo",
]
