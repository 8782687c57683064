"""Lines of text: JSON lines, CSV, plain text; also compressed.

A block is about 1 MiB of whole records. A compressed file can only be read from its front, so it is one block whatever
its size, and the limit is said where it is met: many files of moderate size shuffle well, one large one does not. The
same holds for a file of JSON that is one array of all records.

The schema is what pyarrow finds in all records, but for large integers, which stay integers: others widen to floats
beside fractions, a field that a record lacks is null, dates stay the text they are. A field whose values do not agree
is an error at opening; in CSV it is text, because there all values are written as text.
"""

from __future__ import annotations

import base64
import codecs
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.csv

from connectors.errors import BadInputError, CorruptError, DataError
from dataflow.formats.csv_records import header_end, record_end
from dataflow.formats.fields import decode_names
from dataflow.formats.json_records import insist_on_depth, is_array, read_json, with_leaves
from dataflow.formats.large_integers import agree_on_sign, with_large_integers
from dataflow.formats.partitions import with_partitions
from dataflow.formats.scan import BLOCK_BYTES, BlockTable, Scan, remembered
from dataflow.formats.scanned import open_scanned
from dataflow.formats.sidecar import FileScan
from dataflow.formats.unpacking import COMPRESSIONS, MAX_UNPACKED_BYTES, compression_of, suffixed, unpack

if TYPE_CHECKING:
    from connectors.objects import ObjectMeta
    from dataflow.formats.place import Place
    from dataflow.formats.protocol import Source
    from dataflow.index import Index

__all__ = ["TextFormat", "TextSource"]

BOM = codecs.BOM_UTF8
# No text in UTF-8 begins so.
_BOMS_OF_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_CR_ALONE = re.compile(rb"\r(?=[^\r\n])")
_QUOTED = re.compile(rb'"[^"]*"')
# A larger record is refused.
MAX_RECORD_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, eq=False)
class TextSource:
    """One dataset of text records, opened; see `dataflow.formats.protocol.Source`.

    Attributes:
        format: `jsonl`, `csv` or `text`.
        schema: Fields of a sample.
        index: Blocks of whole records.
    """

    format: str
    schema: pa.Schema
    index: Index

    def decode(self, block: int, data: memoryview) -> pa.RecordBatch:
        """Parse the records of a block."""
        ref = self.index.block_ref(block)
        records = unpack(data, ref.uri)
        if self.format == "csv" and records is not data:  # in a plain file the first block begins after the header
            records = records[header_end(bytes(records), _delimiter(ref.uri)) :]
        table = _parse(self.format, records, self.schema, uri=ref.uri, offset=ref.offset)
        expected = self.index.blocks.num_samples_in(block)
        if table.num_rows != expected:
            raise CorruptError(
                f"{ref.uri} has {table.num_rows} records at offset {ref.offset}, its scan found {expected}", uri=ref.uri
            )
        return table.combine_chunks().to_batches()[0]


