"""Leaving samples out without losing exactness: the kept ones are numbered anew, and orders run over those numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from connectors.errors import BadInputError
from dataflow.order.lengths import checksum
from dataflow.order.shuffle import Order
from dataflow.order.source import Shuffle

__all__ = ["Filtered", "Selection"]

# A group of samples whose kept ones are counted in advance: the table then takes an eighth of the mask itself.
_GROUP_SAMPLES = 512


class Selection:
    """A set of sample numbers, of which the k-th is found at once. Takes 9/64 byte a sample; immutable.

    Args:
        keep: bool, one per sample: a stored mask, or a predicate over the columns of an index such as
            `columns["length"] <= 2048`. Copied.
    """

    def __init__(self, keep: npt.NDArray[np.bool_]) -> None:
        keep = np.asarray(keep)
        if keep.ndim != 1 or keep.dtype != np.bool_:
            raise BadInputError(f"a mask has one bool per sample, got {keep.dtype} of shape {keep.shape}")
        self._num_samples = len(keep)
        packed = np.packbits(keep, bitorder="little")
        starts = np.arange(0, max(len(keep), 1), _GROUP_SAMPLES)
        self._bits = np.zeros((len(starts), _GROUP_SAMPLES // 8), dtype=np.uint8)
        self._bits.ravel()[: len(packed)] = packed
        per_group = np.add.reduceat(keep, starts, dtype=np.int64) if len(keep) else np.zeros(1, dtype=np.int64)
        self._kept_before = np.concatenate([[0], np.cumsum(per_group)])

    def __len__(self) -> int:
        """The number of kept samples."""
        return int(self._kept_before[-1])

    @property
    def num_samples(self) -> int:
        """The number of samples that the mask speaks of."""
        return self._num_samples

    def numbers(self, ranks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the sample numbers of the kept samples `ranks`, each in `[0, len)`, counted in stored order."""
        flat = np.ravel(ranks)
        numbers = np.empty(len(flat), dtype=np.int64)
        for part in _parts(len(flat)):
            group = np.searchsorted(self._kept_before, flat[part], side="right") - 1
            wanted = flat[part] - self._kept_before[group]
            kept_up_to = np.cumsum(self._unpacked(group), axis=1, dtype=np.int16)
            numbers[part] = group * _GROUP_SAMPLES + (kept_up_to <= wanted[:, None]).sum(axis=1)
        return numbers.reshape(np.shape(ranks))

    def count_before(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return how many kept samples come before each sample number in `[0, num_samples]`."""
        counts = np.empty(len(numbers), dtype=np.int64)
        for part in _parts(len(numbers)):
            group, inside = np.divmod(numbers[part], _GROUP_SAMPLES)
            bits = self._unpacked(np.minimum(group, len(self._bits) - 1))
            before = np.where(np.arange(_GROUP_SAMPLES) < inside[:, None], bits, 0)
            counts[part] = self._kept_before[group] + before.sum(axis=1)
        return counts

    def _unpacked(self, group: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        return np.unpackbits(self._bits[group], axis=1, bitorder="little")

    def checksum(self) -> str:
        """Name the set, for states."""
        return checksum(self._bits)


def _parts(length: int) -> Iterator[slice]:
    """Some thousands at a time: each costs a kilobyte while it is looked up."""
    return (slice(first, first + 4096) for first in range(0, length, 4096))


class _SelectedOrder:
    """An order over the numbers of kept samples, answered in numbers of the dataset."""

    def __init__(self, order: Order, selection: Selection) -> None:
        self._order = order
        self._selection = selection

    def __len__(self) -> int:
        return len(self._order)

    def at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return self._selection.numbers(self._order.at(positions))

    def take(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        return self._selection.numbers(self._order.take(start, stop))


@dataclass(frozen=True, slots=True, eq=False)
class Filtered:
    """A source that leaves samples out: epochs are complete, exact and of equal steps over those that stay.

    Attributes:
        source: All samples.
        selection: Those that stay; blocks without any are never read.
    """

    source: Shuffle
    selection: Selection
    _kept: Shuffle = field(init=False, repr=False)  # the kept samples as a dataset of their own

    def __post_init__(self) -> None:
        if self.selection.num_samples != self.source.num_samples:
            raise BadInputError(
                f"the mask speaks of {self.selection.num_samples} samples and the dataset has {self.source.num_samples}"
            )
        first_sample = self.source.first_sample
        if first_sample is not None:
            first_sample = self.selection.count_before(first_sample)
        kept = replace(self.source, num_samples=len(self.selection), first_sample=first_sample)
        object.__setattr__(self, "_kept", kept)

    @property
    def num_samples(self) -> int:
        """See `Source`."""
        return len(self.selection)

    def order(self, epoch: int) -> Order:
        """See `Source`."""
        return _SelectedOrder(self._kept.order(epoch), self.selection)

    def identity(self) -> dict[str, Any]:
        """See `Source`."""
        return {**self.source.identity(), "keep": self.selection.checksum()}
