"""Megatron token files as the target of a conversion: `.bin` per shard, and the `.idx` beside it when all are there.

A `.bin` without its `.idx` is nothing to any reader, so the dataset appears when the last step writes the indexes.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from connectors.errors import BadInputError
from dataflow.formats.fields import numpy_dtype, storable_schema
from dataflow.formats.megatron import HEADER, MAGIC, TYPES
from dataflow.formats.targets.files import FileTarget, refuse

if TYPE_CHECKING:
    from connectors.protocols import Buffer
    from dataflow.formats.destination import Destination
    from dataflow.formats.protocol import Part

__all__ = ["MegatronTarget"]

_CODES = {np.dtype(name): code for code, name in TYPES.items()}


@dataclass(frozen=True, slots=True)
class MegatronTarget(FileTarget):
    """How token files are to be written: one sequence and one document a sample."""

    format: ClassVar[str] = "megatron"
    suffix: ClassVar[str] = ".bin"

    def owns(self, name: str) -> bool:
        """Return whether an object of this name is part of such a dataset, finished or not."""
        return re.fullmatch(r"shard-\d{5,}\.(idx|bin(\.part)?)", name) is not None

    def stored_schema(self, schema: pa.Schema) -> pa.Schema:
        """Return `schema`, which must be one list of numbers.

        Raises:
            BadInputError: It has more fields, or one of another type.
        """
        if len(schema) != 1:
            raise BadInputError(
                f"megatron holds one field of token lists, got {', '.join(schema.names)}: choose it with fields"
            )
        _dtype(schema.field(0))
        return storable_schema(schema)

    def build(
        self, schema: pa.Schema, batches: Iterable[pa.RecordBatch], first_sample: int
    ) -> tuple[Part, list[Buffer]]:
        """Build one file of tokens."""
        chunks: list[Buffer] = []
        lengths = [np.zeros(0, np.int64)]
        for batch in batches:
            values, sizes = _sequences(batch.column(0), first_sample)
            chunks.append(np.ascontiguousarray(values).view(np.uint8).data)
            lengths.append(sizes)
            first_sample += batch.num_rows
        content = np.concatenate(lengths).astype("<i4").tobytes()
        size_bytes = sum(map(len, chunks))
        if not size_bytes:
            raise BadInputError(f"the sequences before sample {first_sample} have no tokens, and megatron needs some")
        return {"size_bytes": size_bytes, "lengths": base64.b64encode(content).decode()}, chunks

    def publish(
        self, destination: Destination, schema: pa.Schema, parts: Mapping[str, Part], lineage: dict[str, Any]
    ) -> None:
        """Write the indexes."""
        dtype = _dtype(schema.field(0))
        for name, part in parts.items():
            lengths = np.frombuffer(base64.b64decode(part["lengths"]), "<i4")
            ends = np.cumsum(lengths, dtype="<i8") * dtype.itemsize
            starts = np.concatenate([np.zeros(1, "<i8"), ends[:-1]])
            documents = np.arange(len(lengths) + 1, dtype="<i8")
            header = HEADER.pack(MAGIC, 1, _CODES[dtype], len(lengths), len(documents))
            index = [header, lengths.tobytes(), starts.tobytes(), documents.tobytes()]
            destination.put(f"{name.removesuffix(self.suffix)}.idx", index)


def _sequences(column: pa.Array, first_sample: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Return all tokens in a row, and the number of tokens of every sequence."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if column.null_count:
        raise BadInputError(f"megatron has no nulls, and some sequences after sample {first_sample} are missing")
    values = column.flatten()
    if values.null_count:
        raise BadInputError(f"megatron has no nulls, and some tokens after sample {first_sample} are missing")
    if pa.types.is_fixed_size_list(column.type):
        sizes = np.full(len(column), column.type.list_size, np.int64)
    else:
        sizes = np.diff(column.offsets.to_numpy()).astype(np.int64)
    if len(sizes) and sizes.max() >= 1 << 31:
        raise BadInputError(f"megatron counts tokens in 31 bits, and a sequence after sample {first_sample} has more")
    return values.to_numpy(), sizes


def _dtype(field: pa.Field) -> np.dtype[Any]:
    kind: Any = field.type
    if isinstance(kind, pa.FixedShapeTensorType) and len(kind.shape) == 1:
        kind = kind.storage_type
    types = pa.types
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        dtype = numpy_dtype(kind.value_type)
        if dtype is not None and dtype in _CODES:
            return dtype
    raise refuse(field, "megatron", f"it has lists of one of {', '.join(sorted(map(str, _CODES)))}")
