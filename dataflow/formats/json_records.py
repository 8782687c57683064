"""Records of JSON: parsed, and before that looked at for how deep they are nested.

pyarrow's parser goes down by recursion: some ten thousand levels end the process. Arrow itself stores 64, so what is
deeper is found here, by counting brackets. Most lines have few of them, in strings or not, and are passed by that
alone. Others are counted without strings, which costs less than to parse them. A string holds no line break as it is,
so lines can be counted on their own; an object may go over several.

Others write one array of all objects. The parser takes no array, but as the value of a field.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.json

from connectors.errors import BadInputError

__all__ = ["MAX_DEPTH", "insist_on_depth", "is_array", "line_too_deep", "numbers_in", "read_json", "with_leaves"]

# What an Arrow record batch can hold: pyarrow refuses to write more.
MAX_DEPTH = 64

_CHUNK_BYTES = 1 << 20
_ARRAY_FIRST = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[")
_NULL_FIRST = re.compile(rb"(?:\xef\xbb\xbf)?\s*null")
_VISIBLE = re.compile(r"\S")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}\n"))
_NO_MARKS = bytes(set(range(256)) - set(b'[]{}"\n'))
_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"[{")] = 1
_STEPS[list(b"]}")] = -1
# The one type that Arrow casts to null, and strings to.
_CASTS_TO_NULL = pa.dictionary(pa.int32(), pa.string())


def read_json(
    records: bytes | memoryview, schema: pa.Schema | None, *, unexpected: Literal["error", "infer"], use_threads: bool
) -> pa.Table:
    """Parse records.

    Args:
        records: JSON objects, usually one a line, or an array of them.
        schema: Types of fields.
        unexpected: What is done about other fields.
        use_threads: Whether other threads may help.

    Raises:
        pa.ArrowException: They cannot be parsed, do not fit the schema, or have strings that are no UTF-8.
    """
    if _NULL_FIRST.match(records):  # it ends the process: https://github.com/apache/arrow/issues/47409
        raise pa.ArrowInvalid("the first record is null, and no object")
    if begin := _ARRAY_FIRST.match(records):
        inner = None if schema is None else pa.schema({"": pa.list_(pa.struct(list(schema)))})
        wrapped = b"".join([b'{"":', records[begin.end() - 1 :], b"}"])
        return _objects(read_json(wrapped, inner, unexpected=unexpected, use_threads=use_threads))

    def parse(schema: pa.Schema | None) -> pa.Table:
        options = pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior=unexpected)
        reading = pyarrow.json.ReadOptions(use_threads=use_threads, block_size=len(records) + 1)
        return pyarrow.json.read_json(pa.BufferReader(pa.py_buffer(records)), reading, options)

    table = parse(schema)
    try:
        table.validate(full=True)  # the parser takes strings that are no UTF-8
    except pa.ArrowInvalid:
        # Of lists that begin with nulls before the parser knows what they hold, it loses some; now all is known, and
        # nothing but nulls is as good as strings: https://github.com/apache/arrow/issues/51305
        known = parse(_with_nulls_as(table.schema, pa.string()))
        known.validate(full=True)
        table = known.cast(_with_nulls_as(table.schema, _CASTS_TO_NULL)).cast(table.schema)
    return table


def is_array(records: bytes | memoryview) -> bool:
    """Return whether these are the first bytes of an array of records, and not of records one a line."""
    return _ARRAY_FIRST.match(records) is not None


def with_leaves(kind: pa.DataType, wanted: Callable[[pa.DataType], bool], leaf: pa.DataType) -> pa.DataType:
    """Return a type as JSON has them, with `leaf` wherever a wanted type stands, also inside of lists and structs."""
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(with_leaves(field.type, wanted, leaf)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(with_leaves(kind.value_type, wanted, leaf)))
    return leaf if wanted(kind) else kind


def numbers_in(records: bytes | memoryview, names: Sequence[str]) -> Iterator[str]:
    """Yield the numbers of a field as they are written: `1e20` is none of the integers.

    Args:
        records: JSON objects, usually one a line.
        names: Of the field, and of those in it on the way to the numbers; lists are passed through.

    Raises:
        ValueError: They are no JSON to Python.
    """
    text, position = str(records, "utf-8-sig"), 0
    decoder = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)
    while begin := _VISIBLE.search(text, position):
        record, position = decoder.raw_decode(text, begin.start())
        yield from _numbers(record, names)


def _objects(table: pa.Table) -> pa.Table:
    """Return the objects of an array as records."""
    items = table.column(0).combine_chunks().flatten()
    if not len(items):
        return pa.table({})
    if items.null_count or not pa.types.is_struct(items.type):
        raise pa.ArrowInvalid("it is an array in which not every item is an object")
    return pa.Table.from_struct_array(items)


def _numbers(value: Any, names: Sequence[str]) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item, names)
    elif names and value is not None:
        yield from _numbers(value.get(names[0]), names[1:])
    elif value is not None:
        yield value


def _with_nulls_as(schema: pa.Schema, leaf: pa.DataType) -> pa.Schema:
    return pa.schema([field.with_type(with_leaves(field.type, pa.types.is_null, leaf)) for field in schema])


def insist_on_depth(records: memoryview, *, uri: str, offset: int) -> None:
    """Refuse what is nested deeper than `MAX_DEPTH`.

    Args:
        records: JSON objects, usually one a line.
        uri: Where they lie.
        offset: Where they begin there.

    Raises:
        BadInputError: A line is; names it.
    """
    line = line_too_deep(records)
    if line is not None:
        raise BadInputError(
            f"{uri} is nested more than {MAX_DEPTH} levels deep in line {line} from offset {offset} on, and Arrow "
            "holds no more: flatten it, or write the inner part as text",
            uri=uri,
        )


def line_too_deep(records: memoryview) -> int | None:
    """Return the first line, counted from 1, that is nested deeper than `MAX_DEPTH`; None where none is.

    Args:
        records: JSON objects, usually one a line.
    """
    depth, line = 0, 1
    for chunk in _chunks(records):
        if depth or not _is_plain(chunk):
            outside = _outside_of_strings(chunk)
            depths = depth + np.cumsum(_STEPS[np.frombuffer(outside, np.uint8)], dtype=np.int64)
            if depths.max(initial=0) > MAX_DEPTH:
                return line + outside.count(b"\n", 0, int(np.argmax(depths > MAX_DEPTH)))
            depth = int(depths[-1]) if len(depths) else depth
        line += chunk.count(b"\n")
    return None


def _chunks(records: memoryview) -> Iterator[bytes]:
    """Yield records in pieces of whole lines."""
    left: list[bytes] = []
    for begin in range(0, len(records), _CHUNK_BYTES):
        data = bytes(records[begin : begin + _CHUNK_BYTES])
        end = data.rfind(b"\n") + 1
        if end:
            yield b"".join([*left, data[:end]])
            left = []
        left.append(data[end:])
    yield b"".join(left)


def _is_plain(chunk: bytes) -> bool:
    """Return whether every line is an object with few brackets; False also where that is not seen at a glance."""
    breaks = chunk.count(b"\n") - chunk.endswith(b"\n")
    if chunk.count(b"}\n{") + chunk.count(b"}\r\n{") != breaks:
        return False
    return max(map(len, chunk.translate(None, _NO_BRACKETS).split(b"\n"))) <= MAX_DEPTH


def _outside_of_strings(chunk: bytes) -> bytes:
    """Return the brackets and line breaks of a chunk that stand in no string."""
    if b"\\" in chunk:
        chunk = chunk.replace(b"\\\\", b"").replace(b'\\"', b"")
    return b"".join(chunk.translate(None, _NO_MARKS).split(b'"')[::2])
