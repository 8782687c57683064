"""TFRecord: records behind a length and two checksums, mostly a `tf.train.Example` each.

    uint64 length | masked crc32c of the length | data | masked crc32c of the data

A scan walks the records once and learns what the features are: a feature that has one value in every record is a
scalar, one with always as many values is an array of that length, any other is a list. Where the first record is no
`tf.train.Example`, a sample is the record's bytes, in the field `record`. A block is about 1 MiB of records; both
checksums are verified whenever a block is decoded. A compressed file is one block.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from crc32c import crc32c

from connectors.errors import BadInputError, CorruptError, DataError
from dataflow.formats.example import FeatureKinds, decode_example, is_example
from dataflow.formats.partitions import with_partitions
from dataflow.formats.ranges import RangeFile
from dataflow.formats.scan import BLOCK_BYTES, BlockTable, Scan, remembered
from dataflow.formats.scanned import open_scanned
from dataflow.formats.sidecar import FileScan
from dataflow.formats.unpacking import compression_of, unpack

if TYPE_CHECKING:
    from connectors.objects import ObjectMeta
    from dataflow.formats.place import Place
    from dataflow.formats.protocol import Source
    from dataflow.index import Index

__all__ = ["TfrecordFormat", "TfrecordSource", "masked_crc"]

SUFFIXES = (".tfrecord", ".tfrecords", ".tfrec", ".tfrecord.gz", ".tfrecords.gz", ".tfrec.gz")
HEADER_BYTES = 12
TRAILER_BYTES = 4
MAX_RECORD_BYTES = 1 << 30
RAW = "record"
RAW_SCHEMA = pa.schema([pa.field(RAW, pa.binary(), nullable=False)])


@dataclass(frozen=True, slots=True, eq=False)
class TfrecordSource:
    """One set of record files, opened; see `dataflow.formats.protocol.Source`.

    Attributes:
        schema: A field per feature, or `record`.
        index: Blocks of whole records.
        raw: Whether records are handed out as they are.
    """

    schema: pa.Schema
    index: Index
    raw: bool
    format: str = field(default="tfrecord", init=False)

    def decode(self, block: int, data: memoryview) -> pa.RecordBatch:
        """Verify and decode the records of a block."""
        ref = self.index.block_ref(block)
        records = [record for _, record in _records(unpack(data, ref.uri), ref.uri, ref.offset)]
        if self.raw:
            return pa.RecordBatch.from_arrays([pa.array(records, pa.binary())], schema=self.schema)
        examples = [_decode(record, ref.uri) for record in records]
        try:
            arrays = [
                pa.array([_value(example.get(entry.name), entry.type) for example in examples], entry.type)
                for entry in self.schema
            ]
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise CorruptError(f"{ref.uri} has other features at offset {ref.offset} than its scan: {error}") from error
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)


class TfrecordFormat:
    """Files of records."""

    name = "tfrecord"

    def open(self, place: Place) -> Source | None:
        """Scan the record files; None where there are none.

        Raises:
            CorruptError: A checksum is wrong or a record cut off; names file and offset.
            BadInputError: Records disagree about the kind of a feature.
        """
        if not place.lenient:
            return open_scanned(self, place)
        files = self.files(place)
        if not files:
            return None
        # What is passed over depends on the features of the files before, so no file can be looked at alone.
        index, scan = remembered(place, self.name, files, lambda: _scan(place, files))
        return self.source(index, scan.schema, scan.facts)

    def files(self, place: Place) -> list[ObjectMeta]:
        """Return the record files."""
        return place.files_named(SUFFIXES)

    def scan_file(self, place: Place, meta: ObjectMeta) -> FileScan:
        """Walk one file; what is learned is whether its records are examples, and their features."""
        kinds = FeatureKinds()
        rows, raw = _scan_one(place, meta, kinds, raw=None)
        learned = "" if raw is None else "raw" if raw else kinds.to_json()
        return FileScan(np.array(rows, np.int64).reshape(-1, 3), learned)

    def merge(self, place: Place, learned: Sequence[tuple[ObjectMeta, str]]) -> tuple[pa.Schema, dict[str, str]]:
        """Return the features of all files. The first record of the first file says whether records are examples."""
        known = [(place.uri(meta), text) for meta, text in learned if text]
        if known and known[0][1] == "raw":
            return RAW_SCHEMA, {"raw": "yes"}
        kinds = FeatureKinds()
        for uri, text in known:
            if text == "raw":
                raise CorruptError(f"the first record of {uri} is no tf.train.Example, those before are", uri=uri)
            kinds.merge(text, uri)
        return kinds.schema(), {"raw": "no"}

    def source(self, index: Index, schema: pa.Schema, facts: dict[str, str]) -> Source:
        """Open the dataset with a known index."""
        return with_partitions(TfrecordSource(schema, index, raw=facts["raw"] == "yes"))


def masked_crc(data: bytes | memoryview) -> int:
    """Return the checksum as TFRecord stores it (rotated and shifted, so that checksums of checksums stay useful)."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _scan(place: Place, files: Sequence[ObjectMeta]) -> Scan:
    table, kinds = BlockTable(), FeatureKinds()
    raw: bool | None = None
    for shard, meta in enumerate(files):
        rows, raw = _scan_one(place, meta, kinds, raw=raw)
        for row in rows:
            table.add(shard, *row)
    return Scan(table.finish(), RAW_SCHEMA if raw else kinds.schema(), {"raw": "yes" if raw else "no"})


