"""Several datasets under one numbering, as `Mixture` counts them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from connectors.errors import BadInputError
from dataflow.dataset.columns import Allocate

__all__ = ["JoinedDataset"]


class _MapStyle(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> Any: ...


class JoinedDataset:
    """The samples of several datasets, the second's numbers beginning where the first's end.

    A batch costs one `__getitems__` per dataset that it touches (one `__getitem__` per sample where a dataset has no
    such method). Datasets of `open_dataset` whose schemas agree also keep their way of gathering columns straight into
    the batch: then, and only then, there is `get_batch`.

    Args:
        datasets: Map-style datasets whose samples collate together.
    """

    def __init__(self, datasets: Sequence[_MapStyle]) -> None:
        if not datasets:
            raise BadInputError("a joined dataset needs at least one dataset")
        self.datasets = list(datasets)
        self.lengths = tuple(len(dataset) for dataset in datasets)
        self._ends = np.cumsum(self.lengths)
        schemas = [getattr(dataset, "schema", None) for dataset in self.datasets]
        if all(hasattr(dataset, "get_batch") for dataset in self.datasets) and schemas.count(schemas[0]) == len(
            schemas
        ):
            # An attribute, since a loader takes any dataset that has it for one that gathers columns.
            self.get_batch = self._get_batch

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
        samples: list[Any] = [None] * len(numbers)
        for dataset, places, inside in self._by_dataset(numbers):
            for place, sample in zip(places.tolist(), _fetch(dataset, inside), strict=True):
                samples[place] = sample
        return samples

    def _get_batch(self, numbers: Sequence[int], allocate: Allocate | None = None) -> dict[str, Any]:
        """Return the columns of some samples: as `Dataset.get_batch`, of each dataset, and put in the order asked."""
        pieces = [(places, dataset.get_batch(inside)) for dataset, places, inside in self._by_dataset(numbers)]
        if not pieces:
            empty: dict[str, Any] = self.datasets[0].get_batch([], allocate)  # type: ignore[attr-defined]
            return empty
        order = np.argsort(np.concatenate([places for places, _ in pieces]))
        return {
            name: _interleave(name, [columns[name] for _, columns in pieces], order, allocate) for name in pieces[0][1]
        }

    def _by_dataset(self, numbers: Sequence[int]) -> Iterator[tuple[Any, npt.NDArray[np.int64], list[int]]]:
        """Yield each dataset that is touched, the places of its samples in the batch, and their numbers in it."""
        wanted = np.asarray(numbers, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            wrong = wanted[(wanted < 0) | (wanted >= len(self))][0]
            raise IndexError(f"sample {wrong} is out of range for joined datasets of {len(self)} samples")
        home = np.searchsorted(self._ends, wanted, side="right")
        for which in np.unique(home).tolist():
            places = np.flatnonzero(home == which)
            yield self.datasets[which], places, (wanted[places] - self._ends[which] + self.lengths[which]).tolist()


def _interleave(name: str, pieces: list[Any], order: npt.NDArray[np.int64], allocate: Allocate | None) -> Any:
    """Bring the pieces of one column into the order of the batch: an array where they agree in shape and type."""
    if all(isinstance(piece, np.ndarray) for piece in pieces):
        first = pieces[0]
        if all(piece.shape[1:] == first.shape[1:] and piece.dtype == first.dtype for piece in pieces):
            shape = (len(order), *first.shape[1:])
            out = np.empty(shape, first.dtype) if allocate is None else allocate(name, shape, first.dtype)
            return np.take(np.concatenate(pieces), order, axis=0, out=out, mode="clip")
    values = [value for piece in pieces for value in piece]
    return [values[place] for place in order.tolist()]


def _fetch(dataset: Any, numbers: list[int]) -> Sequence[Any]:
    if hasattr(dataset, "__getitems__"):
        fetched: Sequence[Any] = dataset.__getitems__(numbers)
        return fetched
    return [dataset[number] for number in numbers]
