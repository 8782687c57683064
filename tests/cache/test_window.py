"""The window is what readers take while the origin answers, with a margin that grows at once and shrinks slowly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.window import Window

MIB = 1 << 20


def measured(latency_s: float = 0.5, *, min_bytes: int = 1, max_bytes: int = 1000 * MIB) -> Window:
    window = Window(min_bytes=min_bytes, max_bytes=max_bytes)
    for _ in range(100):
        window.fetched(latency_s)
    return window


def read(window: Window, rate_bytes_s: float, *, begin_s: float = 0.0, seconds: float = 20.0) -> None:
    """Take 64 blocks a second."""
    for place in range(int(64 * seconds)):
        window.taken(int(rate_bytes_s / 64), begin_s + place / 64)


def test_it_is_as_large_as_possible_until_something_is_measured() -> None:
    window = Window(min_bytes=1, max_bytes=1000)
    assert window.size_bytes == 1000
    window.taken(1, 0.0)
    window.came_in_time(1)
    assert (window.size_bytes, window.rate_bytes_s) == (1000, 0)


@pytest.mark.parametrize("latency_s", [0.25, 0.5, 2.0])
@pytest.mark.parametrize("rate_bytes_s", [8 * MIB, 64 * MIB])
def test_it_is_rate_times_latency_with_a_margin(rate_bytes_s: int, latency_s: float) -> None:
    window = measured(latency_s)
    read(window, rate_bytes_s)
    assert window.size_bytes == pytest.approx(2 * rate_bytes_s * latency_s, rel=0.1)
    assert window.rate_bytes_s == pytest.approx(rate_bytes_s, rel=0.1)


def test_a_batch_that_is_taken_at_once_counts_as_a_whole() -> None:
    window = measured(0.03)
    for batch in range(10):
        for _ in range(100):
            window.taken(MIB, 60.0 * batch)
    assert 150 * MIB < window.size_bytes <= 200 * MIB


def test_readers_that_become_slower_need_less_after_a_while() -> None:
    window = measured()
    read(window, 64 * MIB)
    fast = window.size_bytes
    read(window, 4 * MIB, begin_s=100.0, seconds=5)
    assert window.size_bytes > fast / 2, "not at once"
    read(window, 4 * MIB, begin_s=200.0, seconds=400)
    assert window.size_bytes < fast / 8


def test_an_origin_that_becomes_slower_needs_more() -> None:
    window = measured(0.25)
    read(window, 8 * MIB)
    for _ in range(100):
        window.fetched(2.0)
    read(window, 8 * MIB, begin_s=100.0)
    assert window.size_bytes == pytest.approx(32 * MIB, rel=0.1)


def test_one_stall_doubles_it_and_many_blocks_in_time_make_it_smaller_again() -> None:
    window = measured()
    read(window, 8 * MIB)
    before = window.size_bytes
    for late_s in (30.0, 30.1, 30.5):
        window.came_late(late_s)
    assert window.size_bytes == pytest.approx(2 * before, abs=1)
    window.came_late(31.0)
    assert window.size_bytes == pytest.approx(4 * before, abs=1)
    sizes = []
    for _ in range(2000):
        window.came_in_time(MIB)
        sizes.append(window.size_bytes)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == before


def test_what_came_in_time_before_a_stall_makes_nothing_smaller_after_it() -> None:
    window = measured()
    read(window, 8 * MIB)
    window.came_late(30.0)
    size_bytes = window.size_bytes
    window.came_in_time(size_bytes - 1)
    window.came_late(31.0)
    grown_bytes = window.size_bytes
    window.came_in_time(grown_bytes - 1)
    assert window.size_bytes == grown_bytes > size_bytes
    window.came_in_time(1)
    assert window.size_bytes == pytest.approx(grown_bytes * 15 / 16, abs=1)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3000))), st.integers(0, 2000), st.integers(0, 2000))
def test_it_stays_between_its_limits(events: list[tuple[int, int]], min_bytes: int, max_bytes: int) -> None:
    window = Window(min_bytes=min_bytes, max_bytes=max_bytes)
    for place, (event, amount) in enumerate(events):
        [
            lambda n: window.came_in_time(n),
            lambda n, now_s=place / 10: window.came_late(now_s),
            lambda n: window.fetched(n / 100),
            lambda n, now_s=place / 10: window.taken(n, now_s),
        ][event](amount)
        assert min(min_bytes, max_bytes) <= window.size_bytes <= max_bytes
