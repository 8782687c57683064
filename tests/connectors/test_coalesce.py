from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from connectors import Span
from connectors.coalesce import Request, coalesce

SPANS = st.lists(st.builds(Span, st.integers(0, 300), st.integers(0, 40)), max_size=20)
LIMITS = st.integers(0, 50)


@given(SPANS, LIMITS, LIMITS)
def test_every_span_with_bytes_lies_inside_exactly_one_request(spans, gap, longest):
    requests = coalesce(spans, max_gap_bytes=gap, max_span_bytes=longest)
    members = [member for request in requests for member in request.members]
    assert sorted(members) == [position for position, span in enumerate(spans) if span.length]
    for request in requests:
        inside = [spans[member] for member in request.members]
        assert request.span.offset == min(span.offset for span in inside)
        assert request.span.end == max(span.end for span in inside)


@given(SPANS, LIMITS, LIMITS)
def test_a_request_is_within_the_limit_or_no_longer_than_one_of_its_spans(spans, gap, longest):
    for request in coalesce(spans, max_gap_bytes=gap, max_span_bytes=longest):
        assert request.span.length <= max(longest, *(spans[member].length for member in request.members))


@given(SPANS, LIMITS)
def test_without_a_limit_on_length_what_stays_apart_is_further_than_the_gap(spans, gap):
    requests = coalesce(spans, max_gap_bytes=gap, max_span_bytes=1 << 20)
    for before, after in pairwise(requests):
        assert after.span.offset - before.span.end > gap


def test_near_spans_share_a_request_and_far_ones_do_not():
    spans = [Span(100, 10), Span(0, 10), Span(12, 8), Span(5, 0)]
    assert coalesce(spans, max_gap_bytes=2, max_span_bytes=1000) == [
        Request(Span(0, 20), (1, 2)),
        Request(Span(100, 10), (0,)),
    ]
    assert len(coalesce(spans, max_gap_bytes=1, max_span_bytes=1000)) == 3
    far = [Span(span.offset + 500, span.length) for span in spans]
    for placed in (spans, far):
        assert len(coalesce(placed, max_gap_bytes=2, max_span_bytes=20)) == 2
        assert len(coalesce(placed, max_gap_bytes=2, max_span_bytes=19)) == 3


def test_a_span_longer_than_the_limit_stays_whole():
    assert coalesce([Span(0, 100)], max_gap_bytes=0, max_span_bytes=10) == [Request(Span(0, 100), (0,))]
