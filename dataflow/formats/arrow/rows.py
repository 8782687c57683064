"""Samples as Python mappings, turned into record batches."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from connectors.errors import BadInputError
from dataflow.formats.fields import field_kind, numpy_dtype, value_dtype

__all__ = ["columns_to_batch", "rows_to_batch", "value_size"]


def rows_to_batch(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.RecordBatch:
    """Return `rows` as one record batch.

    An image may be given as encoded bytes, kept as they are, or as a uint8 array, stored as PNG.

    Raises:
        BadInputError: A field is missing, unknown, or has a value that its type cannot hold.
    """
    names = set(schema.names)
    for row in rows:
        if row.keys() != names:
            raise BadInputError(f"a sample must have exactly the fields {schema.names}, got {list(row)}")
    return pa.RecordBatch.from_arrays(
        [_array(field, [row[field.name] for row in rows]) for field in schema], schema=schema
    )


def columns_to_batch(columns: Mapping[str, Sequence[Any] | npt.NDArray[Any]], schema: pa.Schema) -> pa.RecordBatch:
    """Return samples that are given by field as one record batch; it refers to arrays of the right type.

    Args:
        columns: For every field an array, of which each first index is a sample, or a sequence of values.
        schema: The fields.

    Raises:
        BadInputError: A field is missing, unknown, of another length, or has a value that its type cannot hold.
    """
    if columns.keys() != set(schema.names):
        raise BadInputError(f"columns must be exactly the fields {schema.names}, got {list(columns)}")
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise BadInputError(f"columns must be equally long, got {lengths}")
    return pa.RecordBatch.from_arrays([_column(field, columns[field.name]) for field in schema], schema=schema)


def value_size(value: Any) -> int:
    """Estimate the bytes of one value, to bound what is held before it becomes Arrow."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    return len(value) if isinstance(value, (str, bytes, bytearray, memoryview, list)) else 8


def _column(field: pa.Field, values: Sequence[Any] | npt.NDArray[Any]) -> pa.Array:
    kind = field.type
    if isinstance(values, np.ndarray):
        if isinstance(kind, pa.FixedShapeTensorType) and (values.shape[1:], values.dtype) == _layout(kind):
            return _tensor_array(kind, values)
        if values.ndim == 1 and values.dtype == _plain_dtype(kind):
            return pa.array(values, kind)
    return _array(field, list(values))


def _plain_dtype(kind: pa.DataType) -> np.dtype[Any] | None:
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return numpy_dtype(kind) if is_number else None


def _array(field: pa.Field, values: list[Any]) -> pa.Array:
    kind = field.type
    try:
        if not field.nullable and any(value is None for value in values):
            raise BadInputError(f"field {field.name!r} is declared without nulls and got None")
        if field_kind(field) == "image":
            values = [_encode(value) if isinstance(value, np.ndarray) else value for value in values]
        if isinstance(kind, pa.FixedShapeTensorType):
            return _tensors(kind, values)
        if isinstance(kind, pa.BaseExtensionType):
            return pa.ExtensionArray.from_storage(kind, pa.array(values, kind.storage_type))
        array = pa.array(values, kind)
        with np.errstate(all="ignore"):
            _insist_on_all(values, kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, BadInputError):
            raise
        raise BadInputError(f"field {field.name!r} cannot hold a value as {kind}: {error}") from error
    return array


def _insist_on_all(values: Sequence[Any], kind: pa.DataType) -> None:
    """Refuse what Arrow stores a part of: of a number with a fraction the integer, of a mapping the fields it knows."""
    types = pa.types
    if types.is_integer(kind):
        if isinstance(values, np.ndarray) and values.dtype.kind in "iu":
            return
        with contextlib.suppress(TypeError):
            if type(sum(values)) is int:  # the fastest way to know that all are
                return
        for value in values:
            if isinstance(value, float | np.floating | Decimal) and not float(value).is_integer():
                raise ValueError(f"{value!r} has a fraction")
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        if _is_partial(kind.value_type):
            for value in values:
                if value is not None:
                    _insist_on_all(value, kind.value_type)
    elif types.is_struct(kind):
        given = [value for value in values if isinstance(value, Mapping)]
        names = {field.name for field in kind}
        for value in given:
            if not value.keys() <= names:
                raise ValueError(f"{sorted(map(str, value.keys() - names))} are unknown")
        for field in kind:
            _insist_on_all([value.get(field.name) for value in given], field.type)


def _is_partial(kind: pa.DataType) -> bool:
    """Return whether `_insist_on_all` has to look at values of a type."""
    return bool(pa.types.is_integer(kind) or pa.types.is_nested(kind))


def _tensors(kind: Any, values: list[Any]) -> pa.Array:
    shape, dtype = _layout(kind)
    missing = np.array([value is None for value in values])
    arrays = [np.zeros(shape, dtype) if value is None else np.asarray(value) for value in values]
    for array in arrays:
        if array.shape != shape or not (array.dtype == dtype or np.can_cast(array.dtype, dtype, "same_kind")):
            raise ValueError(f"expected {dtype} of shape {shape}, got {array.dtype} of shape {array.shape}")
    given = np.stack(arrays)
    stored = given.astype(dtype, copy=False)
    if dtype.kind in "iu" and given.dtype != dtype and (stored != given).any():
        raise ValueError(f"a number of {given.dtype} is too large for {dtype}")
    return _tensor_array(kind, stored, pa.array(missing) if missing.any() else None)


def _layout(kind: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and dtype of the arrays that a sample has."""
    shape = tuple(kind.shape) if kind.permutation is None else tuple(kind.shape[axis] for axis in kind.permutation)
    return shape, value_dtype(kind)


def _tensor_array(kind: Any, values: npt.NDArray[Any], missing: pa.BooleanArray | None = None) -> pa.Array:
    if kind.permutation is not None:
        values = values.transpose(0, *(1 + np.argsort(kind.permutation)))
    flat = values.reshape(len(values), math.prod(kind.shape))
    storage = pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1], mask=missing)
    return pa.ExtensionArray.from_storage(kind, storage)


def _encode(pixels: np.ndarray[Any, Any]) -> bytes:
    if pixels.dtype != np.uint8:
        raise ValueError(f"an image array must be uint8, got {pixels.dtype}")
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()
