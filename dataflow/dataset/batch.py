"""A batch: columns that can also be read as a sequence of samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias, overload

__all__ = ["Batch", "Sample"]

Sample: TypeAlias = dict[str, Any]


class Batch(Sequence[Sample]):
    """Samples that were fetched together.

    Reading it as a sequence makes one `dict` per sample, so whatever takes a list of samples (torch's own collate among
    them) takes a batch. Array values of a sample are views of the batch's columns.

    Attributes:
        columns: One entry per field: an array whose first axis runs over the samples, or a list.
    """

    __slots__ = ("_length", "columns")

    def __init__(self, columns: dict[str, Any], length: int) -> None:
        self.columns = columns
        self._length = length

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, position: int) -> Sample: ...
    @overload
    def __getitem__(self, position: slice) -> list[Sample]: ...
    def __getitem__(self, position: int | slice) -> Sample | list[Sample]:
        places = range(self._length)[position]
        if isinstance(places, range):
            return [self._sample(place) for place in places]
        return self._sample(places)

    def __iter__(self) -> Iterator[Sample]:
        return map(self._sample, range(self._length))

    def __repr__(self) -> str:
        return f"Batch({self._length} samples of {', '.join(self.columns)})"

    def _sample(self, place: int) -> Sample:
        return {name: column[place] for name, column in self.columns.items()}
