"""A dataset seen through transforms."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from connectors.errors import BadInputError
from dataflow.dataset.batch import Batch
from dataflow.dataset.columns import Allocate
from dataflow.dataset.dataset import Dataset
from dataflow.index import Index
from dataflow.observe.stages import stage
from dataflow.transforms.callables import SampleStep, generators_put_back
from dataflow.transforms.columns import Columns, ColumnTransform, columns_of
from dataflow.transforms.draws import Draws
from dataflow.transforms.epoch import current_epoch
from dataflow.transforms.tokens import Cast

__all__ = ["TransformedDataset"]

_NUMBERS = "biuf"


class _MapStyle(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> Any: ...


class TransformedDataset:
    """A map-style dataset that passes samples through transforms; give it to a `DataLoader` instead of the dataset.

    What is random about a sample is a function of (seed, epoch, number of the sample): the same for any number of
    workers and ranks, after a restart, and in any batch. The loader gives the epoch; without a loader it is 0. This
    does not hold for draws from the global generators in worker threads, which share these with each other and the
    trainer.

    Transforms of columns run over whole batches. If all transforms are of that kind and the dataset comes from
    `open_dataset`, the last one writes its result straight into the batch.

    Args:
        dataset: Samples by number.
        transforms: One transform or several, in their order: callables `(sample, rng)`, `(sample)`, or with the fields
            as keywords, and transforms of columns.
        seed: Any integer; the same on every rank.
    """

    def __init__(
        self,
        dataset: _MapStyle,
        transforms: Callable[..., Any] | ColumnTransform | Sequence[Callable[..., Any] | ColumnTransform],
        *,
        seed: int = 0,
    ) -> None:
        self._dataset = dataset
        given = transforms if isinstance(transforms, Sequence) else [transforms]
        self._steps = [one if isinstance(one, ColumnTransform) else SampleStep(one) for one in given]
        self._seed = seed
        self._is_foreign = any(isinstance(step, SampleStep) and step.is_foreign for step in self._steps)
        # Looked at here: whether an object has a protocol's methods costs more than a batch of tokens does.
        self._column_steps = [step for step in self._steps if isinstance(step, ColumnTransform)]
        if hasattr(dataset, "get_batch") and len(self._column_steps) == len(self._steps):
            # An attribute, since a loader takes any dataset that has it for one that gathers columns.
            self.get_batch = self._get_batch
        self._casts = _casts_of(dataset, self._column_steps)
        index = getattr(dataset, "index", None)
        self._index = index if isinstance(index, Index) and index.num_samples == len(dataset) else None

    @property
    def dataset(self) -> Any:
        """The dataset as it is without the transforms."""
        return self._dataset

    @property
    def is_rowwise(self) -> bool:
        """As that of the dataset; only casts are known to keep it."""
        return getattr(self._dataset, "is_rowwise", False) and all(isinstance(step, Cast) for step in self._steps)

    @property
    def fingerprint(self) -> Any:
        """That of the dataset: transforms change no order."""
        return self.dataset.fingerprint

    @property
    def index(self) -> Any:
        """That of the dataset: where its samples lie."""
        return self.dataset.index

    @property
    def buffer_bytes(self) -> Any:
        """That of the dataset: limit on the decoded blocks that each process keeps."""
        return self.dataset.buffer_bytes

    @property
    def reader(self) -> Any:
        """That of the dataset: where its bytes come from."""
        return self.dataset.reader

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, number: int) -> Any:
        """Return one sample; `IndexError` when it is out of range."""
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> Sequence[Any]:
        """Return many samples, in the order asked; `IndexError` when one is out of range.

        Raises:
            Exception: Whatever a transform raises, with a note that names the sample.
        """
        samples: Sequence[Any] = self._fetch(numbers)
        draws = self._draws(numbers)
        with stage("transform"), generators_put_back() if self._is_foreign else contextlib.nullcontext():
            for step in self._steps:
                if isinstance(step, SampleStep):
                    samples = _each(step, samples, draws)
                else:
                    columns = samples.columns if isinstance(samples, Batch) else columns_of(samples)
                    samples = Batch(step.transform_columns(dict(columns), draws, _allocate), len(samples))
        return samples

    def _get_batch(self, numbers: Sequence[int], allocate: Allocate | None = None) -> Columns:
        """Return the columns of some samples: as `Dataset.get_batch`, transformed."""
        final: Allocate = allocate or _allocate
        # A field is put where it stays by the last that changes it: only then is memory of the batch taken for it.
        last = {step.field: place for place, step in enumerate(self._column_steps)}

        def gather(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
            cast = self._casts.get(name)
            if cast is not None and dtype.kind in _NUMBERS and np.can_cast(dtype, cast, "safe"):
                return final(name, shape, cast)  # the step then finds nothing to do
            stays = name not in last and None not in last
            return final(name, shape, dtype) if stays else _allocate(name, shape, dtype)

        wanted = np.asarray(numbers)
        columns: Columns = self._dataset.get_batch(wanted, gather)  # type: ignore[attr-defined]
        draws = self._draws(wanted)
        with stage("transform"):
            for place, step in enumerate(self._column_steps):
                stays = last[step.field] == place and None not in last
                columns = step.transform_columns(columns, draws, final if stays else _allocate)
        return columns

    def _fetch(self, numbers: Sequence[int]) -> Sequence[Any]:
        if hasattr(self._dataset, "__getitems__"):
            fetched: Sequence[Any] = self._dataset.__getitems__(numbers)
            return fetched
        return [self._dataset[number] for number in numbers]

    def _draws(self, numbers: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Draws:
        samples = np.asarray(numbers, np.int64) if len(numbers) else np.empty(0, np.int64)
        if samples.ndim != 1:
            raise BadInputError(f"transforms need the numbers of samples, got an array of shape {samples.shape}")
        if (samples < 0).any():
            samples = np.where(samples < 0, samples + len(self), samples)
        return Draws(self._seed, current_epoch(), samples, self._index)


def _casts_of(dataset: Any, steps: Sequence[ColumnTransform]) -> dict[str, np.dtype[Any]]:
    """Return the types that fields may be gathered in: of those that a native dataset gathers and one step casts."""
    fields = [step.field for step in steps]
    if not isinstance(dataset, Dataset) or None in fields:
        return {}
    casts = {step.field: np.dtype(step.dtype) for step in steps if isinstance(step, Cast)}
    return {field: cast for field, cast in casts.items() if fields.count(field) == 1 and cast.kind in _NUMBERS}


def _each(step: SampleStep, samples: Sequence[Any], draws: Draws) -> list[Any]:
    made = []
    for place, sample in enumerate(samples):
        try:
            made.append(step(sample, draws, place))
        except Exception as error:
            error.add_note(f"in a transform of {draws.name_of(place)}")
            raise
    return made


def _allocate(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:  # noqa: ARG001
    return np.empty(shape, dtype)
