"""Sizes as people write them: `128MiB`, `1.5G`. Pure."""

from __future__ import annotations

import re
from fractions import Fraction

__all__ = ["parse_size"]

_PATTERN = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(?:i?b)?", re.ASCII | re.IGNORECASE)


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
    return int(Fraction(number) * 1024 ** "bkmgt".index(unit.lower() or "b"))
