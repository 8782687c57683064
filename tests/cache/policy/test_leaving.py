"""Every policy can say who would leave, first things first, and saying so changes nothing."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.policy import Auto, Detector, DropBehind, KeptSet, Lru, NextUse, Policy, S3Fifo
from cache.testing import make_key

POLICIES: dict[str, Callable[[], Policy]] = {
    "auto": lambda: Auto(Detector().pattern),
    "drop_behind": DropBehind,
    "kept": KeptSet,
    "lru": Lru,
    "next_use": lambda: NextUse(lambda key: math.inf),
    "s3fifo": S3Fifo,
}


@pytest.mark.parametrize("name", POLICIES)
@given(st.lists(st.tuples(st.sampled_from("itr"), st.integers(0, 9)), max_size=60))
def test_all_that_is_held_leaves_once(name: str, events: list[tuple[str, int]]) -> None:
    policy, held = POLICIES[name](), set()
    for event, number in events:
        key = make_key(number)
        if event == "i" and key not in held:
            policy.insert(key, 1)
            held.add(key)
        elif event == "t":
            policy.touch(key)
        elif event == "r":
            policy.remove(key)
            held.discard(key)
        leaving = list(policy.leaving())
        assert sorted(leaving) == sorted(held)
        assert list(policy.leaving()) == leaving


@pytest.mark.parametrize("name", ["kept", "lru", "drop_behind"])
def test_the_first_to_leave_is_the_first_victim(name: str) -> None:
    policy = POLICIES[name]()
    for number in (5, 3, 8, 1):
        policy.insert(make_key(number), 1)
        policy.touch(make_key(number))
    policy.touch(make_key(5))
    first = next(policy.leaving())
    assert policy.admit(make_key(0), 1, free_bytes=0, free_blocks=0) == [first]


def test_what_is_wanted_last_leaves_first() -> None:
    policy = NextUse(lambda key: key[-1])
    for number in (5, 3, 8, 1):
        policy.insert(make_key(number), 1)
    assert [key[-1] for key in policy.leaving()] == [8, 5, 3, 1]


def test_favourites_leave_last() -> None:
    policy = S3Fifo()
    for number in range(4):
        policy.insert(make_key(number), 1)
    for _ in range(2):
        policy.touch(make_key(2))
    policy.insert(make_key(9), 1)
    assert next(policy.leaving()) == make_key(0)
