"""What a block's key does not say: which object it is a part of, for which job it came, and when. Pure.

Blocks of an object that came for one job at about the same time share one `Label`, so that it costs each of them an
entry of a dict. Times are rounded down: a block seems older than it is, never younger.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from cache.prefixes import normal

__all__ = ["Label", "Labels"]

# Objects whose blocks come by turns, as in a shuffled epoch over shards.
_SHARED = 1 << 12


@dataclass(frozen=True, slots=True)
class Label:
    """What is known of a block.

    Attributes:
        uri: The object, in its normal form.
        job: For which it was fetched; empty where nobody said.
        born_s: When it was fetched, in whole seconds of the wall clock, rounded down.
    """

    uri: str
    job: str
    born_s: int


class Labels:
    """The labels of all blocks that are anywhere in a cache, and of those that are being fetched.

    Args:
        grain_s: To how many seconds times are rounded, for blocks of an object.

    Attributes:
        share: Makes a label, or returns one that is equal.
    """

    def __init__(self, grain_s: Callable[[str], int]) -> None:
        self._grain_s = grain_s
        self._labels: dict[bytes, Label] = {}
        self._normal = lru_cache(maxsize=_SHARED)(normal)
        self.share = lru_cache(maxsize=_SHARED)(Label)

    def __len__(self) -> int:
        return len(self._labels)

    def get(self, key: bytes) -> Label | None:
        """Return the label of a block; None for one that came in without."""
        return self._labels.get(key)

    def note(self, key: bytes, uri: str, job: str, now_s: float) -> None:
        """A block is fetched now."""
        name = self._normal(uri)
        grain_s = self._grain_s(name)
        self._labels[key] = self.share(name, job, int(now_s // grain_s * grain_s))

    def adopt(self, key: bytes, label: Label) -> None:
        """A block was here before this process, with this label, unless it was fetched since."""
        self._labels.setdefault(key, label)

    def keys(self) -> list[bytes]:
        """Return all that have a label."""
        return list(self._labels)

    def forget(self, key: bytes) -> None:
        """A block is nowhere any more."""
        self._labels.pop(key, None)
