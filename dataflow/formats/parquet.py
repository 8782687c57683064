"""Parquet: every row group is a block.

The footers say where row groups lie, so nothing is scanned: opening reads the end of every file, in a few requests. Of
a row group the columns of the fields that are asked for are fetched and decoded, and of those all; files that are to be
read in random order want row groups of a few MiB at most.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from cache.keys import BlockRef
from connectors.errors import BadInputError, CorruptError
from dataflow.formats.features import as_featured, features_of, with_features
from dataflow.formats.fields import class_names, field_kind, storable_schema
from dataflow.formats.partitions import with_partitions
from dataflow.formats.pieces import pieces_of
from dataflow.formats.scan import BlockTable, listing_fingerprint, shard_table
from dataflow.index import Index

if TYPE_CHECKING:
    from connectors.objects import ObjectMeta
    from dataflow.formats.place import Place
    from dataflow.formats.protocol import Source

__all__ = ["ParquetFormat", "ParquetSource"]

MAGIC = b"PAR1"
ENCRYPTED_MAGIC = b"PARE"
SIGNATURE_BYTES = 28  # behind a footer that can be read, of a file with encrypted columns
TRAILER_BYTES = 8  # length of the footer and the magic
TAIL_BYTES = 64 << 10  # footers are smaller, most of the time
TAILS_AT_ONCE = 256
# Text and bytes of one row group beyond this have 64-bit offsets, for a block is one array a column.
MAX_ARRAY_BYTES = (1 << 31) - 1
# Columns that lie so near to each other are read together with what is between them: a request costs more.
GAP_BYTES = 16 << 10


@dataclass(frozen=True, slots=True, eq=False)
class ParquetSource:
    """One set of Parquet files, opened; see `dataflow.formats.protocol.Source`.

    Attributes:
        schema: Fields of a sample, dictionary-encoded ones and views made plain, text and bytes with 64-bit offsets
            where a row group needs them.
        index: One block per row group.
        footers: The end of every file.
        first_block: Number of the first row group of every file.
    """

    schema: pa.Schema
    index: Index
    footers: tuple[bytes, ...]
    first_block: tuple[int, ...]
    format: str = field(default="parquet", init=False)

    def decode(self, block: int, data: memoryview) -> pa.RecordBatch:
        """Decode a row group that was read whole."""
        return self._decode(block, [(int(self.index.blocks.offset[block]), data)])

    def decode_pieces(self, block: int, pieces: Sequence[memoryview]) -> pa.RecordBatch:
        """Decode a row group of which some columns were read."""
        refs = self.index.block_refs(block)
        return self._decode(block, [(ref.offset, data) for ref, data in zip(refs, pieces, strict=True)])

    def select(self, names: Sequence[str]) -> ParquetSource:
        """Return a source that reads the columns of some fields."""
        schema = pa.schema([entry for entry in self.schema if entry.name in names])
        spans: list[list[tuple[int, int]]] = []
        for footer in self.footers:
            metadata = pq.read_metadata(pa.BufferReader(footer))
            wanted = [
                column
                for column in range(metadata.num_columns)
                if any(f"{metadata.schema.column(column).path}.".startswith(f"{name}.") for name in names)
            ]
            spans += [_spans(metadata.row_group(group), wanted) for group in range(metadata.num_row_groups)]
        return replace(self, schema=schema, index=replace(self.index, pieces=pieces_of(self.index.blocks, spans)))

    def _decode(self, block: int, ranges: Sequence[tuple[int, memoryview]]) -> pa.RecordBatch:
        ref = self.index.block_ref(block)
        shard = int(self.index.blocks.shard[block])
        size_bytes = int(self.index.shards.size_bytes[shard])
        try:
            metadata = pq.read_metadata(pa.BufferReader(self.footers[shard]))
            options = {"metadata": metadata, "pre_buffer": False, "page_checksum_verification": True}
            with pq.ParquetFile(_Window(ranges, size_bytes), **options) as file:
                group, names = block - self.first_block[shard], self.schema.names
                table = file.read_row_group(group, columns=names, use_threads=False).select(names)
            columns = [
                [as_featured(chunk, entry, ref.uri) for chunk in column.chunks]
                for column, entry in zip(table.columns, self.schema, strict=True)
            ]
            arrays = [pa.chunked_array(*pair) for pair in zip(columns, self.schema.types, strict=True)]
            table = pa.table(arrays, schema=self.schema).combine_chunks()
        except (pa.ArrowException, OSError) as error:
            raise CorruptError(
                f"block {block} ({ref.length} bytes at offset {ref.offset} of {ref.uri}) is not a readable row group: "
                f"{error}",
                uri=ref.uri,
            ) from error
        batches = table.to_batches()
        return batches[0] if batches else pa.RecordBatch.from_pylist([], self.schema)


class ParquetFormat:
    """Parquet files of one schema."""

    name = "parquet"

    def open(self, place: Place) -> Source | None:
        """Read the footers; None where there are no Parquet files.

        Raises:
            CorruptError: A footer is damaged.
            BadInputError: Files differ in their schemas, or are encrypted.
        """
        files = place.files_named((".parquet",))
        if not files:
            return None
        footers = _footers(place, files)
        table, schema, first_block = BlockTable(), None, []
        large: set[str] = set()
        for shard, (meta, footer) in enumerate(zip(files, footers, strict=True)):
            uri = place.uri(meta)
            try:
                metadata = pq.read_metadata(pa.BufferReader(footer))
                stored = metadata.schema.to_arrow_schema()
                if features_of(stored):
                    stored = with_features(stored)
                found = storable_schema(stored.remove_metadata())
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                raise CorruptError(f"the footer of {uri} is damaged: {error}", uri=uri) from error
            except BadInputError as error:
                raise BadInputError(f"{uri} cannot be a dataset: {error}", uri=uri) from error
            if len(footer) - TRAILER_BYTES - metadata.serialized_size == SIGNATURE_BYTES:
                raise _encrypted(uri)  # to ask pyarrow about such a column ends the process
            if schema is not None and (found != schema or _meaning(found) != _meaning(schema)):
                raise BadInputError(
                    f"{uri} has another schema than the files before it:\n{found}\ninstead of\n{schema}", uri=uri
                )
            schema = found
            first_block.append(len(table))
            counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            if sum(counts) != metadata.num_rows:
                raise CorruptError(
                    f"the footer of {uri} is damaged: it counts {metadata.num_rows} rows, its groups {sum(counts)}",
                    uri=uri,
                )
            for number, count in enumerate(counts):
                group = metadata.row_group(number)
                table.add(shard, *_span(group), count)
                large |= _large_columns(group)
        assert schema is not None
        schema = pa.schema([_with_large_offsets(entry) if entry.name in large else entry for entry in schema])
        shards, blocks = shard_table(files), table.finish()
        index = Index(place.root, listing_fingerprint(shards, blocks, schema), shards, blocks)
        index.check()
        return with_partitions(ParquetSource(schema, index, tuple(footers), tuple(first_block)))


def _footers(place: Place, files: Sequence[ObjectMeta]) -> list[bytes]:
    """Return the end of every file, from its footer on."""
    footers: list[bytes] = []
    for start in range(0, len(files), TAILS_AT_ONCE):
        group = files[start : start + TAILS_AT_ONCE]
        lengths = [min(TAIL_BYTES, meta.size_bytes) for meta in group]
        refs = [
            BlockRef(place.uri(meta), meta.version, meta.size_bytes - length, length)
            for meta, length in zip(group, lengths, strict=True)
        ]
        tails = place.reader.read_blocks(refs)
        footers += [_footer(place, meta, tail.view) for meta, tail in zip(group, tails, strict=True)]
    return footers


def _footer(place: Place, meta: ObjectMeta, tail: memoryview) -> bytes:
    uri = place.uri(meta)
    if tail[-4:] == ENCRYPTED_MAGIC:
        raise _encrypted(uri)
    if len(tail) < TRAILER_BYTES or tail[-4:] != MAGIC:
        raise CorruptError(f"{uri} does not end as a Parquet file: truncated, or something else", uri=uri)
    length = int.from_bytes(tail[-TRAILER_BYTES:-4], "little") + TRAILER_BYTES
    if length <= len(tail):
        return bytes(tail[-length:])
    return bytes(place.read(meta, meta.size_bytes - length, length))


def _meaning(schema: pa.Schema) -> list[tuple[str | None, list[str] | None]]:
    """Return what the types of fields do not say; other metadata of fields may differ."""
    return [(field_kind(entry), class_names(entry)) for entry in schema]


def _encrypted(uri: str) -> BadInputError:
    return BadInputError(f"{uri} is encrypted, and there are no keys here: write it without encryption first", uri=uri)


def _span(group: Any) -> tuple[int, int]:
    """Return offset and length of a row group: from its first page to its last byte."""
    bounds = [_bounds(group.column(position)) for position in range(group.num_columns)]
    start = min(start for start, _ in bounds)
    return start, max(1, max(end for _, end in bounds) - start)


def _large_columns(group: Any) -> set[str]:
    """Return the columns of a row group that may have more bytes than one array of 32-bit offsets holds."""
    if group.total_byte_size <= MAX_ARRAY_BYTES:
        return set()
    columns = [group.column(position) for position in range(group.num_columns)]
    return {column.path_in_schema for column in columns if column.total_uncompressed_size > MAX_ARRAY_BYTES}


def _with_large_offsets(entry: pa.Field) -> pa.Field:
    if pa.types.is_string(entry.type):
        return entry.with_type(pa.large_string())
    return entry.with_type(pa.large_binary()) if pa.types.is_binary(entry.type) else entry


def _spans(group: Any, columns: Sequence[int]) -> list[tuple[int, int]]:
    """Return offset and length of what has to be read of a row group for some columns."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(_bounds(group.column(column)) for column in columns):
        if merged and start - merged[-1][1] <= GAP_BYTES:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return [(start, max(1, end - start)) for start, end in merged]


def _bounds(column: Any) -> tuple[int, int]:
    """Return the first byte of a column of a row group, and the one after the last."""
    start = column.data_page_offset
    if column.has_dictionary_page:
        start = min(start, column.dictionary_page_offset)
    return start, start + column.total_compressed_size


class _Window(io.RawIOBase):
    """A file of which only some ranges are here."""

    def __init__(self, ranges: Sequence[tuple[int, memoryview]], size_bytes: int) -> None:
        self._starts = [offset for offset, _ in ranges]
        self._parts = [data for _, data in ranges]
        self._size_bytes = size_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}[whence] + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        place = bisect_right(self._starts, self._position) - 1
        start = self._position - self._starts[place] if place >= 0 else -1
        if start < 0 or start > len(self._parts[place]):
            raise OSError(f"its footer points to offset {self._position}, outside of what was read of the row group")
        part = self._parts[place][start:] if size < 0 else self._parts[place][start : start + size]
        self._position += len(part)
        return bytes(part)
