"""Lengths of samples as batchings need them: checked, and named by a checksum for states."""

from __future__ import annotations

import crc32c
import numpy as np
import numpy.typing as npt

from connectors.errors import BadInputError

__all__ = ["check_lengths", "checksum"]


def check_lengths(lengths: npt.NDArray[np.integer], longest: int, remedy: str) -> None:
    """Insist on one whole number of at least 1 per sample, none above `longest`.

    Raises:
        BadInputError: Names the first sample that does not fit, how many do not, and the `remedy`.
    """
    if lengths.ndim != 1 or not np.issubdtype(lengths.dtype, np.integer):
        raise BadInputError(f"lengths must be one integer per sample, got {lengths.dtype} of shape {lengths.shape}")
    if lengths.size and lengths.min() < 1:
        raise BadInputError(f"every sample has a length >= 1, sample {int(lengths.argmin())} has {lengths.min()}")
    if lengths.size and lengths.max() > longest:
        wrong = np.flatnonzero(lengths > longest)
        raise BadInputError(
            f"sample {wrong[0]} has length {lengths[wrong[0]]}, as one of {len(wrong)} above {longest}; {remedy}"
        )


def checksum(values: npt.NDArray[np.generic]) -> str:
    """Name the content of an array: crc32c of its bytes, and its length."""
    return f"{crc32c.crc32c(np.ascontiguousarray(values).data.cast('B')):08x}-{values.size}"
