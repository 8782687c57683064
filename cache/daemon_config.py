"""The configuration file of a daemon: its cache, and under `[access]` who may use it."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, field, fields
from typing import Any

import msgspec

from cache.config import CacheConfig
from cache.rights import AccessConfig, PrefixRule
from connectors.errors import BadInputError

__all__ = ["DaemonConfig"]


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """Everything that a daemon's file says.

    Attributes:
        cache: Tiers and limits.
        access: Who may use it.
    """

    cache: CacheConfig = field(default_factory=CacheConfig)
    access: AccessConfig = field(default_factory=AccessConfig)

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> DaemonConfig:
        """Read a file as `CacheConfig.from_toml` does, with a table `[access]` beside.

        Raises:
            BadInputError: The file is missing, is not TOML, or holds a name or a value that does not belong there.
        """
        name = os.fspath(path)
        try:
            with open(path, "rb") as file:
                found = tomllib.load(file)
        except (OSError, ValueError) as error:  # no TOML, or not even UTF-8
            raise BadInputError(f"cannot read the cache configuration {name}: {error}") from error
        access = _access(found.pop("access", {}), name)
        return cls(CacheConfig.from_table(found, name), access)


def _access(found: Any, name: str) -> AccessConfig:
    rules = found.get("rules", []) if isinstance(found, dict) else []
    tables: list[tuple[type[AccessConfig | PrefixRule], Any]] = [(AccessConfig, found)]
    tables += [(PrefixRule, rule) for rule in rules] if isinstance(rules, list) else []
    for cls, table in tables:
        known = [entry.name for entry in fields(cls)]
        unknown = [key for key in table if key not in known] if isinstance(table, dict) else []
        if unknown:
            raise BadInputError(f"{name}: access: unknown setting {unknown[0]!r}; known are {', '.join(known)}")
    try:
        return msgspec.convert(found, AccessConfig)
    except msgspec.ValidationError as error:
        raise BadInputError(f"{name}: access: {error}") from error
