"""What is asked for again and again stays, what is read once passes through."""

import random

from hypothesis import given
from hypothesis import strategies as st

from cache.policy import S3Fifo
from cache.testing import Replay, make_key


def test_a_scan_does_not_displace_what_is_in_demand() -> None:
    held = Replay(S3Fifo(), 100)
    favourites = [make_key(number) for number in range(50)]
    for _ in range(4):
        held.access_all(favourites)
    held.access_all(make_key(number) for number in range(1000, 3000))
    assert held.access_all(favourites) == len(favourites)


def test_a_block_that_comes_back_soon_after_it_left_is_kept() -> None:
    held = Replay(S3Fifo(), 20)
    held.access_all(make_key(number) for number in range(21))
    assert make_key(0) not in held.blocks
    held.access(make_key(0))
    held.access_all(make_key(number) for number in range(100, 140))
    assert make_key(0) in held.blocks


def test_asking_whether_a_block_would_be_let_in_changes_nothing() -> None:
    rng = random.Random(2)
    trace = [make_key(int(rng.paretovariate(0.7)) % 500) for _ in range(5000)]
    asked, unasked = Replay(S3Fifo(), 50), Replay(S3Fifo(), 50)
    for key in trace:
        asked.policy.admit(make_key(rng.randrange(10**6, 10**7)), 1, free_bytes=0, free_blocks=0)
        assert asked.access(key) == unasked.access(key)
    assert asked.blocks == unasked.blocks


@given(st.lists(st.tuples(st.integers(0, 12).map(make_key), st.integers(1, 60)), max_size=80), st.integers(0, 6))
def test_blocks_of_any_size_stay_within_the_limits(accesses: list[tuple[bytes, int]], capacity_blocks: int) -> None:
    held = Replay(S3Fifo(), 100, capacity_blocks)
    sizes: dict[bytes, int] = {}
    for key, size in accesses:
        held.access(key, sizes.setdefault(key, size))
        assert (key in held.blocks) == (capacity_blocks > 0), "what fits is let in"
        if size % 7 == 0 and key in held.blocks:  # a reader found it to be wrong
            held.policy.remove(key)
            held._used_bytes -= held.blocks.pop(key)
