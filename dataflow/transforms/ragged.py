"""Values of different lengths as one tensor: padded to rows, or one after the other with offsets.

Either is asked for by a transform, as the last one of its field. Without one, torch's default collate refuses samples
that do not stack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from connectors.errors import BadInputError
from dataflow.dataset.columns import Allocate
from dataflow.transforms.columns import Columns, value_of
from dataflow.transforms.draws import Draws
from dataflow.transforms.tokens import fitting, numbers_of

__all__ = ["Padded", "Ragged", "RaggedColumn"]


class RaggedColumn(Sequence[npt.NDArray[Any]]):
    """A column whose sample `i` is `values[offsets[i] : offsets[i + 1]]`.

    Attributes:
        values: Of all samples, one after the other.
        offsets: int64, one more than there are samples, the first 0.
    """

    __slots__ = ("offsets", "values")

    def __init__(self, values: npt.NDArray[Any], offsets: npt.NDArray[np.int64]) -> None:
        self.values = values
        self.offsets = offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, place: int) -> npt.NDArray[Any]: ...
    @overload
    def __getitem__(self, place: slice) -> list[npt.NDArray[Any]]: ...
    def __getitem__(self, place: int | slice) -> npt.NDArray[Any] | list[npt.NDArray[Any]]:
        places = range(len(self))[place]
        if isinstance(places, range):
            return [self[one] for one in places]
        return self.values[self.offsets[places] : self.offsets[places + 1]]


@dataclass(frozen=True, slots=True)
class Ragged:
    """Puts values of any length one after the other. A transform of batches.

    If a dataset of `open_dataset` passes through transforms of columns only, a batch has `{"values": tensor, "offsets":
    tensor}` instead of the field: sample `i` is `values[offsets[i] : offsets[i + 1]]`. Read sample by sample, each has
    its own array.

    Attributes:
        field: The field, of one dimension.
    """

    field: str

    def transform_columns(self, columns: Columns, draws: Draws, allocate: Allocate) -> Columns:
        """Do it.

        Raises:
            BadInputError: The field is missing, or holds something else than numbers in one dimension.
        """
        values = _values_of(self.field, columns, draws)
        offsets = np.cumsum([0, *map(len, values)])
        joined = allocate(self.field, (int(offsets[-1]),), _type_of(values))
        np.concatenate(values or [joined], out=joined)
        return {**columns, self.field: RaggedColumn(joined, offsets)}


@dataclass(frozen=True, slots=True)
class Padded:
    """Makes rows of one length of values of any length. A transform of batches.

    It adds the field `<field>_length`: int64, how much of each row is values, before the filling.

    Attributes:
        field: The field, of one dimension.
        filling: What fills the rows after the values.
        length: Of the rows; None makes them as long as the longest of the batch.

    Raises:
        BadInputError: `length` is below 1.
    """

    field: str
    filling: float = 0
    length: int | None = None

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 1:
            raise BadInputError(f"length must be at least 1, got {self.length}")

    def transform_columns(self, columns: Columns, draws: Draws, allocate: Allocate) -> Columns:
        """Do it.

        Raises:
            BadInputError: The field is missing, holds something else than numbers in one dimension, or more of them
                than `length`; or `filling` does not fit their type.
        """
        values = _values_of(self.field, columns, draws)
        lengths = np.array([len(value) for value in values], np.int64)
        longest = int(lengths.max(initial=0))
        width = longest if self.length is None else self.length
        if longest > width:
            raise BadInputError(
                f"{draws.name_of(int(lengths.argmax()))}: field {self.field!r} has {longest} values, more than the "
                f"length of {width}: make it longer, or cut windows first (TokenWindow)"
            )
        rows = allocate(self.field, (len(values), width), _type_of(values))
        is_value = np.arange(width) < lengths[:, None]
        if values:
            rows[is_value] = np.concatenate(values)
        rows[~is_value] = fitting(self.field, np.array([self.filling]), rows.dtype)[0]
        return {**columns, self.field: rows, f"{self.field}_length": lengths}


def _values_of(field: str, columns: Columns, draws: Draws) -> list[npt.NDArray[Any]]:
    values = [numbers_of(field, value) for value in value_of(columns, field)]
    for place, value in enumerate(values):
        if value.ndim != 1:
            raise BadInputError(f"{draws.name_of(place)}: field {field!r} has {value.ndim} dimensions; it needs one")
    return values


def _type_of(values: list[npt.NDArray[Any]]) -> np.dtype[Any]:
    return np.result_type(*{value.dtype for value in values}) if values else np.dtype(np.int64)
