"""Merging near spans into fewer requests. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from connectors.objects import Span

__all__ = ["Request", "coalesce"]


@dataclass(frozen=True, slots=True)
class Request:
    """One request that serves several spans.

    Attributes:
        span: What to read.
        members: Positions, in the caller's sequence, of the spans that lie inside.
    """

    span: Span
    members: tuple[int, ...]


def coalesce(spans: Sequence[Span], *, max_gap_bytes: int, max_span_bytes: int) -> list[Request]:
    """Merge spans that lie near each other, in order of offset.

    Spans are merged while the gap between them is at most `max_gap_bytes` and the whole stays within
    `max_span_bytes`; a span that is longer by itself stays whole. Spans without a byte need no request and are in none.
    """
    requests: list[Request] = []
    begin = end = 0
    members: list[int] = []
    for position in sorted((i for i, span in enumerate(spans) if span.length), key=lambda i: spans[i].offset):
        span = spans[position]
        if members and span.offset - end <= max_gap_bytes and max(end, span.end) - begin <= max_span_bytes:
            end = max(end, span.end)
            members.append(position)
            continue
        if members:
            requests.append(Request(Span(begin, end - begin), tuple(members)))
        begin, end, members = span.offset, span.end, [position]
    if members:
        requests.append(Request(Span(begin, end - begin), tuple(members)))
    return requests