def _scan_one(
    place: Place, meta: ObjectMeta, kinds: FeatureKinds, *, raw: bool | None
) -> tuple[list[tuple[int, int, int]], bool | None]:
    """Return offset, length and number of records of the blocks of a file, and whether records are no examples."""
    rows: list[tuple[int, int, int]] = []
    uri = place.uri(meta)
    begin, count, last = 0, 0, 0
    for end, record in _salvage(place, meta) if place.lenient else _all_records(place, meta):
        if record is not None:
            if raw is None:
                raw = not is_example(record)
            if not raw:
                kinds.add(_decode(record, uri), uri)
            count += 1
        full = record is None or end - begin >= BLOCK_BYTES
        if full and not compression_of(uri):
            stop = last if record is None else end  # before what is passed over
            if count:
                rows.append((begin, stop - begin, count))
            begin, count = end, 0
        last = end
    if count:
        rows.append((begin, (meta.size_bytes if compression_of(uri) else last) - begin, count))
    return rows, raw


def _salvage(place: Place, meta: ObjectMeta) -> Iterator[tuple[int, memoryview | None]]:
    """Yield the same as `_all_records`, and None for what is passed over: with a damaged length, the rest."""
    uri, size_bytes, position = place.uri(meta), meta.size_bytes, 0
    if compression_of(uri):
        try:
            yield from list(_all_records(place, meta))
        except CorruptError as error:
            place.pass_over(meta, 0, size_bytes, error)
        return
    file = RangeFile(place, meta)
    while position < size_bytes:
        header = memoryview(file.read(HEADER_BYTES))
        try:
            length = _end(header, 0, uri, position)
            if length is None or position + length > size_bytes:
                raise CorruptError(f"{uri} is cut off inside the record at offset {position}", uri=uri)
        except DataError as error:
            place.pass_over(meta, position, size_bytes - position, error)
            yield size_bytes, None
            return
        data, end = memoryview(bytes(header) + file.read(length - HEADER_BYTES)), position + length
        try:
            (_, record), *_ = _records(data, uri, position)
            yield end, record
        except CorruptError as error:
            place.pass_over(meta, position, length, error)
            yield end, None
        position = end


def _all_records(place: Place, meta: ObjectMeta) -> Iterator[tuple[int, memoryview]]:
    """Yield the end offset and the data of every record of a file."""
    uri = place.uri(meta)
    if compression_of(uri):
        yield from _records(unpack(memoryview(b"".join(place.chunks(meta))), uri), uri, 0)
        return
    left, offset = b"", 0
    for chunk in place.chunks(meta):
        data = memoryview(left + chunk)
        whole = _whole(data, uri, offset)
        yield from _records(data[:whole], uri, offset)
        left, offset = bytes(data[whole:]), offset + whole
    if left:
        raise CorruptError(f"{uri} is cut off inside the record at offset {offset}", uri=uri)


def _whole(data: memoryview, uri: str, at: int) -> int:
    """Return where the last whole record of `data` ends."""
    position = 0
    while (end := _end(data, position, uri, at)) is not None and end <= len(data):
        position = end
    return position


def _end(data: memoryview, position: int, uri: str, at: int) -> int | None:
    """Return where the record at `position` ends, which may lie outside `data`; None without a whole header."""
    if position + HEADER_BYTES > len(data):
        return None
    length, checksum = struct.unpack_from("<QI", data, position)
    if masked_crc(data[position : position + 8]) != checksum:
        raise CorruptError(f"the length of the record at offset {at + position} of {uri} is damaged", uri=uri)
    if length > MAX_RECORD_BYTES:
        raise BadInputError(
            f"the record at offset {at + position} of {uri} has {length} bytes, more than 1 GiB", uri=uri
        )
    return position + HEADER_BYTES + int(length) + TRAILER_BYTES


def _records(data: memoryview, uri: str, at: int) -> Iterator[tuple[int, memoryview]]:
    """Yield the end offset and the verified data of every record; `data` must consist of whole ones."""
    position = 0
    while position < len(data):
        end = _end(data, position, uri, at)
        if end is None or end > len(data):
            raise CorruptError(f"{uri} is cut off inside the record at offset {at + position}", uri=uri)
        record = data[position + HEADER_BYTES : end - TRAILER_BYTES]
        if masked_crc(record) != struct.unpack_from("<I", data, end - TRAILER_BYTES)[0]:
            raise CorruptError(f"the record at offset {at + position} of {uri} does not match its checksum", uri=uri)
        position = end
        yield at + end, record


def _decode(record: memoryview, uri: str) -> dict[str, tuple[str, list[Any]]]:
    try:
        return decode_example(record)
    except ValueError as error:
        raise CorruptError(f"a record of {uri} is no tf.train.Example: {error}", uri=uri) from error


def _value(feature: tuple[str, list[Any]] | None, kind: pa.DataType) -> Any:
    if feature is None or (not feature[1] and not pa.types.is_nested(kind)):
        return None
    if pa.types.is_nested(kind):
        return feature[1]
    (value,) = feature[1]
    return value
