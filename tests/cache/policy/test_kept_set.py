"""Lowest keys stay, whatever the order of arrival."""

import random

from hypothesis import given
from hypothesis import strategies as st

from cache.keys import KEY_BYTES
from cache.policy import KeptSet

CAPACITY_BYTES = 100
KEYS = st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES)
SIZES_BY_KEY = st.dictionaries(KEYS, st.integers(1, 120), min_size=1, max_size=30)


class Held:
    """A tier reduced to its policy."""

    def __init__(self, capacity_bytes: int, capacity_blocks: int) -> None:
        self.policy = KeptSet()
        self.blocks: dict[bytes, int] = {}
        self.capacity_bytes, self.capacity_blocks = capacity_bytes, capacity_blocks
        self.writes = 0

    def offer(self, key: bytes, size_bytes: int) -> None:
        if key in self.blocks:
            self.policy.touch(key)
            return
        victims = self.policy.admit(
            key,
            size_bytes,
            free_bytes=self.capacity_bytes - sum(self.blocks.values()),
            free_blocks=self.capacity_blocks - len(self.blocks),
        )
        if victims is None:
            return
        for victim in victims:
            self.policy.remove(victim)
            del self.blocks[victim]
        self.policy.insert(key, size_bytes)
        self.blocks[key] = size_bytes
        self.writes += 1
        assert sum(self.blocks.values()) <= self.capacity_bytes
        assert len(self.blocks) <= self.capacity_blocks


def lowest_that_fit(sizes: dict[bytes, int], capacity_bytes: int, capacity_blocks: int) -> dict[bytes, int]:
    kept: dict[bytes, int] = {}
    for key, size in sorted(sizes.items()):
        if sum(kept.values()) + size <= capacity_bytes and len(kept) < capacity_blocks:
            kept[key] = size
    return kept


@given(SIZES_BY_KEY, st.integers(0, 12), st.randoms())
def test_every_order_of_arrival_ends_in_the_same_set_and_then_nothing_is_written(
    sizes: dict[bytes, int], capacity_blocks: int, order: random.Random
) -> None:
    held = Held(CAPACITY_BYTES, capacity_blocks)
    expected = lowest_that_fit(sizes, CAPACITY_BYTES, capacity_blocks)
    keys = list(sizes)
    for _ in range(len(keys) + 1):
        order.shuffle(keys)
        for key in keys:
            held.offer(key, sizes[key])
        if held.blocks == expected:
            break
    assert held.blocks == expected
    before = held.writes
    order.shuffle(keys)
    for key in keys:
        held.offer(key, sizes[key])
    assert held.writes == before


@given(st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=60, unique=True))
def test_blocks_of_one_size_settle_in_a_single_pass(keys: list[bytes]) -> None:
    held = Held(10, 10)
    for key in keys:
        held.offer(key, 1)
    assert sorted(held.blocks) == sorted(keys)[:10]


def test_a_higher_key_displaces_nothing() -> None:
    policy = KeptSet()
    policy.insert(b"a", 10)
    assert policy.admit(b"b", 10, free_bytes=0, free_blocks=5) is None
    assert policy.admit(b"b", 10, free_bytes=10, free_blocks=0) is None
    assert policy.admit(b"b", 10, free_bytes=10, free_blocks=1) == []
