"""One number per sample, read once from a dataset: lengths for batchings, columns for filters."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from connectors.errors import BadInputError
from dataflow.dataset.dataset import Dataset

__all__ = ["read_measure"]

_SAMPLES_AT_ONCE = 4096


def read_measure(dataset: Dataset, field: str) -> npt.NDArray[Any]:
    """Return the value of a numeric field of every sample, or the length of a text, binary or list field.

    Reads the dataset once, in stored order. Keep the result beside the dataset when that takes long. Open the dataset
    with `columns=[field]`, so that nothing else is decoded.

    Args:
        dataset: What to read.
        field: One of its fields.

    Raises:
        BadInputError: There is no such field, a value is missing, or it is neither a number nor has a length.
    """
    if field not in dataset.schema.names:
        raise BadInputError(f"there is no field {field!r}; the dataset has {', '.join(dataset.schema.names)}")
    parts: list[npt.NDArray[Any]] = [np.empty(0, np.int64)] if not len(dataset) else []
    for first in range(0, len(dataset), _SAMPLES_AT_ONCE):
        numbers = np.arange(first, min(first + _SAMPLES_AT_ONCE, len(dataset)))
        column = dataset.get_batch(numbers)[field]
        if isinstance(column, np.ndarray) and column.ndim == 1:
            parts.append(column)
            continue
        try:
            parts.append(np.array([len(value) for value in column], dtype=np.int64))
        except TypeError:
            raise BadInputError(
                f"field {field!r} is no measure of samples {first} to {numbers[-1]}: each must be a number, or have a "
                "length and not be missing"
            ) from None
    return np.concatenate(parts)
