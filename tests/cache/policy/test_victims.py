from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from cache.policy.victims import first_enough
from cache.testing import make_key


@given(st.lists(st.integers(1, 9), max_size=8), st.integers(1, 30), st.integers(-5, 20), st.integers(-3, 5))
def test_victims_are_the_shortest_beginning_that_makes_room(
    sizes: list[int], size_bytes: int, free_bytes: int, free_blocks: int
) -> None:
    keys = [make_key(number) for number in range(len(sizes))]
    victims = first_enough(
        keys, dict(zip(keys, sizes, strict=True)), size_bytes, free_bytes=free_bytes, free_blocks=free_blocks
    )
    enough = [
        keys[:count]
        for count in range(len(keys) + 1)
        if free_bytes + sum(sizes[:count]) >= size_bytes and free_blocks + count >= 1
    ]
    assert victims == (enough[0] if enough else None)
