"""What operators ask of a running cache, and what they are told, as messages (see `cache.frames`). Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, TypeAlias

import msgspec

__all__ = [
    "AskUsage",
    "EvictPrefix",
    "Evicted",
    "Held",
    "Order",
    "PinPrefix",
    "PinsKept",
    "Removed",
    "Report",
    "ResizeTier",
    "UnpinPrefix",
    "Usage",
]


@dataclass(slots=True)
class Usage:
    """What the tiers hold of one object, or of all below a folder.

    Attributes:
        name: The URI; a folder's ends with a slash. Empty: blocks of which nobody knows what they are.
        blocks: Blocks by tier; one that lies in two of them counts twice.
        size_bytes: Bytes on the medium by tier.
        pinned_bytes: Of these, those that pins protect.
    """

    name: str
    blocks: dict[str, int] = field(default_factory=dict)
    size_bytes: dict[str, int] = field(default_factory=dict)
    pinned_bytes: int = 0


@dataclass(slots=True)
class Evicted:
    """What became of an eviction.

    Attributes:
        blocks: Removed.
        size_bytes: What that freed on the media.
        pinned: Blocks that stay because they are pinned.
        failed: Blocks that a disk does not let go of, or that were leaving by themselves.
    """

    blocks: int = 0
    size_bytes: int = 0
    pinned: int = 0
    failed: int = 0


class AskUsage(msgspec.Struct, tag="usage", frozen=True):
    """Ask what the tiers hold at and below a URL; see `cache.administration`. Answered by `Held`."""

    prefix: str
    depth: Annotated[int, msgspec.Meta(ge=0, le=1)]
    after: str


class PinPrefix(msgspec.Struct, tag="pin", frozen=True):
    """Pin what lies at and below a URL, for so many seconds or for good; answered by `PinsKept`."""

    prefix: str
    size_bytes: Annotated[int, msgspec.Meta(ge=0)]
    expires_s: Annotated[float, msgspec.Meta(gt=0)] | None


class UnpinPrefix(msgspec.Struct, tag="unpin", frozen=True):
    """Take a pin back; answered by `PinsKept`."""

    prefix: str


class EvictPrefix(msgspec.Struct, tag="evict", frozen=True):
    """Remove what the tiers hold at and below a URL; answered by `Removed`."""

    prefix: str


class ResizeTier(msgspec.Struct, tag="resize", frozen=True):
    """Give a tier other limits; answered by `Done` once they are in force."""

    tier: str
    capacity_bytes: Annotated[int, msgspec.Meta(ge=0)]
    capacity_blocks: Annotated[int, msgspec.Meta(ge=0)] | None


class Held(msgspec.Struct, tag="held", frozen=True):
    """What is held of the next names; `more` follow the last of them."""

    rows: list[Usage]
    more: bool


class PinsKept(msgspec.Struct, tag="pins", frozen=True):
    """The pins are as was asked. `survive`: they were written down, so that the next server has them too."""

    survive: bool


class Removed(msgspec.Struct, tag="removed", frozen=True):
    """What was evicted."""

    evicted: Evicted


Order: TypeAlias = AskUsage | PinPrefix | UnpinPrefix | EvictPrefix | ResizeTier
Report: TypeAlias = Held | PinsKept | Removed
