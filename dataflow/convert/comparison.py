"""Comparing two datasets, whatever their formats and layouts: fields, number, and every sample in stored order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from connectors.errors import BadInputError
from dataflow.convert.digests import value_bytes
from dataflow.convert.reading import read_samples
from dataflow.formats.fields import tensor_values

if TYPE_CHECKING:
    from dataflow.dataset import Dataset

__all__ = ["Comparison", "compare"]

MAX_EXAMPLES = 20


@dataclass(frozen=True, slots=True)
class Comparison:
    """How two datasets differ.

    Attributes:
        num_left: Samples of the first.
        num_right: Samples of the second.
        only_left: Fields that only the first has.
        only_right: Fields that only the second has.
        other_types: Fields that both have, with other types: name, first's type, second's type.
        num_compared: Samples that were compared: as many as both have.
        num_different: Those of them that differ in a field that both have.
        by_field: For every such field in how many samples it differs.
        examples: The first of them: number and fields.
    """

    num_left: int
    num_right: int
    only_left: list[str]
    only_right: list[str]
    other_types: list[tuple[str, str, str]]
    num_compared: int
    num_different: int
    by_field: dict[str, int]
    examples: list[tuple[int, list[str]]]

    @property
    def equal(self) -> bool:
        """Whether there is no difference at all."""
        fields = self.only_left or self.only_right or self.other_types
        return not fields and self.num_left == self.num_right and not self.num_different


def compare(
    left: Dataset,
    right: Dataset,
    *,
    fields: list[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Comparison:
    """Read both side by side, a few blocks at a time.

    Values are equal when their bytes are; NaN equals NaN. Fields of other types are compared as Python values, so 1 in
    an int32 field equals 1 in an int64 field. Media are compared as encoded.

    Args:
        left: One dataset.
        right: Another.
        fields: Compare these only; both must have them.
        progress: Called with the number of samples compared.

    Raises:
        BadInputError: A field in `fields` does not exist.
        DataError: Samples cannot be read.
    """
    common = [name for name in left.schema.names if name in right.schema.names]
    for name in fields or ():
        if name not in common:
            raise BadInputError(f"field {name!r} is not in both datasets; they share {', '.join(common) or 'none'}")
    chosen = common if fields is None else fields
    pairs = [(name, left.schema.field(name).type, right.schema.field(name).type) for name in chosen]
    count = min(len(left), len(right))
    by_field = dict.fromkeys(chosen, 0)
    examples: list[tuple[int, list[str]]] = []
    compared = num_different = 0
    for one, other in _aligned(left, right, chosen, count) if chosen else ():
        differs = {name: _differences(one.column(name), other.column(name)) for name in chosen}
        rows = np.flatnonzero(np.logical_or.reduce(list(differs.values())))
        num_different += len(rows)
        for name, mask in differs.items():
            by_field[name] += int(mask.sum())
        examples += [
            (compared + row, [name for name in chosen if differs[name][row]])
            for row in rows[: MAX_EXAMPLES - len(examples)].tolist()
        ]
        compared += one.num_rows
        if progress is not None:
            progress(compared)
    return Comparison(
        num_left=len(left),
        num_right=len(right),
        only_left=[] if fields else [name for name in left.schema.names if name not in common],
        only_right=[] if fields else [name for name in right.schema.names if name not in common],
        other_types=[(name, str(one), str(other)) for name, one, other in pairs if one != other],
        num_compared=compared,
        num_different=num_different,
        by_field={name: number for name, number in by_field.items() if number},
        examples=examples,
    )


def _aligned(
    left: Dataset, right: Dataset, fields: list[str], count: int
) -> Iterator[tuple[pa.RecordBatch, pa.RecordBatch]]:
    """Yield batches of the same samples of both."""
    sides = [(batch for _, batch in read_samples(side, fields, np.arange(count))) for side in (left, right)]
    held: list[pa.RecordBatch | None] = [None, None]
    while True:
        for place, side in enumerate(sides):
            if held[place] is None:
                held[place] = next(side, None)
        one, other = held
        if one is None or other is None:
            return
        rows = min(one.num_rows, other.num_rows)
        yield one.slice(0, rows), other.slice(0, rows)
        held = [batch.slice(rows) if batch.num_rows > rows else None for batch in (one, other)]


def _differences(one: pa.Array, other: pa.Array) -> np.ndarray[Any, np.dtype[np.bool_]]:
    if one.type != other.type:
        sides: list[Any] = [_values(one, other.type), _values(other, one.type)]
    elif one.equals(other):
        return np.zeros(len(one), np.bool_)
    else:
        sides = [value_bytes(one), value_bytes(other)]
    return np.array([a != b for a, b in zip(*sides, strict=True)], np.bool_)


def _values(column: pa.Array, beside: pa.DataType) -> list[Any]:
    """Return Python values; of tensors the nested lists, where that is what they are compared with, else flat ones."""
    is_nested = pa.types.is_list(beside) and pa.types.is_nested(beside.value_type)
    if is_nested and isinstance(column.type, pa.FixedShapeTensorType):
        return [None if value is None else value.tolist() for value in tensor_values(column)]
    stored = column.storage if isinstance(column, pa.ExtensionArray) else column
    try:
        return stored.to_pylist()  # type: ignore[no-any-return]
    except (ValueError, OverflowError) as error:  # a time that Python lacks
        raise BadInputError(f"values of {column.type} and {beside} cannot be compared: {error}") from error