@dataclass(frozen=True, slots=True)
class TextFormat:
    """Files of text records of one kind.

    Attributes:
        name: `jsonl` (one JSON object a line), `csv` (with a header line; tabs in `.tsv`), or `text` (one string a
            line, in the field `text`). Blank lines are no samples.
        suffixes: How such files are named, before a suffix of compression.
        otherwise: How they are named, with it, where no file is named so.
    """

    name: str
    suffixes: tuple[str, ...]
    otherwise: tuple[str, ...] = ()

    def open(self, place: Place) -> Source | None:
        """Scan the files of this kind; None where there are none.

        Raises:
            CorruptError: A record cannot be parsed; names file and offset.
            BadInputError: Records disagree about a field, or one is too large.
        """
        if not place.lenient:
            return open_scanned(self, place)
        files = self.files(place)
        if not files:
            return None
        # What is passed over depends on the fields of the files before, so no file can be looked at alone.
        index, scan = remembered(place, self.name, files, lambda: self._scan(place, files))
        return self.source(index, scan.schema, scan.facts)

    def files(self, place: Place) -> list[ObjectMeta]:
        """Return the files of this kind."""
        suffixes = tuple(kind + packed for kind in self.suffixes for packed in ("", *COMPRESSIONS))
        return place.files_named(suffixes) or (place.files_named(self.otherwise) if self.otherwise else [])

    def scan_file(self, place: Place, meta: ObjectMeta) -> FileScan:
        """Parse all records of one file; what is learned is their schema."""
        rows, schema = self._scan_one(place, meta, pa.schema([]))
        encoded = base64.b64encode(schema.serialize().to_pybytes()).decode() if rows else ""
        return FileScan(np.array(rows, np.int64).reshape(-1, 3), encoded)

    def merge(self, place: Place, learned: Sequence[tuple[ObjectMeta, str]]) -> tuple[pa.Schema, dict[str, str]]:
        """Return the schema that holds the records of all files."""
        schema = pa.schema([])
        for meta, encoded in learned:
            if encoded:
                found = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(encoded)))
                schema = self._unified(schema, found, lenient=False, uri=place.uri(meta), offset=0)
        return schema, {}

    def source(self, index: Index, schema: pa.Schema, facts: dict[str, str]) -> Source:
        """Open the dataset with a known index."""
        return with_partitions(TextSource(self.name, schema, index))

    def _scan(self, place: Place, files: Sequence[ObjectMeta]) -> Scan:
        table, schema = BlockTable(), pa.schema([])
        for shard, meta in enumerate(files):
            rows, schema = self._scan_one(place, meta, schema)
            for row in rows:
                table.add(shard, *row)
        return Scan(table.finish(), schema)

    def _scan_one(
        self, place: Place, meta: ObjectMeta, schema: pa.Schema
    ) -> tuple[list[tuple[int, int, int]], pa.Schema]:
        """Return offset, length and number of records of the blocks of a file, and the schema that holds them, too."""
        rows: list[tuple[int, int, int]] = []
        uri = place.uri(meta)
        for offset, length, records in self._pieces(place, meta):
            try:
                count, schema = self._look(records, schema, lenient=place.lenient, uri=uri, offset=offset)
                runs = [(offset, length, count)]
            except DataError as error:
                if not place.lenient or compression_of(uri) or (self.name == "jsonl" and is_array(records)):
                    place.pass_over(meta, offset, length, error)
                    continue
                runs, schema = self._salvage(place, meta, offset, length, records, schema)
            rows += [run for run in runs if run[2]]
        return rows, schema

    def _look(
        self, records: memoryview, schema: pa.Schema, *, lenient: bool, uri: str, offset: int
    ) -> tuple[int, pa.Schema]:
        """Return how many records there are, and the schema that holds them, too."""
        if self.name == "jsonl":
            insist_on_depth(records, uri=uri, offset=offset)
        found = _parse(self.name, records, None, uri=uri, offset=offset)
        if not found.num_rows:
            return 0, schema

        def parse_as(schema: pa.Schema) -> pa.Table:
            body = records[header_end(bytes(records), _delimiter(uri)) :] if self.name == "csv" else records
            return _PARSERS[self.name](body, schema, _delimiter(uri))

        exact = with_large_integers(found, parse_as, records if self.name == "jsonl" else None, uri=uri)
        return found.num_rows, self._unified(schema, exact, lenient=lenient, uri=uri, offset=offset)

    def _unified(self, schema: pa.Schema, found: pa.Schema, *, lenient: bool, uri: str, offset: int) -> pa.Schema:
        if len(set(found.names)) < len(found):
            raise BadInputError(f"{uri} has two columns of one name, out of {found.names}: rename one", uri=uri)
        if self.name == "csv" and len(schema) and found.names != schema.names:
            raise BadInputError(f"{uri} has the columns {found.names}, the files before it {schema.names}", uri=uri)
        if self.name == "csv" and not lenient:  # leniently, records that do not fit those before are bad ones
            schema, found = _text_where_they_differ(schema, found), _text_where_they_differ(found, schema)
        return _unify(schema, found, uri=uri, offset=offset)

    def _salvage(
        self, place: Place, meta: ObjectMeta, offset: int, length: int, records: memoryview, schema: pa.Schema
    ) -> tuple[list[tuple[int, int, int]], pa.Schema]:
        """Return the runs of good records in a piece (offset, length, number); note the bad ones between them."""
        header, body = bytes(records[: len(records) - length]), bytes(records[len(records) - length :])
        delimiter = _delimiter(meta.key) if self.name == "csv" else None
        runs: list[tuple[int, int, int]] = []
        begin, broken = 0, True
        while begin < length:
            end = _record_end(body, begin, begin + 1, delimiter)
            end = end if end > begin else length
            record = memoryview(header + body[begin:end])
            try:
                count, schema = self._look(record, schema, lenient=True, uri=place.uri(meta), offset=offset + begin)
            except DataError as error:
                place.pass_over(meta, offset + begin, end - begin, error)
                broken = True
            else:
                if broken:
                    runs.append((offset + begin, 0, 0))
                first, size_bytes, before = runs[-1]
                runs[-1] = (first, size_bytes + end - begin, before + count)
                broken = False
            begin = end
        return runs, schema

    def _pieces(self, place: Place, meta: ObjectMeta) -> Iterator[tuple[int, int, memoryview]]:
        """Yield offset and length of every block of a file, and its records with the CSV header in front."""
        uri, delimiter = place.uri(meta), _delimiter(meta.key) if self.name == "csv" else None
        if compression_of(uri):
            packed = b"".join(place.chunks(meta))
            try:
                records = unpack(memoryview(packed), uri)
            except CorruptError as error:
                place.pass_over(meta, 0, meta.size_bytes, error)
                return
            if delimiter:
                _header_end(bytes(records), delimiter, uri)
            if len(records):
                yield 0, meta.size_bytes, records
            return
        chunks = place.chunks(meta)
        first = next(chunks)
        if self.name == "jsonl" and is_array(first):
            yield 0, meta.size_bytes, _array(first, chunks, meta, uri)
            return
        header = b""
        for offset, piece in _split(chain([first], chunks), uri, delimiter):
            begin = 0
            if delimiter and not offset:
                begin = _header_end(piece, delimiter, uri)
                header = piece[:begin]
            if begin < len(piece):
                yield offset + begin, len(piece) - begin, memoryview(header + piece[begin:])


