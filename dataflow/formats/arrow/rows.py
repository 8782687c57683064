"""Samples as Python mappings, turned into record batches."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from connectors.errors import BadInputError
from dataflow.formats.fields import field_kind

__all__ = ["rows_to_batch", "value_size"]


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


def value_size(value: Any) -> int:
    """Estimate the bytes of one value, to bound what is held before it becomes Arrow."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    return len(value) if isinstance(value, (str, bytes, bytearray, memoryview, list)) else 8


def _array(field: pa.Field, values: list[Any]) -> pa.Array:
    kind = field.type
    try:
        if None in (values if not _holds_arrays(values) else ()) and not field.nullable:
            raise BadInputError(f"field {field.name!r} is declared without nulls and got None")
        if field_kind(field) == "image":
            values = [_encode(value) if isinstance(value, np.ndarray) else value for value in values]
        if isinstance(kind, pa.FixedShapeTensorType):
            return _tensors(kind, values)
        if isinstance(kind, pa.BaseExtensionType):
            return pa.ExtensionArray.from_storage(kind, pa.array(values, kind.storage_type))
        return pa.array(values, kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, BadInputError):
            raise
        raise BadInputError(f"field {field.name!r} cannot hold a value as {kind}: {error}") from error


def _holds_arrays(values: list[Any]) -> bool:
    return any(isinstance(value, np.ndarray) for value in values)


def _tensors(kind: Any, values: list[Any]) -> pa.Array:
    dtype = np.dtype(kind.value_type.to_pandas_dtype())
    arrays = [np.asarray(value) for value in values]
    for array in arrays:
        if array.shape != tuple(kind.shape) or not np.can_cast(array.dtype, dtype, "same_kind"):
            raise ValueError(f"expected {dtype} of shape {tuple(kind.shape)}, got {array.dtype} of shape {array.shape}")
    flat = np.stack(arrays).astype(dtype, copy=False).reshape(len(values), -1)
    storage = pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])
    return pa.ExtensionArray.from_storage(kind, storage)


def _encode(pixels: np.ndarray[Any, Any]) -> bytes:
    if pixels.dtype != np.uint8:
        raise ValueError(f"an image array must be uint8, got {pixels.dtype}")
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()
