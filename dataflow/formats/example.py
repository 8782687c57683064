"""`tf.train.Example` without TensorFlow: a map from names to lists of bytes, floats or integers. Pure.

    Example   { Features features = 1 }                Feature   { oneof: BytesList 1, FloatList 2, Int64List 3 }
    Features  { map<string, Feature> feature = 1 }     *List     { repeated value = 1, numbers packed }

https://protobuf.dev/programming-guides/encoding and tensorflow/core/example/{example,feature}.proto
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from connectors.errors import BadInputError

__all__ = ["Example", "FeatureKinds", "decode_example", "encode_example", "is_example"]

# Of each feature: "bytes", "float" or "int64", and the values.
Example: TypeAlias = dict[str, tuple[str, list[Any]]]

_KINDS = {1: "bytes", 2: "float", 3: "int64"}
_NUMBERS = {kind: number for number, kind in _KINDS.items()}
_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5


def is_example(record: memoryview) -> bool:
    """Return whether a record reads as an example with at least one feature."""
    try:
        return bool(decode_example(record))
    except ValueError:
        return False


def decode_example(record: memoryview) -> Example:
    """Return the features of a serialised example. A feature without a list has kind `bytes` and no values.

    Raises:
        ValueError: Not a serialised example.
    """
    try:
        parts = list(_fields(record))
        if others := {number for number, _ in parts} - {1}:  # a SequenceExample has more, which would be lost
            raise ValueError(f"it has a field {min(others)}")
        features = [value for _, value in parts]
        entries = [value for feature in features for number, value in _fields(feature) if number == 1]
        return dict(map(_entry, entries))
    except (IndexError, struct.error, TypeError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from error


def encode_example(example: Example) -> bytes:
    """Return an example serialised, features in the order given."""
    entries = []
    for name, (kind, values) in example.items():
        feature = _delimited(_NUMBERS[kind], _encode_list(kind, values))
        entries.append(_delimited(1, _delimited(1, name.encode()) + _delimited(2, feature)))
    return _delimited(1, b"".join(entries))


class FeatureKinds:
    """What the features of many examples have in common."""

    def __init__(self) -> None:
        self._num_examples = 0
        # Of each feature: its kind, the set of its numbers of values (two are enough, but for none and one), and in
        # how many examples it occurs.
        self._seen: dict[str, tuple[str, set[int], int]] = {}

    def add(self, example: Example, where: str) -> None:
        """Take one example into account.

        Raises:
            BadInputError: A feature has another kind than before.
        """
        self._num_examples += 1
        for name, (kind, values) in example.items():
            before, lengths, count = self._seen.get(name, (kind, set(), 0))
            if before != kind and values and lengths - {0}:
                raise BadInputError(f"feature {name!r} is {kind} in a record of {where} and {before} in those before")
            if len(lengths) < 2 or lengths == {0, 1}:
                lengths.add(len(values))
            self._seen[name] = (kind if values else before, lengths, count + 1)

    def to_json(self) -> str:
        """Return what they have in common as a text, which does not tell how many examples there are."""
        # Which two numbers of values there are does not matter, unless they are none and one.
        rows = {
            name: (
                kind,
                sorted(lengths if len(lengths) < 2 or lengths == {0, 1} else {0, 2}),
                count == self._num_examples,
            )
            for name, (kind, lengths, count) in sorted(self._seen.items())
        }
        return json.dumps(rows)

    def merge(self, text: str, where: str) -> None:
        """Take a whole set of examples into account, by its `to_json`.

        Raises:
            BadInputError: A feature has another kind than before.
        """
        self._num_examples += 1
        for name, (kind, found, always) in json.loads(text).items():
            before, lengths, count = self._seen.get(name, (kind, set(), 0))
            has_values = bool(set(found) - {0})
            if before != kind and has_values and lengths - {0}:
                raise BadInputError(f"feature {name!r} is {kind} in {where} and {before} in the files before")
            # More numbers of values than two do no harm.
            self._seen[name] = (kind if has_values else before, lengths | set(found), count + always)

    def schema(self) -> pa.Schema:
        """Return the fields that hold all of them, in the order of their names."""
        return pa.schema([self._field(name) for name in sorted(self._seen)])

    def _field(self, name: str) -> pa.Field:
        kind, lengths, count = self._seen[name]
        value = {"bytes": pa.binary(), "float": pa.float32(), "int64": pa.int64()}[kind]
        always = count == self._num_examples
        if lengths <= {0, 1} and (lengths == {1} or kind == "bytes"):
            return pa.field(name, value, nullable=not (always and lengths == {1}))
        if len(lengths) == 1 and always and kind != "bytes" and lengths != {0}:
            return pa.field(name, pa.list_(pa.field("item", value, nullable=False), lengths.pop()), nullable=False)
        return pa.field(name, pa.list_(value))


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """Yield field number and value of a message: an int for varints, bytes for all others."""
    position, end = 0, len(message)
    while position < end:
        tag, position = _varint(message, position)
        wire = tag & 7
        if wire == _VARINT:
            value, position = _varint(message, position)
            yield tag >> 3, value
            continue
        if wire == _DELIMITED:
            length, position = _varint(message, position)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire}")
        if position + length > end:
            raise ValueError("a field reaches past the end")
        yield tag >> 3, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _entry(message: memoryview) -> tuple[str, tuple[str, list[Any]]]:
    parts = dict(_fields(message))
    feature = list(_fields(parts.get(2, memoryview(b""))))
    name = str(parts.get(1, b""), "utf-8")
    if not feature:
        return name, ("bytes", [])
    number, values = feature[-1]
    kind = _KINDS.get(number)
    if kind is None:
        raise ValueError(f"feature {name!r} has a list of unknown kind {number}")
    return name, (kind, _decode_list(kind, values))


def _decode_list(kind: str, message: memoryview) -> list[Any]:
    values: list[Any] = []
    for number, value in _fields(message):
        if number != 1:
            continue
        if kind == "bytes":
            values.append(value)
        elif kind == "float":
            values += np.frombuffer(value, "<f4").tolist()
        elif isinstance(value, int):  # not packed
            values.append(_signed(value))
        else:
            values += _packed(value)
    return values


def _packed(message: memoryview) -> list[int]:
    values, position = [], 0
    while position < len(message):
        value, position = _varint(message, position)
        values.append(_signed(value))
    return values


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _encode_list(kind: str, values: Iterable[Any]) -> bytes:
    if kind == "bytes":
        return b"".join(_delimited(1, value) for value in values)
    if kind == "float":
        return _delimited(1, np.asarray(list(values), "<f4").tobytes())
    return _delimited(1, b"".join(_encode_varint(value & (1 << 64) - 1) for value in values))


def _delimited(number: int, content: bytes) -> bytes:
    return _encode_varint(number << 3 | _DELIMITED) + _encode_varint(len(content)) + content


def _encode_varint(value: int) -> bytes:
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
