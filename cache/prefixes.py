"""Settings by prefix of a URL: the longest one that a URI lies at or below counts. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from connectors.errors import DataError
from connectors.objects import normalise_url

__all__ = ["covers", "fold", "longest", "normal"]

T = TypeVar("T")


def fold(url: str) -> str:
    """Return the form under which a prefix is kept in a table: normal, and without a slash at its end.

    >>> fold("s3://bucket/set/")
    's3://bucket/set'

    Raises:
        BadInputError: It is no URL.
    """
    return normalise_url(url).rstrip("/")


def covers(prefix: str, uri: str) -> bool:
    """Say whether a URI lies at or below a folded prefix; everything is below the empty one."""
    return not prefix or uri == prefix or uri.startswith(prefix + "/")


def longest(table: Mapping[str, T], uri: str) -> T | None:
    """Return what the table has for the longest folded prefix of a normal URI; None where there is none."""
    while table:
        found = table.get(uri)
        if found is not None:
            return found
        uri, slash, _ = uri.rpartition("/")
        if not slash:
            break
    return None


def normal(uri: str) -> str:
    """Return the normal form of a URI, or the text itself where it is none."""
    try:
        return normalise_url(uri)
    except DataError:
        return uri
