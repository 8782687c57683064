"""`ShardWriter`: a native dataset from samples or record batches.

One shard is held in memory while it is built, and written in one atomic put when it is full. Meanwhile the next one is
built, so there are two. Index and manifest follow when the writer is left without an error, so a reader sees the whole
dataset or none: killed anywhere before the last put, the writer leaves shards that no manifest names.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import wait
from types import TracebackType
from typing import Any

import numpy.typing as npt
import pyarrow as pa

from connectors.errors import BadInputError, DataError
from dataflow.formats.arrow.blocks import BlockCutter
from dataflow.formats.arrow.manifest import INDEX_NAME, MANIFEST_NAME, Manifest
from dataflow.formats.arrow.publish import owns, publish, shard_name
from dataflow.formats.arrow.rows import columns_to_batch, rows_to_batch, value_size
from dataflow.formats.arrow.shard import COMPRESSIONS, Shard, ShardBuilder
from dataflow.formats.deferred import DeferredDestination
from dataflow.formats.fields import storable_schema

__all__ = ["ShardWriter"]

logger = logging.getLogger(__name__)

_MAX_PENDING_ROWS = 1024


class ShardWriter:
    """Writes a native dataset; a context manager for one thread.

        with ShardWriter("s3://bucket/set", schema) as writer:
            writer.write({"image": png, "label": 3})

    Args:
        url: Where the dataset goes; any store that can be written.
        schema: Fields of a sample (`dataflow.formats` helps: `image_field`, `label_field`, `tensor_field`).
            Dictionary-encoded fields are stored plain.
        block_size_bytes: Size of a block before compression; a block is what readers fetch and caches keep.
        shard_size_bytes: A shard is closed when it has reached this size. The writer holds two in memory.
        compression: `none`, `lz4` or `zstd`. Uncompressed blocks are read without a copy.
        overwrite: Replace what lies at `url`; otherwise a place that holds anything is refused.
        lineage: Where the data came from, kept in the manifest; JSON types, no credentials.

    Attributes:
        manifest: What was published; None until the writer is left without an error.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        schema: pa.Schema,
        *,
        block_size_bytes: int = 1 << 20,
        shard_size_bytes: int = 128 << 20,
        compression: str = "none",
        overwrite: bool = False,
        lineage: Mapping[str, Any] | None = None,
    ) -> None:
        check_sizes(block_size_bytes=block_size_bytes, shard_size_bytes=shard_size_bytes, compression=compression)
        self.schema = storable_schema(schema)
        self.manifest: Manifest | None = None
        self._block_size_bytes = block_size_bytes
        self._shard_size_bytes = shard_size_bytes
        self._compression = compression
        self._overwrite = overwrite
        self._lineage = dict(lineage or {})
        self._cutter = BlockCutter(block_size_bytes)
        self._shards: list[Shard] = []
        self._builder: ShardBuilder | None = None
        self._rows: list[Mapping[str, Any]] = []
        self._rows_bytes = 0
        self._destination = DeferredDestination(url)
        self._open = False

    def __enter__(self) -> ShardWriter:
        self._destination.clear(overwrite=self._overwrite, owns=owns, is_manifest=MANIFEST_NAME.__eq__)
        self._open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._open:
            return
        self._open = False
        try:
            if error is None:
                self._finish()
        except BaseException:
            self._withdraw()
            raise
        else:
            if error is not None:
                self._withdraw()
        finally:
            self._destination.close()

    def write(self, sample: Mapping[str, Any]) -> None:
        """Add one sample: a value for every field of the schema. Values must not change before the writer is left.

        Raises:
            BadInputError: A field is missing, unknown or of the wrong type; at the latest when the writer is left.
        """
        self._insist_on_open()
        self._rows.append(sample)
        self._rows_bytes += sum(map(value_size, sample.values()))
        if self._rows_bytes >= self._block_size_bytes or len(self._rows) >= _MAX_PENDING_ROWS:
            self._drain()

    def write_columns(self, columns: Mapping[str, Sequence[Any] | npt.NDArray[Any]]) -> None:
        """Add many samples: for every field of the schema an array or a sequence with a value for each of them.

            writer.write_columns({"tokens": np.load("tokens.npy", mmap_mode="r"), "label": labels})

        Arrays of the field's own type are written from where they lie: they must not change before the writer is left.

        Raises:
            BadInputError: A field is missing, unknown, of another length or type.
        """
        self._insist_on_open()
        self._drain()
        self._write(columns_to_batch(columns, self.schema))

    def write_batch(self, batch: pa.RecordBatch) -> None:
        """Add the samples of a record batch with the schema of this writer; it must not change before that is left.

        Raises:
            BadInputError: It has another schema.
        """
        self._insist_on_open()
        self._drain()
        self._write(batch)

    def _drain(self) -> None:
        rows, self._rows, self._rows_bytes = self._rows, [], 0
        if rows:
            self._write(rows_to_batch(rows, self.schema))

    def _write(self, batch: pa.RecordBatch) -> None:
        for block in self._cutter.push(fit_batch(batch, self.schema)):
            self._append(block)

    def _append(self, block: pa.RecordBatch) -> None:
        if self._builder is None:
            self._builder = ShardBuilder(self.schema, compression=self._compression)
        self._builder.append(block)
        if self._builder.size_bytes >= self._shard_size_bytes:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._builder is not None:
            shard, chunks = self._builder.finish()
            self._builder = None
            before = self._destination.last
            self._destination.put(shard_name(len(self._shards)), chunks)
            self._shards.append(shard)
            before.result()

    def _finish(self) -> None:
        self._drain()
        for block in self._cutter.flush():
            self._append(block)
        self._close_shard()
        shards = {shard_name(number): shard for number, shard in enumerate(self._shards)}
        self.manifest = publish(
            self._destination, self.schema, shards, compression=self._compression, lineage=self._lineage
        )
        self._destination.last.result()

    def _withdraw(self) -> None:
        """Remove the shards that no manifest will name. Failing here must not hide why the writer was left."""
        wait([self._destination.last])
        try:
            self._destination.delete([*map(shard_name, range(len(self._shards) + 1)), INDEX_NAME])
        except DataError as error:
            logger.warning("shards of an unfinished dataset stay at %s: %s", self._destination.url, error)

    def _insist_on_open(self) -> None:
        if not self._open:
            raise BadInputError("a ShardWriter writes inside its `with` block only")


