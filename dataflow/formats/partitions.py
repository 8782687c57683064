"""Fields that folders carry in their names, as `year=2026/split=a%2Fb/` does in what Spark, Hive and pyarrow write.

Those who write such folders leave the fields out of the files, so without this they would be lost. As in Spark and in
pyarrow's `hive` partitioning, a value that is an integer in every folder is one, anything else is text, with its
percent-escapes undone; `__HIVE_DEFAULT_PARTITION__` is null.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

from connectors.errors import BadInputError
from dataflow.formats.pieces import selected

if TYPE_CHECKING:
    from dataflow.formats.pieces import PiecewiseSource
    from dataflow.formats.protocol import Source
    from dataflow.index import Index

__all__ = ["PartitionedSource", "with_partitions"]

NULL = "__HIVE_DEFAULT_PARTITION__"
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}", re.ASCII)


@dataclass(frozen=True, slots=True, eq=False)
class PartitionedSource:
    """A source whose files lie in such folders; see `dataflow.formats.protocol.Source`.

    Attributes:
        source: Reads the files.
        values: A row for each of its shards, a column for each field of the folders.
        schema: Fields of the files, then those of the folders.
    """

    source: Source
    values: pa.RecordBatch
    schema: pa.Schema

    @property
    def format(self) -> str:
        """Of the files."""
        return self.source.format

    @property
    def index(self) -> Index:
        """Of the files."""
        return self.source.index

    def decode(self, block: int, data: memoryview) -> pa.RecordBatch:
        """Decode a block, and add what its folder says."""
        return self._extended(block, self.source.decode(block, data))

    def decode_pieces(self, block: int, pieces: Sequence[memoryview]) -> pa.RecordBatch:
        """Decode a block from its pieces, and add what its folder says."""
        return self._extended(block, cast("PiecewiseSource", self.source).decode_pieces(block, pieces))

    def select(self, names: Sequence[str]) -> PartitionedSource:
        """Return a source of some fields; one of the files is always read, which tells how many samples there are."""
        stored = self.source.schema.names
        source = selected(self.source, [name for name in stored if name in names] or stored[:1])
        return replace(self, source=source, schema=pa.schema([entry for entry in self.schema if entry.name in names]))

    def _extended(self, block: int, batch: pa.RecordBatch) -> pa.RecordBatch:
        shard = int(self.index.blocks.shard[block])
        columns = [
            batch.column(name)
            if name in batch.schema.names
            else pa.repeat(self.values.column(name)[shard], batch.num_rows)
            for name in self.schema.names
        ]
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)


def with_partitions(source: Source) -> Source:
    """Return a source with the fields of its folders, if there are some that its files do not have.

    Raises:
        BadInputError: A folder names a field twice.
    """
    names = source.index.shards.names
    if not pc.any(pc.match_substring(names, "=")).as_py():
        return source
    rows = [_fields(name.rpartition("/")[0]) for name in names.to_pylist()]
    fields = dict.fromkeys(field for row in rows for field in row if field not in source.schema.names)
    if not fields:
        return source
    values = pa.RecordBatch.from_pydict({field: _column([row.get(field) for row in rows]) for field in fields})
    return PartitionedSource(source, values, pa.schema([*source.schema, *values.schema], source.schema.metadata))


def _fields(folder: str) -> dict[str, str | None]:
    fields: dict[str, str | None] = {}
    for part in folder.split("/"):
        name, equals, value = part.partition("=")
        if not equals or not name:
            continue
        name = unquote(name)
        if name in fields:
            raise BadInputError(f"the folder {folder} names the field {name!r} twice: rename one")
        fields[name] = None if value == NULL else unquote(value)
    return fields


def _column(values: Sequence[str | None]) -> pa.Array:
    if all(value is None or _INTEGER.fullmatch(value) for value in values):
        return pa.array([None if value is None else int(value) for value in values], pa.int64())
    return pa.array(values, pa.string())
