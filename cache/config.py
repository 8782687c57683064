"""What a cache consists of: tiers, ring and the limits on origin traffic. Plain frozen values, checked when built."""

from __future__ import annotations

import math
import os
import re
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import msgspec

from connectors.errors import BadInputError

__all__ = ["RESERVED_NAMES", "CacheConfig", "DirectoryConfig", "Medium", "PolicyName", "TierConfig"]

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
        medium: What the directory lies on; anonymous memory is always `ram`.
        policy: `kept` (lowest hashes stay, nothing is ever written twice; right for epochs), `s3fifo` (favourites
            stay), `next_use` (what plans want soonest stays, else as `kept`), `drop_behind` (what was read leaves
            first), `lru`, or `auto` (`kept`, `s3fifo` or `drop_behind`, by what is observed).
        directories: Several directories instead of `path`, which share the tier's blocks by weight.
    """

    name: str
    capacity_bytes: int
    path: str | None = None
    capacity_blocks: int | None = None
    medium: Medium = "ram"
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
class CacheConfig:
    """A whole cache.

    Attributes:
        tiers: From the first one asked to the last.
        ring_bytes: Memory for blocks that no tier keeps, so that readers a moment apart share one fetch.
        max_inflight_bytes: Most bytes being fetched at once, and most waiting to be written to one directory.
        max_inflight_requests: Most requests to origins at once; halved for a while when one says that it is too much.
        hedge: Send a read of a remote store once more where it takes longer than 99 % of its like, and take the first
            answer.
    """

    tiers: tuple[TierConfig, ...] = ()
    ring_bytes: int = 128 * _MIB
    max_inflight_bytes: int = 256 * _MIB
    max_inflight_requests: int = 32
    hedge: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "tiers", tuple(self.tiers))
        if self.ring_bytes < 0:
            raise BadInputError(f"ring_bytes must be >= 0, got {self.ring_bytes}")
        if self.max_inflight_bytes < 1:
            raise BadInputError(f"max_inflight_bytes must be >= 1, got {self.max_inflight_bytes}")
        if self.max_inflight_requests < 1:
            raise BadInputError(f"max_inflight_requests must be >= 1, got {self.max_inflight_requests}")
        names = [tier.name for tier in self.tiers]
        paths = [place.path for tier in self.tiers for place in tier.places]
        for what, values in (("name", names), ("path", paths)):
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise BadInputError(f"two tiers have the same {what}: {', '.join(twice)}")

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> CacheConfig:
        """Read a file with the attributes at its top level and one `[[tiers]]` table a tier.

        Raises:
            BadInputError: The file is missing, is not TOML, or holds a name or a value that does not belong there.
        """
        try:
            with open(path, "rb") as file:
                found = tomllib.load(file)
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise BadInputError(f"cannot read the cache configuration {os.fspath(path)}: {error}") from error
        return cls.from_table(found, os.fspath(path))

    @classmethod
    def from_table(cls, found: Any, origin: str) -> CacheConfig:
        """Build from what a file held; `BadInputError` as `from_toml`, naming `origin`."""
        return _build(found, origin)

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
    expanded = Path(path).expanduser()
    # The server that opens it may run in another working directory.
    return os.path.normpath(expanded if expanded.is_absolute() else Path.cwd() / expanded)


def _part(own: int | None, whole: int | None, share: float) -> int | None:
    return own if own is not None or whole is None else int(whole * share)


def _build(found: Any, origin: str) -> CacheConfig:
    # msgspec checks types; a misspelt name it would pass over.
    tables: list[tuple[type[CacheConfig | TierConfig | DirectoryConfig], Any]] = [(CacheConfig, found)]
    if isinstance(found, dict) and isinstance(found.get("tiers"), list):
        tables += [(TierConfig, tier) for tier in found["tiers"]]
        for tier in found["tiers"]:
            if isinstance(tier, dict) and isinstance(tier.get("directories"), list):
                tables += [(DirectoryConfig, directory) for directory in tier["directories"]]
    for cls, table in tables:
        known = [field.name for field in fields(cls)]
        unknown = [name for name in table if name not in known] if isinstance(table, dict) else []
        if unknown:
            raise BadInputError(f"{origin}: unknown setting {unknown[0]!r}; known are {', '.join(known)}")
    try:
        return msgspec.convert(found, CacheConfig)
    except msgspec.ValidationError as error:
        raise BadInputError(f"{origin}: {error}") from error
