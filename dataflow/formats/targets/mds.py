"""MDS as the target of a conversion: shards as MosaicML Streaming writes them, and `index.json` last."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from connectors.errors import BadInputError
from dataflow.formats.fields import field_kind, is_bytes, numpy_dtype, storable_schema, tensor_values, value_dtype
from dataflow.formats.mds import INDEX_NAME, NUMBERS
from dataflow.formats.targets.files import refuse

if TYPE_CHECKING:
    from connectors.protocols import Buffer
    from dataflow.formats.destination import Destination
    from dataflow.formats.protocol import Part

__all__ = ["MdsTarget"]

MAX_SHARD_BYTES = 1 << 32  # offsets have 32 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class MdsTarget:
    """How MDS shards are to be written; see `dataflow.formats.protocol.Target`.

    Numbers keep their type, booleans become `uint8`, tensors `ndarray` with type and shape. Images have the encoding
    `png`, whatever they are: Streaming opens any image from it.

    Attributes:
        compression: `none` or `zstd`, of each shard as a whole.
    """

    compression: str
    format: ClassVar[str] = "mds"
    manifest_name: ClassVar[str] = INDEX_NAME

    def __post_init__(self) -> None:
        if self.compression not in ("none", "zstd"):
            raise BadInputError(f"mds is written with compression none or zstd, got {self.compression!r}")

    def shard_name(self, number: int) -> str:
        """Return the name of a shard."""
        return f"shard.{number:05d}.mds" + (".zstd" if self.compression == "zstd" else "")

    def owns(self, name: str) -> bool:
        """Return whether an object of this name is part of an MDS dataset, finished or not."""
        return name == INDEX_NAME or re.fullmatch(r"shard\.\d{5,}\.mds(\.zstd)?(\.part)?", name) is not None

    def stored_schema(self, schema: pa.Schema) -> pa.Schema:
        """Return `schema`, sorted by name as the library does.

        Raises:
            BadInputError: A field has a type that MDS lacks.
        """
        for field in schema:
            _encoding(field)
        plain = storable_schema(schema)
        return pa.schema([plain.field(name) for name in sorted(plain.names)], metadata=plain.metadata)

    def build(
        self, schema: pa.Schema, batches: Iterable[pa.RecordBatch], first_sample: int
    ) -> tuple[Part, list[Buffer]]:
        """Build one shard."""
        samples: list[bytes] = []
        for batch in batches:
            samples += _samples(batch, schema, first_sample + len(samples))
        config = json.dumps(self._config(schema), sort_keys=True).encode()
        lengths = np.array([0, *map(len, samples)], np.int64)
        offsets = np.cumsum(lengths) + 4 + 4 * len(lengths) + len(config)
        if offsets[-1] >= MAX_SHARD_BYTES:
            raise BadInputError(
                f"an MDS shard holds less than 4 GiB, got {offsets[-1]} bytes: choose a smaller shard size"
            )
        header = len(samples).to_bytes(4, "little") + offsets.astype("<u4").tobytes() + config
        raw_bytes, chunks = int(offsets[-1]), [header, b"".join(samples)]
        if self.compression == "zstd":
            sink = pa.BufferOutputStream()
            with pa.output_stream(sink, compression="zstd") as file:
                file.write(b"".join(chunks))
            chunks = [sink.getvalue().to_pybytes()]
        size_bytes = sum(map(len, chunks))
        return {"size_bytes": size_bytes, "raw_bytes": raw_bytes, "samples": len(samples)}, list(chunks)

    def publish(
        self,
        destination: Destination,
        schema: pa.Schema,
        parts: Mapping[str, Part],
        lineage: dict[str, Any],
    ) -> None:
        """Write `index.json`; of no samples also an empty shard, which says what the columns are."""
        if not parts:
            part, chunks = self.build(schema, (), 0)
            destination.put(self.shard_name(0), chunks)
            parts = {self.shard_name(0): part}
        shards = [self._describe(name, part, self._config(schema)) for name, part in parts.items()]
        content = json.dumps({"shards": shards, "version": 2}, sort_keys=True)
        destination.put(INDEX_NAME, [content.encode()])

    def _config(self, schema: pa.Schema) -> dict[str, Any]:
        encodings = [_encoding(field) for field in schema]
        return {
            "column_encodings": encodings,
            "column_names": schema.names,
            "column_sizes": [_size_bytes(field) for field in schema],
            "compression": None if self.compression == "none" else "zstd",
            "format": "mds",
            "hashes": [],
            "size_limit": None,
            "version": 2,
        }

    def _describe(self, name: str, part: Part, config: dict[str, Any]) -> dict[str, Any]:
        raw = {"basename": name.removesuffix(".zstd"), "bytes": part["raw_bytes"], "hashes": {}}
        packed = {"basename": name, "bytes": part["size_bytes"], "hashes": {}}
        zipped = packed if self.compression == "zstd" else None
        return config | {"raw_data": raw, "samples": part["samples"], "zip_data": zipped}


def _samples(batch: pa.RecordBatch, schema: pa.Schema, first_sample: int) -> list[bytes]:
    columns, sizes = [], []
    for field in schema:
        column = batch.column(field.name)
        if column.null_count:
            raise BadInputError(f"mds has no nulls, and field {field.name!r} has some after sample {first_sample}")
        values = _values(column)
        columns.append(values)
        if _size_bytes(field) is None:
            sizes.append([len(value).to_bytes(4, "little") for value in values])
    return [b"".join(row) for row in zip(*sizes, *columns, strict=True)]


def _values(column: pa.Array) -> list[bytes]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if isinstance(kind, pa.FixedShapeTensorType):
        return [array.tobytes() for array in tensor_values(column) if array is not None]  # insisted on by the caller
    if is_bytes(kind):
        return column.to_pylist()  # type: ignore[no-any-return]
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return [value.encode() for value in column.to_pylist()]
    numbers = column.to_numpy(zero_copy_only=False)
    return [number.tobytes() for number in numbers]


def _encoding(field: pa.Field) -> str:
    """Return the MDS encoding of a field."""
    types, kind = pa.types, field.type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if field_kind(field) == "image":
        return "png"
    if types.is_boolean(kind):
        return "uint8"
    if isinstance(kind, pa.FixedShapeTensorType) and 0 not in kind.shape and kind.shape:
        is_boolean = types.is_boolean(kind.value_type)
        name = "uint8" if is_boolean else str(value_dtype(kind))
        if name in NUMBERS:
            return f"ndarray:{name}:{','.join(map(str, kind.shape))}"
    if types.is_integer(kind) or types.is_floating(kind):
        return str(numpy_dtype(kind))
    if is_bytes(kind):
        return "bytes"
    if types.is_string(kind) or types.is_large_string(kind):
        return "str"
    raise refuse(field, "mds", "it has numbers, strings, bytes, images and tensors of one shape")


def _size_bytes(field: pa.Field) -> int | None:
    """Return the bytes of each value, None where they vary."""
    encoding = _encoding(field)
    if encoding.startswith("ndarray"):
        _, name, shape = encoding.split(":")
        return np.dtype(name).itemsize * int(np.prod([int(size) for size in shape.split(",")]))
    return np.dtype(encoding).itemsize if encoding in NUMBERS else None
