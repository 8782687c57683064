"""Transforms that see a whole batch at once, as columns, and how samples become columns.

A column is an array whose first axis runs over the samples, or a list with one value per sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from connectors.errors import BadInputError, CorruptError
from dataflow.dataset.columns import Allocate
from dataflow.transforms.draws import Draws

__all__ = ["ColumnTransform", "Columns", "columns_of", "file_in", "over_columns", "value_of"]

Columns: TypeAlias = dict[str, Any]


@runtime_checkable
class ColumnTransform(Protocol):
    """A transform of batches. What it does to a sample must not depend on the others of its batch."""

    @property
    def field(self) -> str | None:
        """The only field that it changes, if there is just one."""
        ...

    def transform_columns(self, columns: Columns, draws: Draws, allocate: Allocate) -> Columns:
        """Return the columns transformed; those given may be changed.

        Args:
            columns: By field.
            draws: `draws[i]` is the random generator of sample `i` of the batch.
            allocate: `allocate(field, shape, dtype)` gives the array to put a result in, which saves a copy later on.
        """
        ...


class _ColumnFunction:
    field = None

    def __init__(self, function: Callable[[Columns, Draws], Columns]) -> None:
        self._function = function

    def transform_columns(self, columns: Columns, draws: Draws, allocate: Allocate) -> Columns:
        return self._function(columns, draws)


def over_columns(function: Callable[[Columns, Draws], Columns]) -> ColumnTransform:
    """Make a function `(columns, draws) -> columns` a transform of batches.

    Args:
        function: Gets the columns and the samples' random generators. A module's function, if workers are spawned.
    """
    return _ColumnFunction(function)


def columns_of(samples: Sequence[Mapping[str, Any]]) -> Columns:
    """Return samples as columns; arrays of one shape and type are stacked.

    Raises:
        BadInputError: They are no mappings, or do not have the same fields.
    """
    if not samples:
        return {}
    first = samples[0]
    if not all(isinstance(sample, Mapping) and sample.keys() == first.keys() for sample in samples):
        raise BadInputError("a transform of columns needs samples that are mappings with the same fields")
    return {name: _column([sample[name] for sample in samples]) for name in first}


def _column(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, (np.ndarray, np.generic)) and all(
        isinstance(value, (np.ndarray, np.generic)) and value.shape == first.shape and value.dtype == first.dtype
        for value in values
    ):
        return np.stack(values)
    return values


def value_of(fields: Mapping[str, Any], name: str) -> Any:
    """Return a field of a sample, or a column of a batch.

    Raises:
        BadInputError: There is none of this name; says which there are.
    """
    if name not in fields:
        raise BadInputError(f"the samples have no field {name!r}, only {', '.join(fields)}")
    return fields[name]


def file_in(name: str, value: Any, *, hint: str = "") -> bytes | bytearray | memoryview:
    """Return the encoded file that a field of a sample holds: bytes, or an array of uint8.

    Raises:
        CorruptError: The field is null, so that the sample, and no other, is without a file.
        BadInputError: It is something else.
    """
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 1:
        return value.data
    if value is None:
        raise CorruptError(f"field {name!r} is null, and there is no file to decode")
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise BadInputError(f"field {name!r} must hold the bytes of a file, got {type(value).__name__}{hint}")
    return value
