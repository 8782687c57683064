"""The window shrinks slowly while all is well and grows at once when it is not."""

from hypothesis import given
from hypothesis import strategies as st

from cache.window import Window


def test_it_shrinks_to_its_lower_limit_while_blocks_come_in_time() -> None:
    window = Window(min_bytes=100, max_bytes=1000)
    sizes = []
    for _ in range(2000):
        window.came_in_time(50)
        sizes.append(window.size_bytes)
    assert sizes[0] == 1000
    assert sizes[-1] == 100
    assert sizes == sorted(sizes, reverse=True)


def test_one_late_block_doubles_it() -> None:
    window = Window(min_bytes=100, max_bytes=1000)
    for _ in range(2000):
        window.came_in_time(50)
    window.came_late()
    assert window.size_bytes == 200


@given(st.lists(st.integers(0, 3000)), st.integers(0, 2000), st.integers(0, 2000))
def test_it_stays_between_its_limits(events: list[int], min_bytes: int, max_bytes: int) -> None:
    window = Window(min_bytes=min_bytes, max_bytes=max_bytes)
    for event in events:
        window.came_in_time(event) if event else window.came_late()
        assert min(min_bytes, max_bytes) <= window.size_bytes <= max_bytes
