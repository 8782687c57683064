"""How deep JSON lines are nested, found before they are parsed.

pyarrow's parser goes down by recursion: some ten thousand levels end the process. Arrow itself stores 64, so what is
deeper is found here, by counting brackets. Most lines have few of them, in strings or not, and are passed by that
alone. Others are counted without strings, which costs less than to parse them. A string holds no line break as it is,
so lines can be counted on their own; an object may go over several.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from connectors.errors import BadInputError

__all__ = ["MAX_DEPTH", "insist_on_depth", "line_too_deep"]

# What an Arrow record batch can hold: pyarrow refuses to write more.
MAX_DEPTH = 64

_CHUNK_BYTES = 1 << 20
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}\n"))
_NO_MARKS = bytes(set(range(256)) - set(b'[]{}"\n'))
_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"[{")] = 1
_STEPS[list(b"]}")] = -1


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
