"""What a store holds and how it is named. Pure: no I/O."""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

from connectors.errors import BadInputError, ErrorKind

__all__ = ["ObjectMeta", "Span", "join_uri", "normalise_url", "split_uri"]


@dataclass(frozen=True, slots=True)
class Span:
    """The bytes `[offset, offset + length)` of an object."""

    offset: int
    length: int

    def __post_init__(self) -> None:
        if self.offset < 0 or self.length < 0:
            raise BadInputError(
                f"a span needs offset >= 0 and length >= 0, got {self.offset} and {self.length}",
                kind=ErrorKind.BAD_RANGE,
            )

    @property
    def end(self) -> int:
        """The first offset past the span."""
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class ObjectMeta:
    """One object as its store describes it.

    Attributes:
        key: Path inside the store, no leading slash.
        size_bytes: Length of the content.
        version: Opaque token of this content (an etag; `inode-mtime_ns-size` for files).
    """

    key: str
    size_bytes: int
    version: str


def normalise_url(url: str | os.PathLike[str]) -> str:
    """Give every location its URI form: plain paths become absolute `file://` URLs, trailing slashes go.

    >>> normalise_url("s3://bucket/set/")
    's3://bucket/set'
    >>> normalise_url("/data/my set")
    'file:///data/my%20set'
    """
    text = os.fspath(url)
    if not text:
        raise BadInputError("the URL is empty; give a path or a URL such as s3://bucket/prefix")
    if "://" not in text:
        return "file://" + quote(os.path.abspath(text))
    scheme, rest = text.split("://", 1)
    if scheme == "file":
        path = unquote(urlsplit(text).path)
        return "file://" + quote(os.path.abspath(path))
    return f"{scheme.lower()}://{rest.rstrip('/')}"


def split_uri(uri: str | os.PathLike[str]) -> tuple[str, str]:
    """Split a URI into the root of its store and the key inside it.

    >>> split_uri("s3://bucket/a/b.arrow")
    ('s3://bucket', 'a/b.arrow')
    >>> split_uri("/data/a.arrow")
    ('file:///', 'data/a.arrow')
    """
    text = normalise_url(uri)
    scheme, rest = text.split("://", 1)
    if scheme == "file":
        return "file:///", unquote(rest).lstrip("/")
    authority, _, key = rest.partition("/")
    return f"{scheme}://{authority}", key


def join_uri(root: str | os.PathLike[str], key: str) -> str:
    """Name `key` below `root`; the inverse of `split_uri` for a root without a key.

    >>> join_uri("s3://bucket/set", "shard-0.arrow")
    's3://bucket/set/shard-0.arrow'
    """
    base = normalise_url(root)
    key = key.lstrip("/")
    if base.startswith("file://"):
        key = quote(key)
    return f"{base.rstrip('/')}/{key}" if key else base
