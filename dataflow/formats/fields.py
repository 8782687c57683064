"""Fields of a sample, as Arrow fields: what kinds there are and how one is declared.

A plain Arrow type means itself. What Arrow has no type for stands in the field's metadata: `dataflow.kind` = `image`
for encoded images in a binary field, `audio` and `video` for encoded sound and video, `dataflow.classes` for the names
behind integer labels. How a file is encoded follows from its content, and may differ from sample to sample.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from connectors.errors import BadInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy.typing as npt

__all__ = [
    "audio_field",
    "class_names",
    "decode_names",
    "field_kind",
    "image_field",
    "inferred_field",
    "is_bytes",
    "label_field",
    "media_field",
    "numpy_dtype",
    "select_fields",
    "storable_schema",
    "tensor_field",
    "tensor_values",
    "value_dtype",
    "video_field",
]

KIND = b"dataflow.kind"
CLASSES = b"dataflow.classes"

_DTYPES = {pa.from_numpy_dtype(code): np.dtype(code) for code in "?bhilBHILefd"}


def image_field(name: str) -> pa.Field:
    """Declare encoded images (PNG, JPEG, WebP, BMP); samples carry them decoded, uint8 `(H, W)` or `(H, W, C)`."""
    return media_field(name, "image")


def audio_field(name: str) -> pa.Field:
    """Declare encoded sound (FLAC, M4A, MP3, Ogg, WAV); samples carry the `bytes` of a file, for `DecodeAudio`."""
    return media_field(name, "audio")


def video_field(name: str) -> pa.Field:
    """Declare encoded video (MP4, WebM, GIF, ...); samples carry the `bytes` of a file, for `DecodeVideo`."""
    return media_field(name, "video")


def media_field(name: str, kind: str) -> pa.Field:
    """Declare encoded files of one of `dataflow.media.MEDIA_KINDS`."""
    return pa.field(name, pa.binary(), nullable=False, metadata={KIND: kind.encode()})


def tensor_field(name: str, dtype: npt.DTypeLike, shape: Sequence[int]) -> pa.Field:
    """Declare arrays of one dtype and one shape."""
    return pa.field(name, pa.fixed_shape_tensor(pa.from_numpy_dtype(dtype), tuple(shape)), nullable=False)


def tensor_values(column: pa.FixedShapeTensorArray) -> list[npt.NDArray[Any] | None]:
    """Return the array of each sample, None for null. They are views, but for booleans, which Arrow packs to bits."""
    kind, present = column.type, column.drop_null()
    is_boolean = pa.types.is_boolean(kind.value_type)
    if is_boolean:
        kind = pa.fixed_shape_tensor(pa.uint8(), kind.shape, dim_names=kind.dim_names, permutation=kind.permutation)
        present = pa.ExtensionArray.from_storage(kind, present.storage.cast(kind.storage_type))
    arrays = present.to_numpy_ndarray()
    values = iter(arrays.view(np.bool_) if is_boolean else arrays)
    return [next(values) if valid else None for valid in column.is_valid().to_pylist()]


def numpy_dtype(kind: pa.DataType) -> np.dtype[Any] | None:
    """Return the numpy type with the same bytes as an Arrow type, or None where there is none.

    Arrow's own `to_pandas_dtype` needs pandas in releases before 26.
    """
    if pa.types.is_timestamp(kind):  # instants; a time zone only says how to show them
        return np.dtype(f"datetime64[{kind.unit}]")
    if pa.types.is_duration(kind):
        return np.dtype(f"timedelta64[{kind.unit}]")
    return _DTYPES.get(kind)


def value_dtype(kind: Any) -> np.dtype[Any]:
    """Return the numpy type of what a tensor or a list holds.

    Raises:
        BadInputError: There is none.
    """
    if (dtype := numpy_dtype(kind.value_type)) is None:
        raise BadInputError(f"numpy has no type for {kind.value_type}, which {kind} holds")
    return dtype


def inferred_field(name: str, values: Sequence[Any]) -> pa.Field:
    """Declare what these values have in common: arrays of one dtype and shape are tensors, the rest is Arrow's to say.

    Raises:
        ValueError: Arrow has no type for them.
        TypeError: As `ValueError`.
    """
    if all(isinstance(value, np.ndarray) and value.ndim for value in values):
        kinds = {(value.dtype, value.shape) for value in values}
        if len(kinds) == 1:
            return tensor_field(name, *kinds.pop())
    try:
        return pa.field(name, pa.array(values).type)
    except OverflowError:  # beyond 2^63, and so unsigned or too large
        try:
            return pa.field(name, pa.array(values, pa.uint64()).type)
        except OverflowError as error:
            raise ValueError(f"integers have at most 64 bits: {error}") from error


def label_field(name: str, classes: Iterable[str]) -> pa.Field:
    """Declare int64 labels and the class names that they number."""
    return pa.field(name, pa.int64(), nullable=False, metadata={CLASSES: json.dumps(list(classes)).encode()})


def field_kind(field: pa.Field) -> str | None:
    """Return what `dataflow.kind` says of a field, or None for a plain Arrow type."""
    kind = (field.metadata or {}).get(KIND)
    return None if kind is None else kind.decode()


def class_names(field: pa.Field) -> list[str] | None:
    """Return the class names behind an integer field, or None where it has none."""
    classes = (field.metadata or {}).get(CLASSES)
    return None if classes is None else [str(name) for name in json.loads(classes)]


def select_fields(schema: pa.Schema, columns: Sequence[str] | None) -> pa.Schema:
    """Return `schema` with only `columns`, in that order; all of them for None.

    Raises:
        BadInputError: A column does not exist or is named twice.
    """
    if columns is None:
        return schema
    if isinstance(columns, str):
        raise BadInputError(f"columns must be a list of field names, got the string {columns!r}")
    missing = [name for name in columns if name not in schema.names]
    if missing or len(set(columns)) != len(columns):
        raise BadInputError(f"columns {list(columns)} must be distinct names out of {schema.names}")
    return pa.schema([schema.field(name) for name in columns], metadata=schema.metadata)


def storable_schema(schema: pa.Schema) -> pa.Schema:
    """Return the schema that native shards store for `schema`: dictionary-encoded fields and views become plain ones.

    A block must be readable from its own bytes, and dictionaries live outside the record batches. Views, which polars
    and DataFusion write, hold the same values, and few functions of Arrow take them.

    Raises:
        BadInputError: No fields, a duplicate name, or a dictionary inside a nested type.
    """
    if not len(schema):
        raise BadInputError("a schema needs at least one field; files without a record say nothing of theirs")
    if len(set(schema.names)) != len(schema):
        raise BadInputError(f"a schema needs distinct names, got {schema.names}")
    return pa.schema([_storable(field) for field in schema], metadata=schema.metadata)


def decode_names(fields: Iterable[pa.Field]) -> None:
    """Ask for the names of all fields, also of those inside, which Arrow decodes only then.

    Raises:
        UnicodeDecodeError: One is not UTF-8.
    """
    for field in fields:
        _ = field.name
        if pa.types.is_nested(field.type):
            decode_names(field.type.field(position) for position in range(field.type.num_fields))


def _storable(field: pa.Field) -> pa.Field:
    if pa.types.is_dictionary(field.type):
        field = field.with_type(field.type.value_type)
    if _has(field.type, pa.types.is_dictionary):
        raise BadInputError(f"field {field.name!r} has a dictionary inside {field.type}: cast it to plain values first")
    if _has(field.type, _is_view):
        field = field.with_type(_without_views(field.type))
    return field


def is_bytes(kind: pa.DataType) -> bool:
    """Return whether values are `bytes`, of any length or of one."""
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _has(kind: pa.DataType, wanted: Callable[[pa.DataType], bool]) -> bool:
    """Return whether a type is wanted, or has such a type inside."""
    if wanted(kind):
        return True
    return pa.types.is_nested(kind) and any(
        _has(kind.field(position).type, wanted) for position in range(kind.num_fields)
    )


def _is_view(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string_view(kind) or pa.types.is_binary_view(kind))


def _without_views(kind: pa.DataType) -> pa.DataType:
    types = pa.types
    if types.is_string_view(kind):
        return pa.string()
    if types.is_binary_view(kind):
        return pa.binary()
    if types.is_struct(kind):
        return pa.struct([entry.with_type(_without_views(entry.type)) for entry in kind])
    if types.is_map(kind):
        return pa.map_(_without_views(kind.key_type), _without_views(kind.item_type), kind.keys_sorted)
    if types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(_without_views(kind.value_type)), kind.list_size)
    if types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_without_views(kind.value_type)))
    if types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_without_views(kind.value_type)))
    return kind
