"""Numbers as people write and read them: `128MiB`, `1.5G`, `1 shard`."""

from __future__ import annotations

from connectors.sizes import parse_size
from dataflow.cli.written import Written

__all__ = ["SIZE", "counted", "format_size"]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_size(size_bytes: int) -> str:
    """Return a size for human readers.

    >>> format_size(1536)
    '1.5 KiB'
    """
    value, position = float(size_bytes), 0
    while value >= 1024 and position < len(_UNITS) - 1:
        value, position = value / 1024, position + 1
    return f"{value:.0f} B" if position == 0 else f"{value:.1f} {_UNITS[position]}"


def counted(number: int, noun: str) -> str:
    """Return how many there are of something.

    >>> counted(1, "shard"), counted(1200, "shard")
    ('1 shard', '1,200 shards')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


SIZE = Written("size", parse_size)
