"""`--map`: a function of the user's that turns each sample into another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from connectors.errors import BadInputError
from dataflow.convert.functions import Function, batch_to_rows
from dataflow.formats.arrow.rows import rows_to_batch
from dataflow.formats.fields import inferred_field

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dataflow.convert.reading import Numbered
    from dataflow.convert.rejects import Rejects

__all__ = ["Mapping", "infer_schema"]

# Samples that are Python objects at once.
STEP = 256


@dataclass(frozen=True, slots=True)
class Mapping:
    """A function `sample -> sample` and the fields of its results.

    Attributes:
        function: Takes a dict of plain Python values (media encoded, tensors as arrays) and returns a new one.
        schema: What its results are stored as.
    """

    function: Function
    schema: pa.Schema

    def apply(self, numbered: Iterable[Numbered], rejects: Rejects) -> Iterable[Numbered]:
        """Yield the results, in order; samples that fail go to `rejects`."""
        for numbers, whole in numbered:
            for start in range(0, whole.num_rows, STEP):
                part = whole.slice(start, STEP)
                yield from self._apply(numbers[start : start + STEP], part, rejects)

    def _apply(self, numbers: Any, batch: pa.RecordBatch, rejects: Rejects) -> Iterable[Numbered]:
        function, results, places = self.function.load(), [], []
        for place, row in enumerate(batch_to_rows(batch)):
            try:
                results.append(_insist_on_sample(function(row)))
                places.append(place)
            except Exception as error:  # noqa: BLE001  whatever the user's code raises
                rejects.error(int(numbers[place]), "map", error, batch.slice(place, 1))
        try:
            if results:
                yield numbers[places], rows_to_batch(results, self.schema)
        except BadInputError:
            yield from self._one_by_one(numbers, batch, results, places, rejects)

    def _one_by_one(
        self, numbers: Any, batch: pa.RecordBatch, results: list[dict[str, Any]], places: list[int], rejects: Rejects
    ) -> Iterable[Numbered]:
        """Find the results that do not fit the schema."""
        kept, good = [], []
        for place, result in zip(places, results, strict=True):
            try:
                rows_to_batch([result], self.schema)
            except BadInputError as error:
                rejects.error(int(numbers[place]), "map", error, batch.slice(place, 1))
                continue
            kept.append(place)
            good.append(result)
        if good:
            yield numbers[kept], rows_to_batch(good, self.schema)


def infer_schema(function: Function, batch: pa.RecordBatch) -> pa.Schema:
    """Return the fields of a function's results: its attribute `schema`, or what its results for `batch` are.

    A result of a name that the source has keeps the source's field, where it fits.

    Raises:
        BadInputError: The results differ in their fields, or have values that Arrow has no type for.
    """
    declared = getattr(function.load(), "schema", None)
    if isinstance(declared, pa.Schema):
        return declared
    if not batch.num_rows:
        return batch.schema
    rows, reason = [], ""
    for row in batch_to_rows(batch):
        try:
            rows.append(_insist_on_sample(function.load()(row)))
        except Exception as error:  # noqa: BLE001  a bad sample is the business of the jobs
            reason = f"{type(error).__name__}: {error}"
    if not rows:
        raise BadInputError(
            f"{function.name} fails on all of the first samples, so the fields of its results are unknown: {reason}"
        )
    if any(row.keys() != rows[0].keys() for row in rows):
        raise BadInputError(f"{function.name} gives samples of different fields; every sample needs all of them")
    return pa.schema([_field(name, [row[name] for row in rows], batch.schema, function.name) for name in rows[0]])


def _field(name: str, values: list[Any], source: pa.Schema, function: str) -> pa.Field:
    if name in source.names:
        try:
            rows_to_batch([{name: value} for value in values], pa.schema([source.field(name)]))
            return source.field(name)
        except BadInputError:
            pass  # it has another type than before
    try:
        return inferred_field(name, values)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise BadInputError(
            f"field {name!r} of the results of {function} has no Arrow type: {error}; give the function an "
            "attribute `schema`"
        ) from error


def _insist_on_sample(result: Any) -> dict[str, Any]:
    if not isinstance(result, dict):
        raise TypeError(f"it must return a dict, got {type(result).__name__}; leave samples out with a filter")
    return result
