"""Integers of more than 63 bits in text: kept as `uint64`, where pyarrow's inference would make floats of them.

A field is `uint64` if it has such integers, and nothing but integers from 0 on. One of which integers are larger, or
negative beside large ones, is refused where a float would be another number. With fractions, a field is of floats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import cast

import pyarrow as pa
import pyarrow.compute as pc

from connectors.errors import BadInputError
from dataflow.formats.json_records import numbers_in

__all__ = ["agree_on_sign", "with_large_integers"]

_LARGE = float(1 << 63)

# Where a value is: the numbers of its field, of that in it, and so on; lists are passed through.
_Path = tuple[int, ...]


def with_large_integers(
    found: pa.Table, parse: Callable[[pa.Schema], pa.Table], json: bytes | memoryview | None, *, uri: str
) -> pa.Schema:
    """Return the schema of records in which integers stay what they are.

    Args:
        found: The records as pyarrow understands them.
        parse: Parses them again with another schema; raises `pa.ArrowInvalid` where a value does not fit.
        json: The records, where they are JSON; None for CSV.
        uri: Where they lie.

    Raises:
        BadInputError: A field of integers has some that neither `uint64` nor a float can hold.
    """
    schema = found.schema
    for path in [path for path in _floats(schema) if _has_large(found, path)]:
        unsigned = _replaced(schema, path, pa.uint64())
        if _fits(parse, unsigned):
            schema = unsigned
        else:
            names = list(_names(schema, path))
            numbers = _texts(found, names[0], parse) if json is None else numbers_in(json, names)
            _insist_on_floats(numbers, names[0], uri)
    return schema


def agree_on_sign(fields: Iterable[pa.Field], others: Iterable[pa.Field]) -> list[pa.Field]:
    """Return the fields with `uint64` in the place of `int64` wherever `others` has it."""
    types = {field.name: field.type for field in others}
    return [field.with_type(_signed_as(field.type, types.get(field.name, field.type))) for field in fields]


def _signed_as(kind: pa.DataType, other: pa.DataType) -> pa.DataType:
    if pa.types.is_int64(kind) and pa.types.is_uint64(other):
        return other
    if pa.types.is_list(kind) and pa.types.is_list(other):
        return pa.list_(kind.value_field.with_type(_signed_as(kind.value_type, other.value_type)))
    if pa.types.is_struct(kind) and pa.types.is_struct(other):
        return pa.struct(agree_on_sign(kind, other))
    return kind


def _floats(fields: Iterable[pa.Field]) -> Iterator[_Path]:
    """Yield where floats are."""
    for number, field in enumerate(fields):
        kind = field.type
        while pa.types.is_list(kind):
            kind = kind.value_type
        if pa.types.is_float64(kind):
            yield (number,)
        elif pa.types.is_struct(kind):
            yield from ((number, *path) for path in _floats(kind))


def _values(table: pa.Table, path: _Path) -> pa.Array:
    """Return the values at a path that are not null."""
    values = cast("pa.Array", table.column(path[0]).combine_chunks())
    for number in (*path[1:], None):
        while pa.types.is_list(values.type):
            values = values.flatten()
        if number is not None:
            values = values.flatten()[number]  # with the nulls of the struct
    return values.drop_null()


def _has_large(table: pa.Table, path: _Path) -> bool:
    extremes = pc.min_max(_values(table, path)).as_py()
    return extremes["max"] is not None and max(extremes["max"], -extremes["min"]) >= _LARGE


def _replaced(schema: pa.Schema, path: _Path, leaf: pa.DataType) -> pa.Schema:
    field = schema.field(path[0])
    return schema.set(path[0], field.with_type(_replaced_in(field.type, path[1:], leaf)))


def _replaced_in(kind: pa.DataType, path: _Path, leaf: pa.DataType) -> pa.DataType:
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_replaced_in(kind.value_type, path, leaf)))
    if not path:
        return leaf
    fields = list(kind)
    fields[path[0]] = fields[path[0]].with_type(_replaced_in(fields[path[0]].type, path[1:], leaf))
    return pa.struct(fields)


def _fits(parse: Callable[[pa.Schema], pa.Table], schema: pa.Schema) -> bool:
    try:
        parse(schema)
    except pa.ArrowInvalid:
        return False
    return True


def _names(fields: Iterable[pa.Field], path: _Path) -> Iterator[str]:
    """Yield the name of the field that each number of a path stands for."""
    for number in path:
        field = list(fields)[number]
        yield field.name
        kind = field.type
        while pa.types.is_list(kind):
            kind = kind.value_type
        fields = kind if pa.types.is_struct(kind) else ()


def _texts(found: pa.Table, name: str, parse: Callable[[pa.Schema], pa.Table]) -> Iterator[str]:
    """Yield the values of a column of CSV as they are written, but for the missing ones; `ValueError` as pyarrow's."""
    place = found.column_names.index(name)
    texts = parse(_replaced(found.schema, (place,), pa.string())).column(place)
    yield from texts.filter(found.column(place).is_valid()).to_pylist()


def _insist_on_floats(numbers: Iterable[str], name: str, uri: str) -> None:
    """Refuse integers that are others as floats, unless there are fractions among them."""
    try:
        integers = [int(number) for number in numbers]
    except ValueError:
        return
    for value in integers:
        if abs(value) >= _LARGE and not _is_float(value):
            raise BadInputError(
                f"field {name!r} of {uri} has the integer {value}: integers are kept from "
                "-2^63 to 2^63 - 1, or from 0 to 2^64 - 1; write the values of this field as text, in quotes, or as "
                "floats",
                uri=uri,
            )


def _is_float(value: int) -> bool:
    try:
        return float(value) == value
    except OverflowError:
        return False
