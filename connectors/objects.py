"""What a store holds and how it is named. Pure: no I/O.

A URI is the root of a store (`s3://bucket`, `file:///`) and a key below it. Keys are plain text everywhere. In a URI
the key is percent-encoded where the scheme is defined that way (`file`, `http`, `https`) and stands as it is
elsewhere, as the tools of those stores write it: `s3://bucket/50% done#1` names the key `50% done#1`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import quote, unquote_to_bytes

from connectors.errors import BadInputError, ErrorKind

__all__ = ["ObjectMeta", "Span", "check_key", "check_prefix", "join_uri", "normalise_url", "split_uri"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# A URL that lost a slash, which would otherwise become a folder of that name below the working directory.
_ONE_SLASH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
_ENCODED_SCHEMES = frozenset({"file", "http", "https"})
# Names that mean themselves: nothing to decode, nothing to encode, no segment that is empty, `.` or `..`.
_NAMES = r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(?:/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*"
_PLAIN_KEY = re.compile(_NAMES)
_PLAIN_FILE = re.compile(rf"file:///{_NAMES}")


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


def check_key(key: str) -> None:
    """Refuse a key that could leave its store or that stores read differently.

    Raises:
        BadInputError: The key is empty or absolute, has an empty, `.` or `..` segment, or contains NUL.
    """
    if "\0" in key or any(segment in ("", ".", "..") for segment in key.split("/")):
        raise BadInputError(
            f"{key!r} is not a key: it needs to be a path without leading or trailing slash, '//', '.', '..' or NUL"
        )


def check_prefix(prefix: str) -> tuple[str, str]:
    """Split the prefix of a listing into its folder, which is empty or a key, and the beginning of a name.

    >>> check_prefix("set/shard-0")
    ('set', 'shard-0')

    Raises:
        BadInputError: The folder is one that `check_key` refuses.
    """
    folder, slash, name = prefix.rpartition("/")
    if slash:
        check_key(folder or prefix)
    if "\0" in name:
        check_key(name)
    return folder, name


def normalise_url(url: str | os.PathLike[str]) -> str:
    """Give every location its one URI form: plain paths become absolute `file://` URLs, trailing slashes go.

    A plain path may begin with `~`, the home folder.

    >>> normalise_url("s3://bucket/set/")
    's3://bucket/set'
    >>> normalise_url("/data/my set")
    'file:///data/my%20set'

    Raises:
        BadInputError: The URL has no bucket or host, carries a password or a query, or its key is one that `check_key`
            refuses.
    """
    root, key = split_uri(url)
    return join_uri(root, key)


def split_uri(uri: str | os.PathLike[str]) -> tuple[str, str]:
    """Split a URI into the root of its store and the key inside it, which is empty for the root itself.

    >>> split_uri("s3://bucket/a/b.arrow")
    ('s3://bucket', 'a/b.arrow')
    >>> split_uri("/data/a.arrow")
    ('file:///', 'data/a.arrow')

    Raises:
        BadInputError: As `normalise_url`.
    """
    text = os.fspath(uri)
    if _PLAIN_FILE.fullmatch(text):
        return "file:///", text[8:]
    if not text:
        raise BadInputError("the URL is empty; give a path or a URL such as s3://bucket/prefix")
    match = _SCHEME.match(text)
    if match is None:
        if _ONE_SLASH.match(text) or ("://" in text and not text.startswith(("/", "."))):
            raise BadInputError(f"{text!r} is neither a URL (scheme://...) nor a plain path; write a path as ./...")
        return _split_path(os.path.expanduser(text))
    scheme, rest = match[1].lower(), text[match.end() :]
    authority, _, key = rest.partition("/")
    if scheme == "file":
        if authority not in ("", "localhost"):
            raise BadInputError(f"{text!r} names the host {authority!r}; write a local file as file:///path")
        return _split_path("/" + _decode(key))
    return _split_remote(scheme, authority, key.rstrip("/"))


def join_uri(root: str | os.PathLike[str], key: str) -> str:
    """Name `key` below `root`; the inverse of `split_uri` where `root` is the root of a store. No key is `root` itself.

    >>> join_uri("s3://bucket/set", "shard-0.arrow")
    's3://bucket/set/shard-0.arrow'
    >>> join_uri("file:///", "my set/a.arrow")
    'file:///my%20set/a.arrow'

    Raises:
        BadInputError: The key is one that `check_key` refuses.
    """
    if isinstance(root, str) and _PLAIN_FILE.fullmatch(root) and _PLAIN_KEY.fullmatch(key):
        return f"{root}/{key}"  # a tenth of the time, which counts for folders of many files
    base, above = split_uri(root)
    if key:
        check_key(key)
    whole = "/".join(part for part in (above, key) if part)
    if not whole:
        return base
    if base.split(":", 1)[0] in _ENCODED_SCHEMES:
        whole = _encode(whole)
    return f"{base.removesuffix('/')}/{whole}"


def _split_path(path: str) -> tuple[str, str]:
    if "\0" in path:
        raise BadInputError(f"{path!r} contains NUL and cannot name a file")
    whole = os.path.normpath(path) if path.startswith("/") else os.path.abspath(path)
    # Two leading slashes survive both: POSIX gives them a meaning that Linux does not use.
    return "file:///", whole.lstrip("/")


def _split_remote(scheme: str, authority: str, key: str) -> tuple[str, str]:
    if not authority:
        raise BadInputError(f"{scheme}:// needs a bucket or host behind it, such as {scheme}://name/prefix")
    if ":" in authority.rpartition("@")[0]:
        # The URL ends up in manifests, logs and errors, so it is not repeated here either.
        raise BadInputError(f"a {scheme}:// URL carries a password; give credentials by the environment or by options")
    if scheme in _ENCODED_SCHEMES:
        if "?" in key or "#" in key or "?" in authority or "#" in authority:
            raise BadInputError(f"the {scheme}:// URL has a query or a fragment and cannot name an object; take it off")
        key = _decode(key)
    if key:
        check_key(key)
    return f"{scheme}://{authority}", key


def _encode(key: str) -> str:
    # fsencode: a file's name may be bytes that are no UTF-8, which Python carries as surrogates.
    try:
        return quote(os.fsencode(key), safe="/*")
    except UnicodeEncodeError:
        raise BadInputError(f"{key!r} is not a key: it has code points that no encoding can carry") from None


def _decode(text: str) -> str:
    return os.fsdecode(unquote_to_bytes(text))
