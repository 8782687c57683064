"""Bytes by key: stores behind one set of Protocols, opened by URL.

The stores are asynchronous; `run_sync` is the only bridge from synchronous code.
"""

from connectors.bridge import run_sync
from connectors.errors import (
    BadInputError,
    ChangedError,
    CorruptError,
    DataError,
    ErrorKind,
    NotFoundError,
    PermissionDeniedError,
    ThrottledError,
    TransientError,
    error_from_kind,
)
from connectors.limits import RequestLimits
from connectors.objects import ObjectMeta, Span, join_uri, normalise_url, split_uri
from connectors.protocols import Buffer, Readable, Store
from connectors.registry import open_store

__all__ = [
    "BadInputError",
    "Buffer",
    "ChangedError",
    "CorruptError",
    "DataError",
    "ErrorKind",
    "NotFoundError",
    "ObjectMeta",
    "PermissionDeniedError",
    "Readable",
    "RequestLimits",
    "Span",
    "Store",
    "ThrottledError",
    "TransientError",
    "error_from_kind",
    "join_uri",
    "normalise_url",
    "open_store",
    "run_sync",
    "split_uri",
]
