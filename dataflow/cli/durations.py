"""Durations as people write them: `90s`, `36h`, `7d`."""

from __future__ import annotations

import re

from dataflow.cli.written import Written

__all__ = ["DURATION", "parse_duration"]

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_PATTERN = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([smhdw])")


def parse_duration(text: str) -> float:
    """Return the seconds that a text such as `90s`, `36h` or `7d` means.

    >>> parse_duration("1.5h")
    5400.0

    Raises:
        ValueError: Not a duration.
    """
    match = _PATTERN.fullmatch(text.strip().lower())
    if match is None or not float(match[1]):
        raise ValueError(f"{text!r} is not a duration; write 90s, 30m, 36h, 7d or 2w")
    return float(match[1]) * _SECONDS[match[2]]


DURATION = Written("duration", parse_duration)
