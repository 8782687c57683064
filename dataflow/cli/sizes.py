"""Sizes as people write and read them: `128MiB`, `1.5G`."""

from __future__ import annotations

import re

from dataflow.cli.written import Written

__all__ = ["SIZE", "format_size", "parse_size"]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_PATTERN = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return the bytes that a text such as `64MiB`, `64M` or `67108864` means; units are powers of 1024.

    >>> parse_size("1.5KiB")
    1536

    Raises:
        ValueError: Not a size.
    """
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write 64MiB, 1.5G or a number of bytes")
    number, unit = match.groups()
    return int(float(number) * 1024 ** "bkmgt".index(unit.lower() or "b"))


def format_size(size_bytes: int) -> str:
    """Return a size for human readers.

    >>> format_size(1536)
    '1.5 KiB'
    """
    value, position = float(size_bytes), 0
    while value >= 1024 and position < len(_UNITS) - 1:
        value, position = value / 1024, position + 1
    return f"{value:.0f} B" if position == 0 else f"{value:.1f} {_UNITS[position]}"


SIZE = Written("size", parse_size)
