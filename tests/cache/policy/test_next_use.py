"""Belady's rule is optimal; without announcements it is LRU or the kept set."""

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.policy import KeptSet, Lru, NextUse
from cache.testing import Replay, make_key


class Oracle:
    """Knows a whole trace."""

    def __init__(self, trace: list[bytes]) -> None:
        self.trace, self.place = trace, 0

    def next_use(self, key: bytes) -> float:
        for place in range(self.place, len(self.trace)):
            if self.trace[place] == key:
                return place
        return math.inf

    def replay(self, held: Replay) -> int:
        for place, key in enumerate(self.trace):
            self.place = place + 1
            held.access(key)
        return held.hits


def best_possible_hits(trace: list[bytes], capacity: int) -> int:
    """Try every choice of victims, bypassing included."""
    states = {frozenset(): 0}
    for key in trace:
        after: dict[frozenset[bytes], int] = {}
        for held, hits in states.items():
            if key in held:
                choices = [(held, hits + 1)]
            elif len(held) < capacity:
                choices = [(held | {key}, hits), (held, hits)]
            else:
                choices = [(held - {victim} | {key}, hits) for victim in held] + [(held, hits)]
            for state, count in choices:
                after[state] = max(after.get(state, -1), count)
        states = after
    return max(states.values())


@given(st.lists(st.integers(0, 5).map(make_key), max_size=16), st.integers(1, 3))
def test_no_choice_of_victims_hits_more(trace: list[bytes], capacity: int) -> None:
    oracle = Oracle(trace)
    held = Replay(NextUse(oracle.next_use), capacity)
    assert oracle.replay(held) == best_possible_hits(trace, capacity)


@pytest.mark.parametrize(("otherwise", "reference"), [("recent", Lru), ("lowest_key", KeptSet)])
def test_blocks_that_nobody_announced_are_kept_by_the_second_rule(otherwise: str, reference: type) -> None:
    rng = random.Random(1)
    ours, theirs = Replay(NextUse(lambda _: math.inf, otherwise=otherwise), 20), Replay(reference(), 20)
    for key in (make_key(rng.randrange(40)) for _ in range(2000)):
        ours.access(key)
        theirs.access(key)
        assert ours.blocks == theirs.blocks


def test_an_announced_block_is_not_displaced_by_others_and_leaves_after_its_use() -> None:
    uses = {make_key(1): 10.0}
    held = Replay(NextUse(lambda key: uses.get(key, math.inf), otherwise="recent"), 2)
    for number in (1, 2, 3, 4, 5):
        held.access(make_key(number))
    assert set(held.blocks) == {make_key(1), make_key(5)}
    uses.clear()
    held.policy.rerank([make_key(1), make_key(99)])
    held.access(make_key(6))
    assert set(held.blocks) == {make_key(5), make_key(6)}


def test_a_plan_that_comes_later_protects_what_is_already_there() -> None:
    uses: dict[bytes, float] = {}
    policy = NextUse(lambda key: uses.get(key, math.inf), otherwise="recent")
    held = Replay(policy, 3)
    held.access_all(make_key(number) for number in (1, 2, 3))
    uses |= {make_key(1): 5.0, make_key(2): 4.0}
    policy.rerank(uses)
    held.access(make_key(4))
    assert set(held.blocks) == {make_key(1), make_key(2), make_key(4)}


@given(st.lists(st.tuples(st.integers(0, 9).map(make_key), st.integers(1, 40)), max_size=60))
def test_blocks_of_any_size_stay_within_the_limits(accesses: list[tuple[bytes, int]]) -> None:
    counter = itertools.count()
    held = Replay(NextUse(lambda key: (key[-1] * 7 + next(counter)) % 11), 100, 5)
    sizes: dict[bytes, int] = {}
    for key, size in accesses:
        held.access(key, sizes.setdefault(key, size))
