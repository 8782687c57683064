"""Native shards as the target of a conversion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from dataflow.formats.arrow.blocks import BlockCutter
from dataflow.formats.arrow.manifest import MANIFEST_NAME
from dataflow.formats.arrow.publish import owns, publish, shard_name
from dataflow.formats.arrow.shard import Shard, ShardBuilder
from dataflow.formats.arrow.writing import check_sizes, fit_batch
from dataflow.formats.fields import storable_schema

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import pyarrow as pa

    from connectors.protocols import Buffer
    from dataflow.formats.destination import Destination
    from dataflow.formats.protocol import Part

__all__ = ["ArrowTarget"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrowTarget:
    """How native shards are to be written; see `dataflow.formats.protocol.Target`.

    Attributes:
        block_size_bytes: Size of a block before compression.
        compression: `none`, `lz4` or `zstd`.
    """

    block_size_bytes: int
    compression: str

    def __post_init__(self) -> None:
        check_sizes(
            block_size_bytes=self.block_size_bytes, shard_size_bytes=self.block_size_bytes, compression=self.compression
        )

    @property
    def format(self) -> str:
        """Name of the format."""
        return "arrow"

    @property
    def manifest_name(self) -> str:
        """Written last."""
        return MANIFEST_NAME

    def shard_name(self, number: int) -> str:
        """Return the name of a shard."""
        return shard_name(number)

    def owns(self, name: str) -> bool:
        """Return whether an object of this name is part of a native dataset."""
        return owns(name)

    def stored_schema(self, schema: pa.Schema) -> pa.Schema:
        """Return `schema` with dictionary-encoded fields made plain."""
        return storable_schema(schema)

    def build(
        self,
        schema: pa.Schema,
        batches: Iterable[pa.RecordBatch],
        first_sample: int,
    ) -> tuple[Part, list[Buffer]]:
        """Build one shard."""
        cutter, builder = BlockCutter(self.block_size_bytes), ShardBuilder(schema, compression=self.compression)
        for batch in batches:
            for block in cutter.push(fit_batch(batch, schema)):
                builder.append(block)
        for block in cutter.flush():
            builder.append(block)
        shard, chunks = builder.finish()
        return msgspec.to_builtins(shard), list(chunks)

    def publish(
        self, destination: Destination, schema: pa.Schema, parts: Mapping[str, Part], lineage: dict[str, Any]
    ) -> None:
        """Write index and manifest."""
        shards = {name: msgspec.convert(part, Shard) for name, part in parts.items()}
        publish(destination, schema, shards, compression=self.compression, lineage=lineage)
