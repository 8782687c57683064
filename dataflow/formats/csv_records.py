"""Where records of CSV end: at a line break outside of quotes.

A quote opens a value only where a field begins; anywhere else it is a character, as in `3" nail,7`. Line breaks are
found by counting quotes, which is fast, where all quotes open or close a value, and by walking over the values where
some do not.
"""

from __future__ import annotations

import codecs
import re

import numpy as np

__all__ = ["header_end", "record_end"]

_BOM = codecs.BOM_UTF8
_QUOTE = ord('"')


def record_end(data: bytes, begin: int, least: int, delimiter: str) -> int:
    """Return where the first record ends that reaches `least`; `begin` where none ends in `data`.

    Args:
        data: Text of a file, from its front or from the beginning of a record on.
        begin: Where a record begins.
        least: Not before `begin`.
        delimiter: Between fields; one ASCII character.
    """
    end = _end_by_count(data, begin, least)
    if _all_open_or_close(data, begin, end if end > begin else len(data), delimiter):
        return end
    return _end_by_values(data, begin, least, delimiter)


def header_end(data: bytes, delimiter: str) -> int:
    """Return where the header of a file ends, with the blank lines before it; 0 where it is all there is."""
    begin = 0
    while (end := record_end(data, begin, begin, delimiter)) > begin:
        if data[begin:end].strip(_BOM + b"\r\n"):
            return end
        begin = end
    return 0


def _end_by_count(data: bytes, begin: int, least: int) -> int:
    """Find a line break that is preceded by an even number of quotes."""
    quotes, counted, position = 0, begin, least
    while (position := data.find(b"\n", position)) >= 0:
        position += 1
        quotes, counted = quotes + data.count(b'"', counted, position), position
        if quotes % 2 == 0:
            return position
    return begin


def _all_open_or_close(data: bytes, begin: int, stop: int, delimiter: str) -> bool:
    """Return whether quotes stand in turn where a field begins and where one ends, or are doubled inside a value."""
    if data.find(b'"', begin, stop) < 0:
        return True
    text = np.frombuffer(data, np.uint8, stop - begin, begin)
    quotes = np.flatnonzero(text == _QUOTE)
    is_border = np.zeros(256, np.bool_)
    is_border[[ord(delimiter), ord("\r"), ord("\n"), _QUOTE]] = True
    opening, closing = quotes[::2], quotes[1::2]
    before = text[opening[opening > 0] - 1]
    after = text[closing[closing < len(text) - 1] + 1]
    return bool(is_border[before].all() and is_border[after].all())


def _end_by_values(data: bytes, begin: int, least: int, delimiter: str) -> int:
    """Find a line break between the quoted values."""
    field_begins = rb"(?:\A|(?<=[%b\r\n])|(?<=\A%b))" % (re.escape(delimiter).encode(), _BOM)
    position = begin
    for value in re.compile(field_begins + rb'"[^"]*(?:""[^"]*)*("|\Z)').finditer(data, begin):
        end = data.find(b"\n", max(position, least), value.start()) + 1
        if end:
            return end
        if not value[1]:  # it is not closed
            return begin
        position = value.end()
    return data.find(b"\n", max(position, least)) + 1 or begin
