"""Pinned blocks are never victims, a quota's blocks make room for their own kind, and every answer is enough room."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.ledger import Ledger
from cache.policy import DropBehind, Guarded, KeptSet, Lru, NextUse, S3Fifo
from cache.testing import make_key

CAPACITY_BYTES, MAX_PINNED_BYTES = 60, 30
QUOTAS = {"a": 25, "b": 12}
POLICIES = [KeptSet, Lru, S3Fifo, DropBehind, lambda: NextUse(lambda key: key[-1] % 5)]


def group_of(key: bytes) -> list[str]:
    """Some blocks are under no quota, some under one, some under both."""
    return [name for name, every in (("a", 2), ("b", 3)) if key[-1] % every == 0]


class World:
    def __init__(self, policy) -> None:
        self.pinned: set[bytes] = set()
        self.guard = Guarded(
            policy,
            is_pinned=self.pinned.__contains__,
            quotas_of=lambda key: [(name, QUOTAS[name]) for name in group_of(key)],
            max_pinned_bytes=MAX_PINNED_BYTES,
        )
        self.ledger = Ledger(
            policy=self.guard,
            cost_bytes=lambda length: length,
            capacity_bytes=CAPACITY_BYTES,
            capacity_blocks=9,
            max_queued_bytes=1000,
            accounts_of=self.guard.accounts,
        )
        self.lying: dict[bytes, int] = {}

    def used(self) -> dict[str, int]:
        return {quota["name"]: quota["used_bytes"] for quota in self.guard.stats()["quotas"]}

    def check(self) -> None:
        used = self.used()
        assert sum(self.lying.values()) <= self.ledger.used_bytes <= CAPACITY_BYTES
        for name, limit in QUOTAS.items():
            lying = sum(size for key, size in self.lying.items() if name in group_of(key))
            assert lying <= used.get(name, 0) <= limit
        assert self.guard.pinned_bytes <= MAX_PINNED_BYTES


@pytest.mark.parametrize("policy", POLICIES)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["offer", "offer", "offer", "hold", "pin", "unpin", "hit", "drop", "fail"]),
            st.integers(0, 20),
            st.integers(1, 14),
        ),
        max_size=80,
    )
)
def test_limits_quotas_and_pins_hold_whatever_happens(policy, steps) -> None:
    world = World(policy)
    ledger, guard, lying = world.ledger, world.guard, world.lying
    held_back = []

    def finish(reservation, *, fails: bool) -> None:
        if fails:
            # The first victim goes, the disk does not let go of the others.
            removed = reservation.victims[:1]
            for key, _ in removed:
                ledger.hide(key)
                del lying[key]
            ledger.give_up(reservation, removed)
            return
        for key, _ in reservation.victims:
            ledger.hide(key)
            del lying[key]
            world.check()
        ledger.settle(reservation)
        lying[reservation.key] = reservation.size_bytes
        world.check()
        ledger.commit(reservation)

    for what, number, length in steps:
        key = make_key(number)
        match what:
            case "offer" | "hold" | "fail":
                protected = {held for held in lying if guard.protects(held)}
                reservation = None if key in lying else ledger.reserve(key, length)
                if reservation is not None:
                    assert protected.isdisjoint(victim for victim, _ in reservation.victims)
                    if what == "hold":
                        held_back.append(reservation)
                    else:
                        finish(reservation, fails=what == "fail")
            case "pin":
                world.pinned.add(key)
                guard.refresh([key])
            case "unpin":
                world.pinned.discard(key)
                guard.refresh([key])
            case "hit":
                guard.touch(key)
            case "drop":
                dropped = ledger.detach(key)
                if dropped is not None:
                    del lying[key]
                    ledger.end_removal(key, dropped, removed=True)
        world.check()
        if len(held_back) > 3:
            finish(held_back.pop(0), fails=False)
            world.check()
    for reservation in held_back:
        finish(reservation, fails=False)
        world.check()


def admit(guard: Guarded, key: bytes, size_bytes: int, free_bytes: int) -> list[bytes] | None:
    return guard.admit(key, size_bytes, free_bytes=free_bytes, free_blocks=99)


def make(policy, pinned: set[int], quotas: dict[int, list[tuple[str, int]]], max_pinned_bytes: int = 99) -> Guarded:
    return Guarded(
        policy,
        is_pinned=lambda key: key[-1] in pinned,
        quotas_of=lambda key: quotas.get(key[-1], []),
        max_pinned_bytes=max_pinned_bytes,
    )


def test_a_pinned_block_comes_in_where_the_policy_would_turn_it_away() -> None:
    guard = make(KeptSet, {9}, {})
    for number in (1, 2):
        guard.insert(make_key(number), 10)
    assert admit(guard, make_key(8), 10, 0) is None
    assert admit(guard, make_key(9), 10, 0) == [make_key(2)]
    guard.remove(make_key(2))
    guard.insert(make_key(9), 10)
    assert guard.pinned_bytes == 10
    assert list(guard.leaving()) == [make_key(1)]
    assert admit(guard, make_key(0), 20, 0) is None


def test_above_the_limit_for_pins_a_pinned_block_is_like_any_other() -> None:
    guard = make(KeptSet, {8, 9}, {}, max_pinned_bytes=15)
    guard.insert(make_key(9), 10)
    guard.insert(make_key(8), 10)
    assert (guard.protects(make_key(9)), guard.protects(make_key(8)), guard.pinned_bytes) == (True, False, 10)
    guard.remove(make_key(9))
    guard.refresh([make_key(8), make_key(7)])
    assert guard.protects(make_key(8))


def test_a_quota_displaces_its_own_blocks_while_the_place_has_room() -> None:
    quotas = {number: [("a", 20)] for number in (1, 2, 3)}
    guard = make(Lru, set(), quotas)
    (account,) = guard.accounts(make_key(1))
    for number in (9, 1, 2):
        guard.insert(make_key(number), 10)
    account.used_bytes = 20
    assert admit(guard, make_key(3), 10, 1000) == [make_key(1)]
    assert admit(guard, make_key(8), 10, 10) == []
    # Its own block makes room in the place as well, and only what is then still missing comes from others.
    assert admit(guard, make_key(3), 10, 0) == [make_key(1)]
    assert admit(guard, make_key(3), 15, 0) == [make_key(1), make_key(2)]
    assert admit(guard, make_key(3), 21, 1000) is None


def test_a_block_that_both_the_quota_and_the_place_give_up_makes_room_once() -> None:
    guard = make(Lru, set(), {number: [("a", 10)] for number in (1, 3)})
    (account,) = guard.accounts(make_key(1))
    for number, size_bytes in ((1, 5), (7, 2), (8, 9)):
        guard.insert(make_key(number), size_bytes)
    account.used_bytes = 5
    # 10 bytes: block 1 has to leave for the quota and gives 5; the oldest of the others has to give the rest.
    assert admit(guard, make_key(3), 10, 0) == [make_key(1), make_key(7), make_key(8)]
    assert admit(guard, make_key(3), 10, 3) == [make_key(1), make_key(7)]


def test_a_quota_without_blocks_is_forgotten() -> None:
    guard = make(Lru, set(), {1: [("job x", 20)]})
    guard.insert(make_key(1), 10)
    assert [quota["name"] for quota in guard.stats()["quotas"]] == ["job x"]
    guard.remove(make_key(1))
    assert guard.stats()["quotas"] == []