def _array(first: memoryview, chunks: Iterable[memoryview], meta: ObjectMeta, uri: str) -> memoryview:
    """Return a file that is one array of records."""
    if meta.size_bytes > MAX_UNPACKED_BYTES:
        raise BadInputError(
            f"{uri} is an array of {meta.size_bytes} bytes, and is read whole, up to {MAX_UNPACKED_BYTES}: write a "
            "record a line, as `jq -c '.[]'` does",
            uri=uri,
        )
    return memoryview(b"".join([first, *chunks]))


def _split(chunks: Iterable[memoryview], uri: str, delimiter: str | None) -> Iterator[tuple[int, bytes]]:
    """Yield a file in pieces of whole records, of CSV where there is a delimiter, each with its offset."""
    left, offset = b"", 0
    for chunk in chunks:
        data, begin = left + chunk, 0
        while (end := _record_end(data, begin, begin + BLOCK_BYTES, delimiter)) > begin:
            yield offset + begin, data[begin:end]
            begin = end
        left, offset = data[begin:], offset + begin
        if len(left) > MAX_RECORD_BYTES:
            raise BadInputError(f"{uri} has a record of more than {MAX_RECORD_BYTES} bytes at offset {offset}", uri=uri)
    if left:
        yield offset, left


def _header_end(data: bytes, delimiter: str, uri: str) -> int:
    """Return where the header of a CSV file ends; 0 where it is all there is.

    Raises:
        BadInputError: Records would be part of it, since their lines end in CR alone.
    """
    end = header_end(data, delimiter)
    if _CR_ALONE.search(_QUOTED.sub(b"", data[: end or len(data)])):
        raise BadInputError(f"the lines of {uri} end in CR alone, as on old Macs; they need LF", uri=uri)
    return end


