"""Who may use a daemon, and who may read what through it. Pure but for the look-up of group names.

A daemon reads with its own credentials for everybody who may ask it, so what not everybody may see needs a rule here:

    [access]
    socket_mode = "0660"            # of the socket's file, with `group`
    group = "training"
    allowed_uids = [1001, 1002]     # and nobody else; without it, whoever the socket's file lets in
    operator_uids = [1001]          # who of them may pin, evict and resize

    [[access.rules]]
    prefix = "s3://bucket/private"  # and all below it; of several that fit, the longest counts
    uids = [1001]

The daemon's own user and root may always ask for and change everything. Users are told apart by what the kernel says of
the other end of the connection. A rule is about names, however they are spelt (`s3a://` is `s3://`, a host has no upper
case): it does not follow links inside a file system.
"""

from __future__ import annotations

import grp
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from cache.prefixes import covers
from connectors.errors import BadInputError, PermissionDeniedError
from connectors.objects import normalise_url

__all__ = ["AccessConfig", "PrefixRule", "Rights", "check_name"]

_MODE = re.compile(r"0?[0-7]{3}")
# Two names by which fsspec opens one store; http is here because one server mostly answers both.
_SAME_STORE = {
    "abfs": "az",
    "abfss": "az",
    "gcs": "gs",
    "http": "https",
    "jlab": "jupyter",
    "ocilake": "oci",
    "s3a": "s3",
    "ssh": "sftp",
    "tosfs": "tos",
    "webhdfs": "hdfs",
}
# Where a host is named, the ports that mean no other store than none would, and whose account is used does not matter.
# A name node answers each of its protocols at another port, and those are often changed.
_PORTS = {
    "ftp": re.compile(r":(21)?$"),
    "hdfs": re.compile(r":\d*$"),
    "https": re.compile(r":(80|443)?$"),
    "sftp": re.compile(r":(22)?$"),
    "smb": re.compile(r":(445)?$"),
}
_MAX_REMEMBERED = 1024


@dataclass(frozen=True, slots=True)
class PrefixRule:
    """Who may read what lies at or below a URL.

    Attributes:
        prefix: The URL, made normal here.
        uids: Users, beside the daemon's own and root.
    """

    prefix: str
    uids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefix", normalise_url(self.prefix))
        object.__setattr__(self, "uids", tuple(self.uids))

    def covers(self, uri: str) -> bool:
        """Say whether a URI lies at or below the prefix."""
        return covers(_spelling(self.prefix).rstrip("/"), _spelling(uri))


@dataclass(frozen=True, slots=True)
class AccessConfig:
    """Who may use a daemon.

    Attributes:
        socket_mode: Permissions of the socket's file, as octal digits.
        group: Name of the group that the file belongs to; None leaves the daemon's own.
        allowed_uids: The only users who may ask, beside the daemon's own and root; None: whoever may open the file.
        rules: What only some of them may read.
        operator_uids: Who may change what is kept, beside the daemon's own user and root.
    """

    socket_mode: str = "0600"
    group: str | None = None
    allowed_uids: tuple[int, ...] | None = None
    rules: tuple[PrefixRule, ...] = ()
    operator_uids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not _MODE.fullmatch(self.socket_mode):
            raise BadInputError(f'access: socket_mode is octal digits such as "0660", got {self.socket_mode!r}')
        if self.allowed_uids is not None:
            object.__setattr__(self, "allowed_uids", tuple(self.allowed_uids))
        object.__setattr__(self, "rules", tuple(self.rules))
        object.__setattr__(self, "operator_uids", tuple(self.operator_uids))
        prefixes = [_spelling(rule.prefix) for rule in self.rules]
        if twice := {prefix for prefix in prefixes if prefixes.count(prefix) > 1}:
            raise BadInputError(f"access: two rules for {min(twice)}")

    @property
    def mode(self) -> int:
        """`socket_mode` as a number."""
        return int(self.socket_mode, 8)

    def group_id(self) -> int | None:
        """Return the number of `group`; `BadInputError` where there is no such group."""
        if self.group is None:
            return None
        try:
            return grp.getgrnam(self.group).gr_gid
        except KeyError:
            raise BadInputError(f"access: there is no group {self.group!r} on this machine") from None

    def may_ask(self, uid: int) -> bool:
        """Say whether a user may use the daemon at all."""
        return _is_operator(uid) or self.allowed_uids is None or uid in self.allowed_uids


