"""Parquet as the target of a conversion: a file per shard, a row group per block."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from dataflow.formats.arrow.blocks import BlockCutter
from dataflow.formats.arrow.writing import fit_batch
from dataflow.formats.fields import storable_schema
from dataflow.formats.targets.files import FileTarget, refuse

if TYPE_CHECKING:
    from connectors.protocols import Buffer
    from dataflow.formats.protocol import Part

__all__ = ["ParquetTarget"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParquetTarget(FileTarget):
    """How Parquet files are to be written.

    Attributes:
        block_size_bytes: Size of a row group before encoding.
        compression: `none`, `lz4` or `zstd`.
    """

    block_size_bytes: int
    compression: str
    format: ClassVar[str] = "parquet"
    suffix: ClassVar[str] = ".parquet"

    def stored_schema(self, schema: pa.Schema) -> pa.Schema:
        """Return `schema` with dictionary-encoded fields made plain.

        Raises:
            BadInputError: A field has a type that Parquet lacks.
        """
        plain = storable_schema(schema)
        for field in plain:
            try:
                pq.ParquetWriter(pa.BufferOutputStream(), pa.schema([field])).close()
            except pa.ArrowNotImplementedError as error:
                raise refuse(field, self.format, str(error)) from error
        return plain

    def build(
        self, schema: pa.Schema, batches: Iterable[pa.RecordBatch], first_sample: int
    ) -> tuple[Part, list[Buffer]]:
        """Build one file."""
        sink, cutter = pa.BufferOutputStream(), BlockCutter(self.block_size_bytes)
        with pq.ParquetWriter(sink, schema, compression=self.compression, write_page_checksum=True) as writer:
            for batch in batches:
                for block in cutter.push(fit_batch(batch, schema)):
                    writer.write_batch(block, row_group_size=block.num_rows)
            for block in cutter.flush():
                writer.write_batch(block, row_group_size=block.num_rows)
        content = memoryview(sink.getvalue()).cast("B")
        return {"size_bytes": len(content)}, [content]