def _record_end(data: bytes, begin: int, least: int, delimiter: str | None) -> int:
    """Return where the first record ends that reaches `least`; `begin` where none ends in `data`."""
    if delimiter:
        return record_end(data, begin, least, delimiter)
    return data.find(b"\n", least) + 1 or begin


def _delimiter(name: str) -> str:
    return "\t" if ".tsv" in suffixed(name)[-8:] else ","


def _parse(kind: str, records: memoryview, schema: pa.Schema | None, *, uri: str, offset: int) -> pa.Table:
    """Parse records with a known schema, or find it (CSV then has its header in front)."""
    if kind == "text" and not offset and records[: len(BOM)] == BOM:  # pyarrow takes it off CSV and JSON
        records = records[len(BOM) :]
    try:
        table = _PARSERS[kind](records, schema, _delimiter(uri))
        decode_names(table.schema)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        reason: object = error
        if records[:2] in _BOMS_OF_UTF16:
            reason = "it is in UTF-16, and UTF-8 is needed; `iconv -f UTF-16 -t UTF-8` makes it so"
        raise CorruptError(
            f"{uri} cannot be parsed as {kind} in the {len(records)} bytes from offset {offset}: {reason}", uri=uri
        ) from error
    return table


def _parse_jsonl(records: memoryview, schema: pa.Schema | None, delimiter: str) -> pa.Table:  # noqa: ARG001
    return read_json(records, schema, unexpected="infer" if schema is None else "error", use_threads=False)


def _parse_csv(records: memoryview, schema: pa.Schema | None, delimiter: str) -> pa.Table:
    names = None if schema is None else schema.names
    types = None if schema is None else schema
    return pyarrow.csv.read_csv(
        pa.BufferReader(pa.py_buffer(records)),
        pyarrow.csv.ReadOptions(use_threads=False, block_size=len(records) + 1, column_names=names),
        pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        pyarrow.csv.ConvertOptions(column_types=types),
    )


def _parse_text(records: memoryview, schema: pa.Schema | None, delimiter: str) -> pa.Table:  # noqa: ARG001
    lines = str(records, "utf-8").split("\n")
    return pa.table({"text": pa.array([line.removesuffix("\r") for line in lines if line.strip()], pa.string())})


_PARSERS: dict[str, Callable[[memoryview, pa.Schema | None, str], pa.Table]] = {
    "csv": _parse_csv,
    "jsonl": _parse_jsonl,
    "text": _parse_text,
}


def _unify(schema: pa.Schema, found: pa.Schema, *, uri: str, offset: int) -> pa.Schema:
    found = pa.schema([field.with_type(_plain(field.type)) for field in found])
    try:
        schema, found = pa.schema(agree_on_sign(schema, found)), pa.schema(agree_on_sign(found, schema))
        return pa.unify_schemas([schema, found], promote_options="permissive")
    except pa.ArrowException as error:
        message = f"the records of {uri} from offset {offset} disagree with those before: {error}"
        raise BadInputError(message, uri=uri) from error


def _text_where_they_differ(schema: pa.Schema, other: pa.Schema) -> pa.Schema:
    """Return the columns with text for those that no type of numbers holds, as pyarrow has it within one block."""
    types = dict(zip(other.names, other.types, strict=True))
    return pa.schema([field.with_type(_or_text(field.type, types.get(field.name, field.type))) for field in schema])


def _or_text(kind: pa.DataType, other: pa.DataType) -> pa.DataType:
    kind, other = _plain(kind), _plain(other)
    if kind == other or pa.null() in (kind, other) or (_is_number(kind) and _is_number(other)):
        return kind
    return pa.binary() if pa.binary() in (kind, other) else pa.string()


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _plain(kind: pa.DataType) -> pa.DataType:
    """Return the type without guesses: what looks like a date or a time is text."""
    return with_leaves(kind, pa.types.is_temporal, pa.string())
