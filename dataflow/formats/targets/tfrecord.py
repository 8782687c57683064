"""TFRecord files of `tf.train.Example` as the target of a conversion."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from connectors.errors import BadInputError
from dataflow.formats.example import Example, encode_example
from dataflow.formats.fields import is_bytes, storable_schema
from dataflow.formats.targets.files import FileTarget, refuse
from dataflow.formats.tfrecord import masked_crc

if TYPE_CHECKING:
    from connectors.protocols import Buffer
    from dataflow.formats.protocol import Part

__all__ = ["TfrecordTarget"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TfrecordTarget(FileTarget):
    """How TFRecord files are to be written.

    Integers and booleans become int64 features, floats float features, strings and bytes bytes features; lists and
    tensors features of several values, whose shape is not kept. A null is a feature that the example lacks.
    """

    format: ClassVar[str] = "tfrecord"
    suffix: ClassVar[str] = ".tfrecord"

    def stored_schema(self, schema: pa.Schema) -> pa.Schema:
        """Return `schema`, all of whose fields are features.

        Raises:
            BadInputError: A field is nested deeper, or of a type that features lack.
        """
        for field in schema:
            _feature_kind(field)
        return storable_schema(schema)

    def build(
        self, schema: pa.Schema, batches: Iterable[pa.RecordBatch], first_sample: int
    ) -> tuple[Part, list[Buffer]]:
        """Build one file."""
        chunks: list[Buffer] = []
        for batch in batches:
            chunks.append(
                b"".join(_record(encode_example(example)) for example in _examples(batch, schema, first_sample))
            )
            first_sample += batch.num_rows
        return {"size_bytes": sum(map(len, chunks))}, chunks


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return b"".join((length, struct.pack("<I", masked_crc(length)), data, struct.pack("<I", masked_crc(data))))


def _examples(batch: pa.RecordBatch, schema: pa.Schema, first_sample: int) -> Iterable[Example]:
    kinds = [_feature_kind(field) for field in schema]
    columns = [
        _values(column, field, kind, first_sample)
        for column, field, kind in zip(batch.columns, schema, kinds, strict=True)
    ]
    for values in zip(*columns, strict=True):
        yield {
            name: (kind, value if isinstance(value, list) else [value])
            for name, kind, value in zip(schema.names, kinds, values, strict=True)
            if value is not None
        }


def _values(column: pa.Array, field: pa.Field, kind: str, first_sample: int) -> list[Any]:
    if isinstance(column.type, pa.BaseExtensionType):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    flat = column.flatten() if pa.types.is_nested(column.type) else column
    if flat.null_count and flat is not column:
        raise BadInputError(
            f"tfrecord cannot hold nulls inside lists: field {field.name!r} after sample {first_sample}"
        )
    if kind == "float" and pa.types.is_float64(flat.type):
        numbers = flat.drop_null().to_numpy()
        if not np.array_equal(numbers.astype(np.float32), numbers, equal_nan=True):
            raise BadInputError(
                f"tfrecord holds floats of 32 bits, and field {field.name!r} has values after sample {first_sample} "
                "that need 64: leave it out by fields, or choose another format"
            )
    if kind == "int64" and pa.types.is_uint64(flat.type) and len(flat) and (flat.drop_null().to_numpy() >> 63).any():
        raise BadInputError(
            f"tfrecord holds signed integers: field {field.name!r} is too large after sample {first_sample}"
        )
    values = column.to_pylist()
    if kind != "bytes" or not _is_text(flat.type):
        return values  # type: ignore[no-any-return]
    return [_encoded(value) for value in values]


def _encoded(value: str | list[str] | None) -> bytes | list[bytes] | None:
    if value is None:
        return None
    return [text.encode() for text in value] if isinstance(value, list) else value.encode()


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _feature_kind(field: pa.Field) -> str:
    """Return the kind of feature that holds a field."""
    types, kind = pa.types, field.type
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if types.is_dictionary(kind) or types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    if types.is_integer(kind) or types.is_boolean(kind):
        return "int64"
    if types.is_floating(kind):
        return "float"
    if _is_text(kind) or is_bytes(kind):
        return "bytes"
    raise refuse(field, "tfrecord", "features are integers, floats and bytes, and flat lists of them")
