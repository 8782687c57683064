"""JSON lines as the target of a conversion."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa

from connectors.errors import BadInputError
from dataflow.formats.fields import storable_schema, tensor_values
from dataflow.formats.targets.files import FileTarget, refuse

if TYPE_CHECKING:
    from connectors.protocols import Buffer
    from dataflow.formats.protocol import Part

__all__ = ["JsonlTarget"]

SUFFIXES = {"none": "", "lz4": ".lz4", "zstd": ".zst"}
TENSOR_STEP = 256  # samples that are Python objects at once


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonlTarget(FileTarget):
    """How JSON lines are to be written: one object a line, tensors as nested lists, in UTF-8.

    Attributes:
        compression: `none`, `lz4` or `zstd`, of each file as a whole.
    """

    compression: str
    format: ClassVar[str] = "jsonl"
    suffix: ClassVar[str] = ".jsonl"

    def shard_name(self, number: int) -> str:
        """Return the name of a shard."""
        return f"shard-{number:05d}{self.suffix}{SUFFIXES[self.compression]}"

    def stored_schema(self, schema: pa.Schema) -> pa.Schema:
        """Return `schema`, all of whose values JSON can write.

        Raises:
            BadInputError: A field holds bytes, times or decimals.
        """
        for field in schema:
            if not _writable(field.type):
                raise refuse(
                    field, self.format, "JSON has no such values; leave it out with fields, or cast it to text"
                )
        return storable_schema(schema)

    def build(
        self, schema: pa.Schema, batches: Iterable[pa.RecordBatch], first_sample: int
    ) -> tuple[Part, list[Buffer]]:
        """Build one file."""
        sink = pa.BufferOutputStream()
        compression = None if self.compression == "none" else self.compression
        with pa.output_stream(sink, compression=compression) as file:
            for batch in batches:
                for start in range(0, batch.num_rows, TENSOR_STEP):
                    file.write(_lines(batch.slice(start, TENSOR_STEP), schema, first_sample))
                first_sample += batch.num_rows
        content = memoryview(sink.getvalue()).cast("B")
        return {"size_bytes": len(content)}, [content]


def _lines(batch: pa.RecordBatch, schema: pa.Schema, first_sample: int) -> bytes:
    columns = [_values(column) for column in batch.columns]
    rows = (dict(zip(schema.names, values, strict=True)) for values in zip(*columns, strict=True))
    try:
        return "".join(_line(row) for row in rows).encode()
    except ValueError as error:
        name = next(name for name, values in zip(schema.names, columns, strict=True) if not _is_json(values))
        raise BadInputError(
            f"field {name!r} of a sample from number {first_sample} on has a number that JSON cannot write (NaN or "
            f"infinite): {error}"
        ) from error


def _is_json(values: list[Any]) -> bool:
    try:
        json.dumps(values, allow_nan=False)
    except ValueError:
        return False
    return True


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"


def _values(column: pa.Array) -> list[Any]:
    if isinstance(column.type, pa.FixedShapeTensorType):
        return [None if value is None else value.tolist() for value in tensor_values(column)]
    return column.to_pylist()  # type: ignore[no-any-return]


def _writable(kind: pa.DataType) -> bool:
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _writable(kind.storage_type)
    if types.is_dictionary(kind):
        return _writable(kind.value_type)
    if types.is_map(kind):
        return False
    if types.is_nested(kind):
        return all(_writable(kind.field(position).type) for position in range(kind.num_fields))
    number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
    return bool(number or types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind))
