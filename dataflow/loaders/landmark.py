"""What one batch of an epoch was, by which a resume notices that a sampler draws another order than it did.

A state holds what the order is known to depend on. A sampler may depend on more: on a count of its own epochs, on
generators deeper inside, on losses. So a state also names one batch that was handed out before, by a digest of what the
sampler said is in it, and who draws that batch again to get past it compares.

Digests are the same in all processes. The order inside a list or an array does not count, since datasets sort those
that they are given, and a number is the same in Python, numpy and torch. What has no such digest is not compared.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from connectors.errors import BadInputError

__all__ = ["Landmark", "advanced", "digest_index"]

_DIGEST_BYTES = 8
# Of lists in lists: no index is so deep, and one that holds itself is deeper.
_MAX_DEPTH = 8


@dataclass(frozen=True, slots=True)
class Landmark:
    """One batch of an epoch.

    Attributes:
        batch: Its number in the epoch.
        digest: Of what the sampler said is in it.
    """

    batch: int
    digest: str

    @classmethod
    def of(cls, batch: int, index: Any) -> Landmark | None:
        """Return the landmark that a batch is, None where its index has no digest."""
        digest = digest_index(index)
        return None if digest is None else cls(batch, digest)

    def as_dict(self) -> dict[str, Any]:
        """Return what a state keeps of it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], *, batches: int) -> Landmark:
        """Rebuild it, from the state of an epoch of which so many batches were handed out.

        Raises:
            TypeError, ValueError, KeyError: It is damaged.
        """
        landmark = cls(**saved)
        if not 0 <= operator.index(landmark.batch) <= batches or len(bytes.fromhex(landmark.digest)) != _DIGEST_BYTES:
            raise ValueError("the batch to compare with is out of range")
        return landmark


def advanced(indices: Iterator[Any], number: int, landmark: Landmark | None) -> tuple[Iterator[Any], bool]:
    """Drop `number` indices. Where there are none, draw the first one now, while the generators are what they were.

    Args:
        indices: What a sampler yields for an epoch.
        number: Of batches that were handed out.
        landmark: One of these, or the next.

    Returns:
        What yields the rest, and whether the landmark was there, or could not be compared.

    Raises:
        BadInputError: There are not so many.
    """
    place = max(0, number - 1) if landmark is None else landmark.batch
    drawn = list(itertools.islice(indices, place, place + 1))
    # Now, since a sampler may fill the same list anew for each batch.
    is_same = landmark is None or (bool(drawn) and digest_index(drawn[0]) in (None, landmark.digest))
    drawn += itertools.islice(indices, max(0, number - place - 1))
    if place + len(drawn) < number:
        raise BadInputError(
            f"the loader state comes after batch {number} of an epoch that has fewer: it is damaged, or the sampler "
            "yields less than it did"
        )
    return itertools.chain(drawn[number - place :], indices), is_same


def digest_index(index: Any) -> str | None:
    """Return a digest of what a sampler yields for a batch, None where no process could find the same one again."""
    try:
        return hashlib.blake2b(_encode(index, _MAX_DEPTH), digest_size=_DIGEST_BYTES).hexdigest()
    except Exception:  # an index may be anything, and so may what it raises
        return None


def _encode(value: Any, depth: int) -> bytes:
    """Return bytes that only equal values have.

    Raises:
        TypeError, LookupError, ValueError: There are none.
    """
    if not depth:
        raise ValueError("nested too deep")
    if isinstance(value, (np.ndarray, torch.Tensor)):
        value = value.tolist()  # a number, if it has no dimension
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, tuple):
        return _join(b"t", [_encode(item, depth - 1) for item in value])
    if isinstance(value, (list, set, frozenset, range)):
        return _join(b"l", sorted(_encode(item, depth - 1) for item in value))
    if isinstance(value, Mapping):
        return _join(b"m", sorted(_encode(pair, depth - 1) for pair in value.items()))
    if isinstance(value, slice):
        return _join(b"r", [_encode(part, depth - 1) for part in (value.start, value.stop, value.step)])
    if value is None or isinstance(value, float):
        return b"f" + repr(value).encode()
    if isinstance(value, str):
        return b"s" + value.encode("utf-8", "surrogatepass")
    if isinstance(value, bytes):
        return b"b" + value
    return b"i%d" % operator.index(value)


def _join(kind: bytes, parts: list[bytes]) -> bytes:
    return kind + b"".join(b"%d:%b" % (len(part), part) for part in parts)
