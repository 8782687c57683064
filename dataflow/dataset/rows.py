"""Rows of one width that lie anywhere in memory, gathered by one call of numpy, however many blocks they come from.

numpy indexes an array, and blocks are many arrays: a call for each costs more than the rows themselves where a batch
takes a few rows of each. So there is one array over all of memory, with a row at every address, of which nothing is
looked at but the rows that are asked for.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["MAX_ROW_BYTES", "address_of", "rows_at"]

# Linux gives a process that asks for no more addresses of 47 bits on x86 and of 48 on Arm. Numpy counts bytes in 63
# bits, of which that leaves 15 for the width of a row.
_NUM_ADDRESSES = 1 << 48
MAX_ROW_BYTES = 1 << 14


def address_of(array: npt.NDArray[Any]) -> int:
    """Return where the array's first element lies."""
    address: int = array.__array_interface__["data"][0]
    return address


def rows_at(addresses: npt.NDArray[np.int64], row_bytes: int) -> npt.NDArray[np.void]:
    """Return copies of the rows that begin at the addresses, in their order.

    The caller answers for the addresses: what owns the memory has to be referenced until this returns.

    Args:
        addresses: Of the first byte of each row.
        row_bytes: Width of a row, from 1 to `MAX_ROW_BYTES`.
    """
    rows: npt.NDArray[np.void] = _memory(row_bytes)[addresses - _FIRST]
    return rows


# Numpy takes no array at 0, which is the address of nothing.
_FIRST = 1


@lru_cache(maxsize=256)
def _memory(row_bytes: int) -> npt.NDArray[np.void]:
    return np.asarray(_Memory(row_bytes))


class _Memory:
    """All of memory as numpy sees it: a row at every address."""

    def __init__(self, row_bytes: int) -> None:
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{row_bytes}",
            "data": (_FIRST, True),
            "shape": (_NUM_ADDRESSES - _FIRST,),
            "strides": (1,),
        }