def fit_batch(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Return `batch` with exactly `schema`: dictionary-encoded columns and views made plain, all others must agree.

    Raises:
        BadInputError: Names or types differ, or a field declared without nulls has one.
    """
    if batch.schema.equals(schema):
        return batch
    stored = storable_schema(batch.schema)
    if stored.names != schema.names:
        raise BadInputError(f"a batch must have the fields {schema.names}, got {batch.schema.names}")
    columns = []
    for column, kind, field in zip(batch.columns, stored.types, schema, strict=True):
        plain = column if column.type.equals(kind) else column.cast(kind)
        if plain.type != field.type:
            raise BadInputError(f"field {field.name!r} must be {field.type}, got {plain.type}")
        if plain.null_count and not field.nullable:
            raise BadInputError(f"field {field.name!r} is declared without nulls and has {plain.null_count}")
        columns.append(plain)
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def check_sizes(*, block_size_bytes: int, shard_size_bytes: int, compression: str) -> None:
    """Refuse sizes and compressions that make no sense.

    Raises:
        BadInputError: Names the argument and the value found.
    """
    if block_size_bytes < 1:
        raise BadInputError(f"block_size_bytes must be >= 1, got {block_size_bytes}")
    if shard_size_bytes < block_size_bytes:
        raise BadInputError(
            f"shard_size_bytes must be >= block_size_bytes ({block_size_bytes}), got {shard_size_bytes}"
        )
    if compression not in COMPRESSIONS:
        raise BadInputError(f"compression must be one of {', '.join(COMPRESSIONS)}, got {compression!r}")
