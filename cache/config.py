"""What a cache consists of: tiers, ring and the limits on origin traffic. Plain frozen values, checked when built."""

from __future__ import annotations

import math
import os
import re
import tomllib
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import msgspec

from connectors.errors import BadInputError
from connectors.objects import normalise_url
from connectors.sizes import parse_size

__all__ = [
    "RESERVED_NAMES",
    "CacheConfig",
    "DirectoryConfig",
    "JobConfig",
    "Medium",
    "PolicyName",
    "PrefixConfig",
    "TierConfig",
]

Medium: TypeAlias = Literal["ram", "nvme", "hdd"]
PolicyName: TypeAlias = Literal["kept", "lru", "s3fifo", "next_use", "drop_behind", "auto"]

RESERVED_NAMES = frozenset({"direct", "in_place", "origin", "ring"})
"""Sources that a block can have without being in a tier."""

_MIB = 1024 * 1024
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")


@dataclass(frozen=True, slots=True)
class DirectoryConfig:
    """One of several directories of a tier.

    Attributes:
        path: Where it is, made absolute here.
        weight: Its part of the tier's blocks, beside the weights of the others.
        capacity_bytes: Most bytes there; None gives it its part of the tier's, by weight.
        capacity_blocks: Most blocks there; None gives it its part of the tier's, where the tier has a limit.
    """

    path: str
    weight: float = 1.0
    capacity_bytes: int | None = None
    capacity_blocks: int | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise BadInputError("the path of a directory is empty")
        if not (0 < self.weight < math.inf):
            raise BadInputError(f"{self.path}: weight must be > 0, got {self.weight}")
        for name in ("capacity_bytes", "capacity_blocks"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise BadInputError(f"{self.path}: {name} must be >= 0, got {value}")
        object.__setattr__(self, "path", _absolute(self.path))


@dataclass(frozen=True, slots=True)
class TierConfig:
    """One tier.

    Attributes:
        name: What statistics and `BlockData.source` call it: lower-case letters, digits, `_` and `-`.
        capacity_bytes: Most bytes it takes on its medium; 0 keeps nothing.
        path: Directory that holds it, made absolute here; None keeps blocks in anonymous memory.
        capacity_blocks: Most blocks (inodes or descriptors); None sets no limit for a directory, and for memory
            what the limit on open files allows.
        medium: What the directory lies on; None is `nvme`, which is right for any disk. What a disk gives is checked
            each time; of a directory in memory (`ram`, a tmpfs) only what an earlier server wrote. Anonymous memory is
            always `ram`.
        policy: `kept` (lowest hashes stay, nothing is ever written twice; right for epochs), `s3fifo` (favourites
            stay), `next_use` (what plans want soonest stays, else as `kept`), `drop_behind` (what was read leaves
            first), `lru`, or `auto` (`kept`, `s3fifo` or `drop_behind`, by what is observed).
        directories: Several directories instead of `path`, which share the tier's blocks by weight.
    """

    name: str
    capacity_bytes: int
    path: str | None = None
    capacity_blocks: int | None = None
    medium: Medium | None = None
    policy: PolicyName = "kept"
    directories: tuple[DirectoryConfig, ...] = ()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name in RESERVED_NAMES:
            raise BadInputError(
                f"a tier's name is 1-32 of a-z, 0-9, _ and -, not one of {sorted(RESERVED_NAMES)}; got {self.name!r}"
            )
        if self.capacity_bytes < 0:
            raise BadInputError(f"tier {self.name}: capacity_bytes must be >= 0, got {self.capacity_bytes}")
        if self.capacity_blocks is not None and self.capacity_blocks < 0:
            raise BadInputError(f"tier {self.name}: capacity_blocks must be >= 0, got {self.capacity_blocks}")
        if self.medium is None:
            object.__setattr__(self, "medium", "ram" if self.path is None and not self.directories else "nvme")
        if self.medium not in ("ram", "nvme", "hdd"):
            raise BadInputError(f"tier {self.name}: medium must be ram, nvme or hdd, got {self.medium!r}")
        if self.policy not in get_args(PolicyName):
            raise BadInputError(
                f"tier {self.name}: policy must be one of {', '.join(get_args(PolicyName))}, got {self.policy!r}"
            )
        object.__setattr__(self, "directories", tuple(self.directories))
        if self.path is not None and self.directories:
            raise BadInputError(f"tier {self.name}: give path or directories, not both")
        if self.path is None and not self.directories and self.medium != "ram":
            raise BadInputError(f"tier {self.name}: medium {self.medium} needs a path")
        if self.path is not None:
            if not self.path:
                raise BadInputError(f"tier {self.name}: path is empty; leave it out for a tier in memory")
            object.__setattr__(self, "path", _absolute(self.path))
        for name in ("capacity_bytes", "capacity_blocks"):
            limit, parts = getattr(self, name), [getattr(place, name) for place in self.places]
            if limit is not None and self.directories and (total := sum(parts)) > limit:
                raise BadInputError(f"tier {self.name}: its directories have {name} {total}, more than its {limit}")

    @property
    def places(self) -> tuple[DirectoryConfig, ...]:
        """Its directories, each with limits of its own; none for a tier in anonymous memory."""
        if self.path is not None:
            return (DirectoryConfig(self.path, 1.0, self.capacity_bytes, self.capacity_blocks),)
        weights = sum(place.weight for place in self.directories)
        return tuple(
            replace(
                place,
                capacity_bytes=_part(place.capacity_bytes, self.capacity_bytes, place.weight / weights),
                capacity_blocks=_part(place.capacity_blocks, self.capacity_blocks, place.weight / weights),
            )
            for place in self.directories
        )


@dataclass(frozen=True, slots=True)
class PrefixConfig:
    """How long the cache keeps data at or below a URL, and how much. Of several prefixes that fit, the longest counts.

    Attributes:
        prefix: The URL, made normal here.
        ttl_s: Age from which the cache no longer serves a block, and removes it; None sets no limit.
        quota_bytes: Most bytes on the media of all tiers together; None sets no limit.
    """

    prefix: str
    ttl_s: float | None = None
    quota_bytes: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefix", normalise_url(self.prefix))
        if self.ttl_s is not None and not (1 <= self.ttl_s < math.inf):
            raise BadInputError(f"{self.prefix}: ttl_s must be >= 1, got {self.ttl_s}")
        _check_quota(self.prefix, self.quota_bytes)


@dataclass(frozen=True, slots=True)
class JobConfig:
    """How much the cache keeps of what a job fetches. Of several rules that fit, the first counts.

    Attributes:
        name: Name of the jobs, which they give in `DATAFLOW_JOB`; `*` and `?` stand for any letters. Each job that fits
            has a quota of its own.
        quota_bytes: Most bytes on the media of all tiers together.
    """

    name: str
    quota_bytes: int

    def __post_init__(self) -> None:
        if not self.name:
            raise BadInputError('the name of a job is empty; "*" means all that have one')
        _check_quota(f"job {self.name}", self.quota_bytes)


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """A whole cache.

    Attributes:
        tiers: From the first one asked to the last.
        ring_bytes: Memory for blocks that no tier keeps, so that readers a moment apart share one fetch.
        max_inflight_bytes: Most bytes being fetched at once, and most waiting to be written to one directory.
        max_inflight_requests: Most requests to origins at once; halved for a while when one says that it is too much.
        hedge: Send a read of a remote store once more if it takes longer than 99 % of reads of its size, and take the
            first answer.
        prefixes: Rules for data, by its URL.
        jobs: Rules for data, by the job that it was fetched for.
        pinned_share: The part of each tier that pins may take.
    """

    tiers: tuple[TierConfig, ...] = ()
    ring_bytes: int = 128 * _MIB
    max_inflight_bytes: int = 256 * _MIB
    max_inflight_requests: int = 32
    hedge: bool = True
    prefixes: tuple[PrefixConfig, ...] = ()
    jobs: tuple[JobConfig, ...] = ()
    pinned_share: float = 0.8

    def __post_init__(self) -> None:
        for name in ("tiers", "prefixes", "jobs"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not 0 <= self.pinned_share <= 1:
            raise BadInputError(f"pinned_share must be within 0 and 1, got {self.pinned_share}")
        if self.ring_bytes < 0:
            raise BadInputError(f"ring_bytes must be >= 0, got {self.ring_bytes}")
        if self.max_inflight_bytes < 1:
            raise BadInputError(f"max_inflight_bytes must be >= 1, got {self.max_inflight_bytes}")
        if self.max_inflight_requests < 1:
            raise BadInputError(f"max_inflight_requests must be >= 1, got {self.max_inflight_requests}")
        names = [tier.name for tier in self.tiers]
        paths = [place.path for tier in self.tiers for place in tier.places]
        prefixes = [rule.prefix for rule in self.prefixes]
        jobs = [rule.name for rule in self.jobs]
        for what, values in (
            ("tiers have the same name", names),
            ("tiers have the same path", paths),
            ("rules have the same prefix", prefixes),
            ("rules are for the same job", jobs),
        ):
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise BadInputError(f"two {what}: {', '.join(twice)}")

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> CacheConfig:
        """Read a file with the attributes at its top level and one `[[tiers]]` table a tier.

        Sizes are numbers of bytes, or texts such as `"64GiB"` (see `connectors.sizes`).

        Raises:
            BadInputError: The file is missing, is not TOML, or holds a name or a value that does not belong there.
        """
        try:
            with open(path, "rb") as file:
                found = tomllib.load(file)
        except (OSError, ValueError) as error:  # no TOML, or not even UTF-8
            raise BadInputError(f"cannot read the cache configuration {os.fspath(path)}: {error}") from error
        return cls.from_table(found, os.fspath(path))

    @classmethod
    def from_table(cls, found: Any, origin: str) -> CacheConfig:
        """Build from what a file held; `BadInputError` as `from_toml`, naming `origin`."""
        return _build(deepcopy(found), origin)

    @classmethod
    def from_json(cls, text: str | bytes) -> CacheConfig:
        """Rebuild what `to_json` wrote; `BadInputError` as `from_toml`."""
        try:
            found = msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise BadInputError(f"the cache configuration is not JSON: {error}") from error
        return _build(found, "the cache configuration")

    def to_json(self) -> str:
        """Write everything as one JSON object."""
        return msgspec.json.encode(self).decode()


def _absolute(path: str) -> str:
    if "\0" in path:
        raise BadInputError(f"{path!r} contains NUL and cannot name a directory")
    try:
        expanded = Path(path).expanduser()
    except RuntimeError as error:
        raise BadInputError(f"cannot say where {path} is: {error}") from error
    # The server that opens it may run in another working directory.
    absolute = os.path.normpath(expanded if expanded.is_absolute() else Path.cwd() / expanded)
    try:
        absolute.encode()
    except UnicodeEncodeError:  # as which it travels to the server
        raise BadInputError(f"{absolute!r} is not UTF-8; name another directory for the cache") from None
    return absolute


def _part(own: int | None, whole: int | None, share: float) -> int | None:
    return own if own is not None or whole is None else int(whole * share)


def _check_quota(what: str, quota_bytes: int | None) -> None:
    if quota_bytes is not None and quota_bytes < 0:
        raise BadInputError(f"{what}: quota_bytes must be >= 0, got {quota_bytes}")


def _build(found: Any, origin: str) -> CacheConfig:
    # msgspec checks types; a misspelt name it would pass over.
    tables: list[tuple[type[Any], Any]] = [(CacheConfig, found)] if isinstance(found, dict) else []
    for cls, name in ((TierConfig, "tiers"), (PrefixConfig, "prefixes"), (JobConfig, "jobs")):
        tables += [(cls, table) for table in _tables(found, name)]
    tables += [(DirectoryConfig, place) for tier in _tables(found, "tiers") for place in _tables(tier, "directories")]
    for cls, table in tables:
        known = [field.name for field in fields(cls)]
        unknown = [name for name in table if name not in known]
        if unknown:
            raise BadInputError(f"{origin}: unknown setting {unknown[0]!r}; known are {', '.join(known)}")
        for name, value in table.items():
            if name.endswith("_bytes") and isinstance(value, str):
                table[name] = _size(name, value, origin)
        # What the statistics repeat has to fit into a message.
        large = [name for name, value in table.items() if isinstance(value, int) and value >= 1 << 63]
        if large:
            raise BadInputError(f"{origin}: {large[0]} must be below 2**63, got {table[large[0]]}")
    try:
        return msgspec.convert(found, CacheConfig)
    except msgspec.ValidationError as error:
        raise BadInputError(f"{origin}: {error}") from error


def _size(name: str, text: str, origin: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise BadInputError(f"{origin}: {name}: {error}") from error


def _tables(found: Any, name: str) -> list[dict[str, Any]]:
    """Return the tables in a list of them; what is anything else is left to msgspec."""
    entries = found.get(name) if isinstance(found, dict) else None
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
