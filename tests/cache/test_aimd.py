"""Half as much after a refusal, one more after a round of answers."""

from hypothesis import given
from hypothesis import strategies as st

from cache.aimd import Aimd


def test_a_burst_of_refusals_halves_the_limit_once() -> None:
    limit = Aimd(32)
    for now_s in (10.0, 10.1, 10.9):
        limit.refused(now_s)
    assert limit.max_requests == 16
    limit.refused(11.0)
    assert limit.max_requests == 8


def test_a_round_of_answers_allows_one_more() -> None:
    limit = Aimd(32)
    limit.refused(0.0)
    for _ in range(17):
        limit.answered()
    assert limit.max_requests == 17


@given(st.integers(1, 64), st.lists(st.one_of(st.none(), st.floats(0, 1000))))
def test_the_limit_stays_between_one_and_the_highest(max_requests: int, events: list[float | None]) -> None:
    limit = Aimd(max_requests)
    for event in events:
        limit.answered() if event is None else limit.refused(event)
        assert 1 <= limit.max_requests <= max_requests
