"""What a native dataset says of its fields without being read: counted block by block while shards are built. Pure.

    missing    samples whose value is null
    bytes      of all values, before compression
    lengths    of values that vary in length (bytes of texts and media, items of lists): how many, least, greatest, sum,
               and a histogram by powers of two: position k counts lengths in [2^(k-1), 2^k), position 0 those of 0

All of it adds up, so the statistics of a dataset are those of its shards, whoever wrote them in which order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataflow.formats.arrow.blocks import column_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["FieldStatistics", "Lengths", "add_statistics", "measure_batch"]


class Lengths(msgspec.Struct, frozen=True):
    """Lengths of the values of one field, nulls left out.

    Attributes:
        count: How many.
        min: The least; 0 where there are none.
        max: The greatest.
        total: Their sum.
        histogram: How many of each power of two.
    """

    count: int
    min: int
    max: int
    total: int
    histogram: list[int]


class FieldStatistics(msgspec.Struct, frozen=True, omit_defaults=True):
    """Statistics of one field.

    Attributes:
        missing: Samples whose value is null.
        bytes: Bytes of all values, before compression.
        lengths: None where all values have the same length.
    """

    missing: int
    bytes: int
    lengths: Lengths | None = None


def measure_batch(batch: pa.RecordBatch) -> dict[str, FieldStatistics]:
    """Return the statistics of the fields of a batch."""
    return {
        field.name: FieldStatistics(column.null_count, column_bytes(column), _lengths(column))
        for field, column in zip(batch.schema, batch.columns, strict=True)
    }


def add_statistics(parts: Iterable[dict[str, FieldStatistics]]) -> dict[str, FieldStatistics]:
    """Return the statistics of several shards together; a field that one of them does not tell is left out."""
    together: dict[str, FieldStatistics] | None = None
    for part in parts:
        if together is None:
            together = dict(part)
        else:
            together = {name: _add(one, part[name]) for name, one in together.items() if name in part}
    return together or {}


def _add(one: FieldStatistics, other: FieldStatistics) -> FieldStatistics:
    return FieldStatistics(
        one.missing + other.missing, one.bytes + other.bytes, _add_lengths(one.lengths, other.lengths)
    )


def _add_lengths(one: Lengths | None, other: Lengths | None) -> Lengths | None:
    if one is None or other is None:
        return None
    if not one.count or not other.count:
        return one if one.count else other
    histogram = np.zeros(max(len(one.histogram), len(other.histogram)), np.int64)
    for part in (one, other):
        histogram[: len(part.histogram)] += part.histogram
    return Lengths(
        one.count + other.count,
        min(one.min, other.min),
        max(one.max, other.max),
        one.total + other.total,
        histogram.tolist(),
    )


def _lengths(column: Any) -> Lengths | None:
    kind, types = column.type, pa.types
    if types.is_string(kind) or types.is_binary(kind) or types.is_large_string(kind) or types.is_large_binary(kind):
        lengths = pc.binary_length(column)
    elif types.is_list(kind) or types.is_large_list(kind):
        lengths = pc.list_value_length(column)
    else:
        return None
    values = (lengths.drop_null() if lengths.null_count else lengths).to_numpy()
    if not len(values):
        return Lengths(0, 0, 0, 0, [])
    # The exponent of a float is the number of bits of the integer, exact below 2^53.
    histogram = np.bincount(np.frexp(values.astype(np.float64))[1])
    return Lengths(
        len(values), int(values.min()), int(values.max()), int(values.sum(dtype=np.int64)), histogram.tolist()
    )