class Rights:
    """What one user may read and change.

    Args:
        access: Of the daemon.
        uid: The user.

    Attributes:
        uid: As given.
    """

    def __init__(self, access: AccessConfig, uid: int) -> None:
        self.uid = uid
        self._may_change = _is_operator(uid) or uid in access.operator_uids
        self._rules = () if _is_operator(uid) else sorted(access.rules, key=lambda rule: -len(_spelling(rule.prefix)))
        self._readable: dict[str, bool] = {}

    @property
    def limited(self) -> bool:
        """Whether there is anything that the user may not read."""
        return bool(self._rules)

    def check(self, uris: Iterable[str]) -> None:
        """Refuse when the user may not read one of the objects.

        Raises:
            PermissionDeniedError: Names the first of them.
            BadInputError: One is a relative path, which would mean a file below the server's own folder.
        """
        for uri in uris:
            readable = self._readable.get(uri)
            if readable is None:
                if len(self._readable) == _MAX_REMEMBERED:
                    self._readable.clear()
                readable = self._readable[uri] = self._may_read(uri)
            if not readable:
                raise self._refused(uri)

    def check_listing(self, url: str) -> None:
        """Refuse when a listing of `url` would name what the user may not read; as `check`."""
        self.check([url])
        if not self._rules:
            return
        above = PrefixRule(url)
        for rule in self._rules:
            if above.covers(rule.prefix) and self.uid not in rule.uids:
                raise self._refused(rule.prefix)

    def sees(self, uri: str) -> bool:
        """Say whether the user may hear of an object, or of all below a prefix."""
        return not self._rules or self._may_read(uri)

    def check_change(self) -> None:
        """Refuse when the user may not change what is kept.

        Raises:
            PermissionDeniedError: It says who may.
        """
        if not self._may_change:
            raise PermissionDeniedError(
                f"user {self.uid} may not change what this cache keeps; its own user, root, and the operator_uids of "
                "its [access] may"
            )

    def _may_read(self, uri: str) -> bool:
        check_name(uri)
        return next((self.uid in rule.uids for rule in self._rules if rule.covers(uri)), True)

    def _refused(self, uri: str) -> PermissionDeniedError:
        return PermissionDeniedError(
            f"user {self.uid} may not read {uri} through this cache; see its [access]", uri=uri
        )


def check_name(uri: str) -> None:
    """Refuse a relative path, which would mean a file below the server's own folder; so does fsspec's `local://`.

    Raises:
        BadInputError: It is one.
    """
    if ("://" not in uri and not uri.startswith("/")) or uri.lower().startswith("local:"):
        raise BadInputError(f"{uri!r} names no object: a cache server takes whole URIs and absolute paths", uri=uri)


@lru_cache(maxsize=_MAX_REMEMBERED)
def _spelling(uri: str) -> str:
    """Return one URI for all by which stores would come to the same object. Pure."""
    scheme, _, rest = normalise_url(uri).partition("://")
    scheme = _SAME_STORE.get(scheme, scheme)
    authority, slash, key = rest.partition("/")
    if scheme == "az":
        authority = authority.partition("@")[0]  # container@account
    elif scheme in _PORTS:
        authority = _PORTS[scheme].sub("", authority.rpartition("@")[2]).rstrip(".")
    return f"{scheme}://{authority.lower()}{slash}{key}"


def _is_operator(uid: int) -> bool:
    return uid in (0, os.geteuid())
