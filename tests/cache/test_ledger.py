"""Whatever happens to a reservation, the charge covers what is on the medium and stays within the limits."""

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.ledger import UNLIMITED_BLOCKS, Ledger, Reservation
from cache.policy import Account, KeptSet, Lru
from cache.testing import make_key

CAPACITY_BYTES, CAPACITY_BLOCKS, MAX_QUEUED_BYTES = 40, 8, 25
ENDS = ["commit", "abandon", "left_behind", "give_up"]

STEPS = st.lists(
    st.tuples(st.integers(0, 30), st.integers(1, 15), st.sampled_from(ENDS), st.integers(0, 3), st.booleans()),
    max_size=60,
)


class Medium:
    """What really lies there, as a kill would leave it."""

    def __init__(self) -> None:
        self.sizes: dict[bytes, int] = {}
        self.stuck: defaultdict[bytes, list[int]] = defaultdict(list)

    @property
    def stuck_sizes(self) -> list[int]:
        return [size for sizes in self.stuck.values() for size in sizes]

    def check(self, ledger: Ledger, writing: list[Reservation]) -> None:
        lying = [*self.sizes.values(), *self.stuck_sizes, *(reservation.size_bytes for reservation in writing)]
        assert sum(lying) <= ledger.used_bytes <= CAPACITY_BYTES
        assert len(lying) <= ledger.used_blocks <= CAPACITY_BLOCKS


