"""What was used longest ago goes first."""

from hypothesis import given
from hypothesis import strategies as st

from cache.policy import Lru


@given(st.lists(st.integers(0, 9), max_size=80), st.integers(1, 6))
def test_it_holds_the_most_recently_used(accesses: list[int], capacity_blocks: int) -> None:
    policy = Lru()
    held: list[int] = []  # least recently used first
    for number in accesses:
        key = bytes([number])
        if number in held:
            policy.touch(key)
            held.remove(number)
        else:
            victims = policy.admit(key, 1, free_bytes=100, free_blocks=capacity_blocks - len(held))
            assert victims == [bytes([old]) for old in held[: max(0, len(held) + 1 - capacity_blocks)]]
            for victim in victims:
                policy.remove(victim)
                held.remove(victim[0])
            policy.insert(key, 1)
        held.append(number)


def test_bytes_are_made_free_as_far_as_needed() -> None:
    policy = Lru()
    for name, size in ((b"a", 4), (b"b", 4), (b"c", 4)):
        policy.insert(name, size)
    assert policy.admit(b"d", 7, free_bytes=0, free_blocks=9) == [b"a", b"b"]


def test_what_can_never_fit_is_turned_away_and_nothing_is_lost() -> None:
    policy = Lru()
    policy.insert(b"a", 4)
    assert policy.admit(b"d", 7, free_bytes=2, free_blocks=9) is None
    assert policy.admit(b"d", 4, free_bytes=0, free_blocks=9) == [b"a"]


def test_a_key_that_just_left_may_be_touched() -> None:
    policy = Lru()
    policy.touch(b"gone")
    policy.remove(b"gone")
    assert policy.admit(b"d", 1, free_bytes=0, free_blocks=1) is None
