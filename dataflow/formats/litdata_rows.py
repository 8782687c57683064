r"""LitData chunks that hold rows of Arrow, as the library writes mappings of plain, also nested, values.

    head of a plain chunk, whose items are empty | Arrow IPC file | uint32 its length | "LDARW01\0"

An earlier release wrote the items, too, and a stream in the place of the file. A record batch is a block. The types of
every chunk are inferred from its own rows, so a field that is an integer or missing in one may be a float in the next.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pyarrow as pa

from connectors.errors import BadInputError, CorruptError
from dataflow.formats.fields import storable_schema
from dataflow.formats.record_batches import read_batch, scan_batches
from dataflow.formats.scan import BlockTable, Scan

if TYPE_CHECKING:
    from connectors.objects import ObjectMeta
    from dataflow.formats.place import Place
    from dataflow.index import Index

__all__ = ["LitdataRowsSource", "find_rows", "is_of_rows", "rows_source", "scan_rows"]

_TAIL = struct.Struct("<I8s")
_MAGIC = b"LDARW01\0"
_FILE_MAGIC = b"ARROW1\0\0"


@dataclass(frozen=True, slots=True, eq=False)
class LitdataRowsSource:
    """One set of chunks of rows, opened; see `dataflow.formats.protocol.Source`.

    Attributes:
        schema: Fields of a sample.
        index: One block per record batch.
        stored: Schema of every chunk.
    """

    schema: pa.Schema
    index: Index
    stored: tuple[pa.Schema, ...]
    format: str = field(default="litdata", init=False)

    def decode(self, block: int, data: memoryview) -> pa.RecordBatch:
        """Return the rows of a block, with the fields of all chunks: what is absent from its own is null.

        Raises:
            CorruptError: As `Source.decode`.
            BadInputError: A number is none of the type that it has in all chunks together.
        """
        ref = self.index.block_ref(block)
        batch = read_batch(data, self.stored[int(self.index.blocks.shard[block])], ref)
        try:
            columns = [
                batch.column(entry.name).cast(entry.type)
                if entry.name in batch.schema.names
                else pa.nulls(batch.num_rows, entry.type)
                for entry in self.schema
            ]
        except pa.ArrowException as error:
            raise BadInputError(
                f"{ref.uri} does not fit the types of the other chunks: {error}", uri=ref.uri
            ) from error
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)


def find_rows(place: Place, meta: ObjectMeta) -> tuple[int, int] | None:
    """Return where the rows of a chunk begin and end; None where it does not end as those that hold rows do.

    Raises:
        CorruptError: They would begin before the chunk.
    """
    end = meta.size_bytes - _TAIL.size
    if end < 0:
        return None
    length, magic = _TAIL.unpack(place.read(meta, end, _TAIL.size))
    if magic != _MAGIC:
        return None
    begin = end - length
    if begin < 0:
        uri = place.uri(meta)
        raise CorruptError(f"{uri} is damaged: its rows begin before it", uri=uri)
    is_file = bytes(place.read(meta, begin, min(len(_FILE_MAGIC), meta.size_bytes - begin))) == _FILE_MAGIC
    return begin + is_file * len(_FILE_MAGIC), end


def scan_rows(place: Place, counts: Sequence[int], files: Sequence[ObjectMeta]) -> Scan:
    """Find the record batches of all chunks.

    Args:
        place: Where they lie.
        counts: Of every chunk, the number of its items.
        files: The chunks.

    Raises:
        CorruptError: A chunk is damaged, or holds another number of rows.
        BadInputError: Only some of the chunks hold rows, or a field of one does not fit those of the others.
    """
    table, stored = BlockTable(), []
    for shard, (count, meta) in enumerate(zip(counts, files, strict=True)):
        uri, span = place.uri(meta), find_rows(place, meta)
        if span is None:
            raise BadInputError(f"{uri} holds no rows of Arrow, as the first chunk does; write it again", uri=uri)
        found, num_rows = scan_batches(place, meta, table, shard, *span)
        if num_rows != count:
            raise CorruptError(f"{uri} has {num_rows} rows, the index says {count}", uri=uri)
        stored.append(found.remove_metadata())
    try:
        schema = pa.unify_schemas(stored, promote_options="permissive")
    except pa.ArrowException as error:
        raise BadInputError(f"the chunks at {place.url} have types that do not fit: {error}") from error
    texts = [base64.b64encode(entry.serialize().to_pybytes()).decode() for entry in stored]
    distinct = list(dict.fromkeys(texts))
    facts = {"stored": json.dumps(distinct), "of_chunk": json.dumps([distinct.index(text) for text in texts])}
    return Scan(table.finish(), storable_schema(schema), facts)


def is_of_rows(scan: Scan) -> bool:
    """Whether a scan, now or then, was by `scan_rows`."""
    return "of_chunk" in scan.facts


def rows_source(index: Index, scan: Scan) -> LitdataRowsSource:
    """Return the source of what a scan found."""
    distinct = [pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text))) for text in json.loads(scan.facts["stored"])]
    stored = tuple(distinct[number] for number in json.loads(scan.facts["of_chunk"]))
    return LitdataRowsSource(scan.schema, index, stored)