@given(STEPS, st.sampled_from([KeptSet, Lru]))
def test_the_charge_covers_the_medium_and_never_exceeds_the_limits(steps: list, policy: type) -> None:
    ledger = Ledger(
        policy=policy(),
        cost_bytes=lambda length: length,
        capacity_bytes=CAPACITY_BYTES,
        capacity_blocks=CAPACITY_BLOCKS,
        max_queued_bytes=MAX_QUEUED_BYTES,
    )
    medium = Medium()
    # Reservations whose victims are not yet gone, and those whose block is being written.
    open_ones: list[tuple[Reservation, str, int]] = []
    writing: list[tuple[Reservation, str]] = []

    def finish() -> None:
        reservation, end = writing.pop(0)
        if end == "commit":
            medium.sizes[reservation.key] = reservation.size_bytes
            medium.stuck.pop(reservation.key, None)
            ledger.commit(reservation)
            assert ledger.holds(reservation.key)
        else:
            if end == "left_behind":
                medium.stuck[reservation.key].append(reservation.size_bytes)
            ledger.abandon(reservation, left_behind=end == "left_behind")

    def make_room() -> None:
        reservation, end, removable = open_ones.pop(0)
        victims = reservation.victims[:removable] if end == "give_up" else reservation.victims
        for key, _ in victims:
            ledger.hide(key)
            del medium.sizes[key]
        if end == "give_up":
            ledger.give_up(reservation, victims)
        else:
            ledger.settle(reservation)
            writing.append((reservation, end))

    def shrink(part: int, *, removed: bool) -> None:
        """Ask for other limits, evict for them all that can leave, and go back."""
        limits = (CAPACITY_BYTES * part // 15, CAPACITY_BLOCKS * part // 15)
        ledger.resize(*limits)
        while victims := ledger.surplus():
            for key, length in victims:
                before = ledger.capacity_bytes
                assert ledger.begin_eviction(key)
                assert not ledger.begin_eviction(key)
                size = medium.sizes.pop(key)
                if not removed:
                    medium.stuck[key].append(size)
                ledger.end_eviction(key, length, removed=removed)
                assert max(limits[0], ledger.used_bytes) <= ledger.capacity_bytes <= before
        if not open_ones and not writing and not medium.stuck_sizes:
            assert ledger.resized
            assert (ledger.capacity_bytes, ledger.capacity_blocks) == limits
        ledger.resize(CAPACITY_BYTES, CAPACITY_BLOCKS)

    for number, length, end, removable, later in steps:
        key = make_key(number)
        if number == 30:
            shrink(length, removed=later)
            medium.check(ledger, [reservation for reservation, _ in writing])
        wanted = ledger.wants(key, length)
        reservation = ledger.reserve(key, length)
        assert (reservation is not None) == wanted
        if reservation is not None:
            assert ledger.reserve(key, length) is None
            open_ones.append((reservation, end, removable))
        while not later and open_ones:
            make_room()
            medium.check(ledger, [reservation for reservation, _ in writing])
        if not later and writing:
            finish()
        medium.check(ledger, [reservation for reservation, _ in writing])
    while open_ones:
        make_room()
    while writing:
        finish()
    assert ledger.used_bytes == sum(medium.sizes.values()) + sum(medium.stuck_sizes)
    assert ledger.used_blocks == len(medium.sizes) + len(medium.stuck_sizes)
    assert len(ledger) == len(medium.sizes)
    for key, length in list(medium.sizes.items()):
        assert ledger.detach(key) == length
        assert ledger.detach(key) is None
        ledger.end_removal(key, length, removed=True)
    assert (ledger.used_bytes, ledger.used_blocks) == (sum(medium.stuck_sizes), len(medium.stuck_sizes))


def test_a_better_block_waits_for_one_that_is_being_written() -> None:
    ledger = Ledger(
        policy=KeptSet(), cost_bytes=lambda length: length, capacity_bytes=20, capacity_blocks=8, max_queued_bytes=30
    )
    writing = [ledger.reserve(make_key(number), 10) for number in (1, 7)]
    assert ledger.reserve(make_key(3), 10) is None
    assert [ledger.undecided(make_key(number), 10) for number in (1, 3, 9)] == [False, True, False]
    ledger.settle(writing[0])
    ledger.commit(writing[0])
    # It may displace neither 7, of which a part lies there, nor 1, which is better.
    assert (ledger.wants(make_key(3), 10), ledger.undecided(make_key(3), 10)) == (False, True)
    ledger.settle(writing[1])
    ledger.commit(writing[1])
    assert (ledger.wants(make_key(3), 10), ledger.undecided(make_key(3), 10)) == (True, False)
    reservation = ledger.reserve(make_key(3), 10)
    assert [key for key, _ in reservation.victims] == [make_key(7)]


def test_above_its_limits_a_tier_lets_nothing_in() -> None:
    ledger = Ledger(
        policy=Lru(), cost_bytes=lambda length: length, capacity_bytes=40, capacity_blocks=8, max_queued_bytes=40
    )
    reservation = ledger.reserve(make_key(1), 10)
    ledger.settle(reservation)
    ledger.commit(reservation)
    ledger.resize(5, 8)
    assert not ledger.wants(make_key(2), 5)
    for key, length in ledger.surplus():
        ledger.begin_eviction(key)
        ledger.end_eviction(key, length, removed=True)
    assert ledger.wants(make_key(2), 5)


@pytest.mark.parametrize(
    ("capacity_bytes", "capacity_blocks", "leaving"), [(40, 8, 0), (39, 8, 1), (20, 8, 2), (40, 3, 1), (40, 2, 2)]
)
def test_no_more_leaves_for_smaller_limits_than_exceeds_them(
    capacity_bytes: int, capacity_blocks: int, leaving: int
) -> None:
    ledger = Ledger(
        policy=Lru(), cost_bytes=lambda length: length, capacity_bytes=40, capacity_blocks=8, max_queued_bytes=40
    )
    ledger.take_over([(make_key(number), 10) for number in range(4)], unwanted=set())
    ledger.resize(capacity_bytes, capacity_blocks)
    assert ledger.surplus() == [(make_key(number), 10) for number in range(leaving)]


def test_a_block_that_found_no_room_is_under_the_quotas_that_it_has_when_it_comes_again() -> None:
    account = Account("job a", 100, Lru())
    quotas = {make_key(1): [account]}
    ledger = Ledger(
        policy=Lru(),
        cost_bytes=lambda length: length,
        capacity_bytes=10,
        capacity_blocks=8,
        max_queued_bytes=40,
        accounts_of=lambda key: quotas.get(key, ()),
    )
    ledger.take_over([(make_key(0), 10)], unwanted=set())
    refused = ledger.reserve(make_key(1), 10)
    assert refused is not None
    ledger.give_up(refused, [])
    quotas.clear()
    coming = ledger.reserve(make_key(1), 10)
    assert coming is not None
    ledger.hide(make_key(0))
    ledger.settle(coming)
    ledger.commit(coming)
    ledger.forget()
    assert (account.used_bytes, ledger.used_bytes) == (0, 0)


def test_what_is_on_its_way_when_the_medium_is_replaced_ends_as_it_would() -> None:
    ledger = Ledger(
        policy=Lru(),
        cost_bytes=lambda length: length,
        capacity_bytes=40,
        capacity_blocks=UNLIMITED_BLOCKS,
        max_queued_bytes=100,
    )
    ledger.take_over([(make_key(number), 10) for number in range(4)], unwanted=set())
    writing = ledger.reserve(make_key(4), 10)
    coming = ledger.reserve(make_key(5), 10)
    assert writing is not None
    assert coming is not None
    ledger.hide(writing.victims[0][0])
    ledger.settle(writing)
    ledger.forget()
    assert len(ledger) == 0
    assert ledger.used_bytes == 20
    # One of them lies in the new directory already.
    assert ledger.take_over([(make_key(4), 10), (make_key(6), 10)], unwanted=set()) == []
    assert ledger.used_bytes == 30
    ledger.commit(writing)
    ledger.settle(coming)
    ledger.abandon(coming, left_behind=False)
    assert sorted(ledger.keys()) == [make_key(4), make_key(6)]
    assert (ledger.used_bytes, ledger.used_blocks) == (20, 2)


def test_what_is_still_being_written_does_not_leave_for_what_another_medium_holds() -> None:
    ledger = Ledger(
        policy=Lru(), cost_bytes=lambda length: length, capacity_bytes=20, capacity_blocks=9, max_queued_bytes=100
    )
    coming = ledger.reserve(make_key(4), 10)
    assert coming is not None
    ledger.forget()
    assert ledger.take_over([(make_key(number), 10) for number in range(2)], unwanted=set()) == [(make_key(1), 10)]
    ledger.settle(coming)
    ledger.commit(coming)
    assert sorted(ledger.keys()) == [make_key(0), make_key(4)]
    assert (ledger.used_bytes, ledger.used_blocks) == (20, 2)


def test_on_a_full_medium_newcomers_displace_blocks_within_what_there_was_room_for() -> None:
    ledger = Ledger(
        policy=Lru(), cost_bytes=lambda length: length, capacity_bytes=100, capacity_blocks=9, max_queued_bytes=100
    )
    ledger.take_over([(make_key(number), 10) for number in range(3)], unwanted=set())
    failed = ledger.reserve(make_key(3), 10)
    assert failed is not None
    ledger.settle(failed)
    ledger.abandon(failed, left_behind=False)
    ledger.squeeze()
    assert not ledger.stretched
    ledger.admission = "replacing"
    coming = ledger.reserve(make_key(4), 15)
    assert coming is not None
    assert coming.victims == [(make_key(0), 10), (make_key(1), 10)]
    ledger.settle(coming)
    ledger.commit(coming)
    assert (ledger.used_bytes, ledger.stretched) == (25, False)
    assert not ledger.wants(make_key(5), 31)
    ledger.admission = "one"
    more = ledger.reserve(make_key(6), 10)
    assert more is not None
    assert (more.victims, ledger.stretched) == ([], True)
