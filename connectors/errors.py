"""The one error tree of all three packages, cut by what a handler would do.

    DataError
    ├── NotFoundError          (FileNotFoundError)   stop, or treat as absent
    ├── PermissionDeniedError  (PermissionError)     fix credentials or modes
    ├── ThrottledError                               slow down, then again
    ├── TransientError         (ConnectionError)     again
    ├── CorruptError           (ValueError)          the bytes are wrong: drop this copy, fetch another
    ├── ChangedError                                 the object is no longer the one that was opened
    └── BadInputError          (ValueError)          the caller has to change something

A provider's exception never leaves `connectors`: it is translated once, at the edge.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

__all__ = [
    "BadInputError",
    "ChangedError",
    "CorruptError",
    "DataError",
    "ErrorKind",
    "NotFoundError",
    "PermissionDeniedError",
    "ThrottledError",
    "TransientError",
    "error_from_kind",
]


class ErrorKind(StrEnum):
    """The exact failure, stable across releases. Append only: the values travel on the wire and into logs."""

    UNKNOWN = "unknown"
    NOT_FOUND = "not_found"
    PERMISSION_DENIED = "permission_denied"
    THROTTLED = "throttled"
    TRANSIENT = "transient"
    TIMEOUT = "timeout"
    SHORT_BODY = "short_body"
    UNREACHABLE = "unreachable"
    CORRUPT = "corrupt"
    CHANGED = "changed"
    BAD_INPUT = "bad_input"
    BAD_RANGE = "bad_range"
    NO_SPACE = "no_space"
    PROTOCOL = "protocol"


class DataError(Exception):
    """Base of every error that Dataflow raises on purpose.

    Args:
        message: What failed, naming the thing, and what to do about it.
        kind: The exact failure; each class has its own default.
        uri: The object concerned, where there is one.
    """

    default_kind: ClassVar[ErrorKind] = ErrorKind.UNKNOWN

    def __init__(self, message: str = "", *, kind: ErrorKind | None = None, uri: str | None = None) -> None:
        super().__init__(message)
        self.kind = self.default_kind if kind is None else kind
        self.uri = uri

    def __reduce__(self) -> tuple[object, ...]:
        # OSError pickles by its errno arguments and would lose kind and uri.
        return (_rebuild, (type(self), str(self), self.kind, self.uri))


def _rebuild(cls: type[DataError], message: str, kind: ErrorKind, uri: str | None) -> DataError:
    return cls(message, kind=kind, uri=uri)


class NotFoundError(DataError, FileNotFoundError):
    """The object does not exist."""

    default_kind = ErrorKind.NOT_FOUND


class PermissionDeniedError(DataError, PermissionError):
    """The store refuses these credentials, or the file these permissions."""

    default_kind = ErrorKind.PERMISSION_DENIED


class ThrottledError(DataError):
    """The store asks for fewer requests."""

    default_kind = ErrorKind.THROTTLED


class TransientError(DataError, ConnectionError):
    """The same request may succeed later: a reset, a time-out, a short body, a 5xx."""

    default_kind = ErrorKind.TRANSIENT


class CorruptError(DataError, ValueError):
    """The bytes are not what their checksum or their format says."""

    default_kind = ErrorKind.CORRUPT


class ChangedError(DataError):
    """The object is no longer the version that was opened."""

    default_kind = ErrorKind.CHANGED


class BadInputError(DataError, ValueError):
    """An argument, a file or a state that cannot be used as given."""

    default_kind = ErrorKind.BAD_INPUT


_CLASS_OF_KIND: dict[ErrorKind, type[DataError]] = {
    ErrorKind.UNKNOWN: DataError,
    ErrorKind.NOT_FOUND: NotFoundError,
    ErrorKind.PERMISSION_DENIED: PermissionDeniedError,
    ErrorKind.THROTTLED: ThrottledError,
    ErrorKind.TRANSIENT: TransientError,
    ErrorKind.TIMEOUT: TransientError,
    ErrorKind.SHORT_BODY: TransientError,
    ErrorKind.UNREACHABLE: TransientError,
    ErrorKind.CORRUPT: CorruptError,
    ErrorKind.CHANGED: ChangedError,
    ErrorKind.BAD_INPUT: BadInputError,
    ErrorKind.BAD_RANGE: BadInputError,
    ErrorKind.NO_SPACE: DataError,
    ErrorKind.PROTOCOL: DataError,
}


def error_from_kind(kind: str, message: str, uri: str | None = None) -> DataError:
    """Rebuild an error on the far side of a socket. A kind from a newer release becomes a plain `DataError`."""
    try:
        known = ErrorKind(kind)
    except ValueError:
        known = ErrorKind.UNKNOWN
    return _CLASS_OF_KIND[known](message, kind=known, uri=uri)
