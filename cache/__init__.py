"""Bytes near: blocks fetched once, kept in tiers within their limits, handed to any number of processes."""

from cache.access import open_reader
from cache.asynchronous import AsyncReader, open_async_reader
from cache.config import CacheConfig, DirectoryConfig, JobConfig, PrefixConfig, TierConfig
from cache.keys import BlockRef, block_key
from cache.reader import BlockData, BlockReader, ObjectData

__all__ = [
    "AsyncReader",
    "BlockData",
    "BlockReader",
    "BlockRef",
    "CacheConfig",
    "DirectoryConfig",
    "JobConfig",
    "ObjectData",
    "PrefixConfig",
    "TierConfig",
    "block_key",
    "open_async_reader",
    "open_reader",
]
