"""Several datasets under one numbering, as `Mixture` counts them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from connectors.errors import BadInputError

__all__ = ["JoinedDataset"]


class _MapStyle(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> Any: ...


class JoinedDataset:
    """The samples of several datasets, the second's numbers beginning where the first's end.

    A batch costs one `__getitems__` per dataset that it touches (one `__getitem__` per sample where a dataset has no
    such method).

    Args:
        datasets: Map-style datasets whose samples collate together.
    """

    def __init__(self, datasets: Sequence[_MapStyle]) -> None:
        if not datasets:
            raise BadInputError("a joined dataset needs at least one dataset")
        self.datasets = list(datasets)
        self.lengths = tuple(len(dataset) for dataset in datasets)
        self._ends = np.cumsum(self.lengths)

    @property
    def fingerprint(self) -> str:
        """A digest of the datasets' own fingerprints, or of type and length where one has none."""
        digest = hashlib.blake2b(digest_size=16)
        for dataset, length in zip(self.datasets, self.lengths, strict=True):
            own = getattr(dataset, "fingerprint", None)
            name = own if isinstance(own, str) else f"{type(dataset).__module__}.{type(dataset).__qualname__}"
            digest.update(f"{name}:{length};".encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> Any:
        """Return one sample; `IndexError` when it is out of range."""
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[Any]:
        """Return many samples, in the order asked; `IndexError` when one is out of range."""
        wanted = np.asarray(numbers, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            wrong = wanted[(wanted < 0) | (wanted >= len(self))][0]
            raise IndexError(f"sample {wrong} is out of range for joined datasets of {len(self)} samples")
        samples: list[Any] = [None] * len(wanted)
        home = np.searchsorted(self._ends, wanted, side="right")
        for which in np.unique(home).tolist():
            places = np.flatnonzero(home == which)
            inside = (wanted[places] - self._ends[which] + self.lengths[which]).tolist()
            for place, sample in zip(places.tolist(), _fetch(self.datasets[which], inside), strict=True):
                samples[place] = sample
        return samples


def _fetch(dataset: Any, numbers: list[int]) -> Sequence[Any]:
    if hasattr(dataset, "__getitems__"):
        fetched: Sequence[Any] = dataset.__getitems__(numbers)
        return fetched
    return [dataset[number] for number in numbers]
