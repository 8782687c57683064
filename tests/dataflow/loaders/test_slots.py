"""A slot is never written while something lives over it, and there is a limit to slots."""

import errno
import gc
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflow.loaders import slots
from dataflow.loaders.packing import address_of, pack, unpack
from dataflow.loaders.slots import Holdings, Leases, Notices, SlotMap, SlotPool
from dataflow.loaders.testing import slot_mappings


@pytest.fixture
def pool():
    """A pool of one slot, whose descriptor nobody takes."""
    pool = SlotPool(max_slots=1, max_free=1, free_bytes=0)
    yield pool
    for fd in pool.ship([])[2]:
        os.close(fd)


@pytest.fixture
def mapped():
    """Return the number of slots mapped since the test began."""
    gc.collect()
    before = slot_mappings()
    return lambda: slot_mappings() - before


class Pair:
    """A pool and a map in one process, with everything that would cross a socket handed over by call."""

    def __init__(self, *, max_slots=100, max_free=3, free_bytes=0):
        self.pool = SlotPool(max_slots=max_slots, max_free=max_free, free_bytes=free_bytes)
        self.holdings = Holdings()
        self.map = SlotMap(self.holdings)

    def send(self, batch, *, shared=False):
        """Pack a batch, ship it, and return it as the trainer gets it."""
        used = {}
        parcel = pack(batch, self.pool, used)
        del batch
        new, dropped, fds = self.pool.ship(used)
        for slot, fd in zip(new, fds, strict=True):
            self.map.adopt(slot, fd)
        self.map.forget(dropped)
        return unpack(parcel, Leases(self.map, used, shared=shared))

    def return_slots(self):
        self.pool.take_back(self.map.notices())


def tagged(tag, count):
    return torch.full((count,), tag)


@settings(max_examples=60)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from([300, 512, 3000, 20_000]),
            st.sampled_from(["drop", "keep", "keep a view", "keep an array", "drop the oldest"]),
        ),
        max_size=40,
    ),
    limits=st.sampled_from([(2, 1 << 30), (64, 200_000), (64, 1 << 30)]),
    give_bytes=st.sampled_from([10_000, 1 << 20]),
)
def test_what_is_kept_never_changes_and_slots_stay_bounded(steps, limits, give_bytes):
    held_slots, held_bytes = limits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "HELD_SLOTS", held_slots)
        patch.setattr(slots, "HELD_BYTES", held_bytes)
        patch.setattr(slots, "GIVE_BYTES", give_bytes)
        patch.setattr(slots, "GIVEN_SLOTS", 3)
        pair, kept, before = Pair(), [], slot_mappings()
        for tag, (count, action) in enumerate(steps):
            batch = pair.send({"tensor": tagged(tag, count), "array": np.full(count, tag), "tag": tag})
            if action == "keep":
                kept.append((batch["tensor"], tag))
            elif action == "keep a view":
                kept.append((batch["tensor"].view(-1, 4)[1:, ::2], tag))
            elif action == "keep an array":
                kept.append((batch["array"][5:].view(np.uint64), tag))
            elif action == "drop the oldest":
                del kept[:1]
            del batch
            pair.return_slots()
            assert all(bool((value == tag).all()) for value, tag in kept)
            assert len(pair.holdings.ring) <= held_slots
            assert sum(pair.holdings.ring.values()) <= held_bytes
            assert len(pair.holdings.given) <= 3
            assert slot_mappings() - before <= 2 * (held_slots + pair.pool._max_free + 2) + 3
        kept.clear()
        assert pair.holdings == Holdings()


def test_one_slot_is_enough_for_a_caller_who_keeps_nothing():
    pair = Pair()
    for tag in range(50):
        assert (pair.send(tagged(tag, 5000)) == tag).all()
        pair.return_slots()
    assert pair.pool._next_number == 1


def test_nothing_small_takes_a_slot(mapped):
    pair = Pair()
    batch = pair.send([torch.arange(100), np.arange(100), b"x" * 100])
    assert pair.holdings == Holdings()
    assert mapped() == 0
    assert torch.equal(batch[0], torch.arange(100))
    batch[0][0] = batch[1][0] = 7  # and can be written to


def test_a_slot_outlives_its_pool_and_map_as_long_as_a_tensor_does(mapped):
    pair = Pair()
    first, second = pair.send(tagged(1, 5000)), pair.send(tagged(2, 5000))
    del pair
    gc.collect()
    assert mapped() == 2
    del first
    assert mapped() == 1
    assert (second == 2).all()


def test_free_slots_beyond_the_limit_go_back_to_the_system(mapped):
    pair = Pair(max_free=3)
    kept = [pair.send(tagged(tag, 5000)) for tag in range(10)]
    assert mapped() == 20
    kept.clear()
    pair.return_slots()
    pair.send(tagged(0, 5000))  # carries what was dropped
    assert mapped() <= 2 * 3 + 1
    assert len(pair.pool._free) <= 3


def test_more_free_slots_are_kept_while_they_are_small(mapped):
    pair = Pair(max_free=3, free_bytes=6 << 16)
    kept = [pair.send(tagged(tag, 5000)) for tag in range(10)]
    kept.clear()
    pair.return_slots()
    pair.send(tagged(0, 5000))
    assert len(pair.pool._free) == 5  # the sixth went with the message


def test_a_free_slot_that_is_too_small_makes_room_for_a_larger_one():
    pair = Pair(max_slots=1)
    pair.send(tagged(1, 5000))
    pair.return_slots()
    batch = pair.send(tagged(2, 50_000))
    assert len(pair.holdings.ring) == 1
    assert (batch == 2).all()


def test_a_batch_of_a_size_that_was_seen_before_takes_one_slot():
    pair = Pair()
    kept = [pair.send([tagged(tag, 10_000) for _ in range(3)]) for tag in range(2)]
    assert pair.pool._next_number == 3 + 1
    assert [int(part[0]) for batch in kept for part in batch] == [0, 0, 0, 1, 1, 1]


def test_a_slot_that_no_batch_came_to_need_is_free_again(pool):
    for number_of_new in (1, 0):
        assert pool.allocate(5000) is not None
        new, dropped, fds = pool.ship([])
        assert (len(new), dropped) == (number_of_new, [])
        for fd in fds:
            os.close(fd)


def test_what_shares_a_slot_is_aligned_for_any_dtype(pool):
    parts = [pool.allocate(5001) for _ in range(3)]
    assert {pool.locate(address_of(part), 5001).slot for part in parts} == {0}
    assert [address_of(part) % 64 for part in parts] == [0, 0, 0]


def test_only_what_lies_in_a_slot_as_a_whole_is_found_there(pool):
    start = address_of(pool.allocate(5000))
    assert pool.locate(start + 1000, 4000) == (0, 1000, 4000)
    assert pool.locate(start + 1000, 4001) is None
    assert pool.locate(start - 1, 10) is None


def test_a_slot_is_filled_by_the_thread_that_makes_batches_alone(pool):
    with ThreadPoolExecutor(1) as executor:
        assert executor.submit(pool.allocate, 5000).result() is None


def test_a_batch_of_many_large_parts_has_no_more_new_slots_than_a_message_takes(monkeypatch):
    monkeypatch.setattr(slots, "MAX_FDS", 3)
    pair = Pair()
    arrived = pair.send([tagged(tag, 10_000) for tag in range(5)])
    assert [int(part[-1]) for part in arrived] == [0, 1, 2, 3, 4]
    assert pair.pool._next_number == 3


@pytest.mark.parametrize(("owner", "call"), [(os, "memfd_create"), (os, "ftruncate"), (slots, "_map")])
def test_where_no_slot_can_be_made_a_batch_travels_in_the_message(monkeypatch, owner, call):
    def fail(*_):
        raise OSError(errno.ENFILE, "out of everything")

    pair = Pair()
    monkeypatch.setattr(owner, call, fail)
    assert (pair.send(tagged(3, 5000)) == 3).all()
    assert pair.holdings == Holdings()


def test_a_slot_that_the_worker_still_refers_to_is_not_used_again():
    pair = Pair()
    inside = pair.pool.allocate(8000)
    inside[:] = 1
    used = {}
    parcel = pack(torch.from_numpy(inside), pair.pool, used)
    new, _, fds = pair.pool.ship(used)
    pair.map.adopt(new[0], fds[0])
    unpack(parcel, Leases(pair.map, used, shared=False))
    pair.return_slots()
    assert (pair.send(torch.full((8000,), 2, dtype=torch.uint8)) == 2).all()
    assert (inside == 1).all()


def test_a_large_batch_beyond_the_limit_takes_its_slot_with_it(monkeypatch, mapped):
    monkeypatch.setattr(slots, "HELD_SLOTS", 1)
    monkeypatch.setattr(slots, "GIVE_BYTES", 10_000)
    pair = Pair()
    kept = [pair.send(tagged(tag, 5000)) for tag in range(4)]
    pair.return_slots()
    assert len(pair.holdings.given) == 3
    assert len(pair.pool._lent) == 1
    assert mapped() == 4 + 1  # the worker has forgotten three
    assert [int(batch[7]) for batch in kept] == [0, 1, 2, 3]
    kept.clear()
    assert mapped() == 2


def test_slots_that_are_taken_for_good_have_a_limit(monkeypatch):
    monkeypatch.setattr(slots, "HELD_SLOTS", 1)
    monkeypatch.setattr(slots, "GIVE_BYTES", 10_000)
    monkeypatch.setattr(slots, "GIVEN_SLOTS", 2)
    pair = Pair()
    kept = [pair.send(tagged(tag, 5000)) for tag in range(6)]
    assert len(pair.holdings.given) == 2
    assert [int(batch[7]) for batch in kept] == list(range(6))


def test_without_a_free_slot_a_batch_travels_in_the_message(mapped):
    pair = Pair(max_slots=1)
    kept = [pair.send([tagged(tag, 5000), np.full(5000, tag), b"y" * 9000]) for tag in range(3)]
    assert mapped() == 2
    for tag, (tensor, array, raw) in enumerate(kept):
        assert (tensor == tag).all()
        assert (array == tag).all()
        assert raw == b"y" * 9000
        array[0] = tensor[0] = -1


def test_no_descriptor_stays_open():
    before = len(os.listdir("/proc/self/fd"))
    pair = Pair()
    kept = [pair.send(tagged(tag, 5000)) for tag in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(kept) == 5


def read_later(tensor, may_read, outcome):
    may_read.wait()
    outcome.send(tensor.unique().tolist())


def test_what_a_forked_child_sees_never_changes():
    context = multiprocessing.get_context("fork")
    pair, may_read = Pair(), context.Event()
    batch = pair.send(tagged(1, 5000))
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=read_later, args=(batch, may_read, sender))
    child.start()
    del batch
    retired = pair.map.notices()
    assert retired == ([], [0])  # else the worker would wait for it for ever
    pair.pool.take_back(retired)
    for tag in range(2, 6):  # would all be written to the slot that the child still looks at
        pair.return_slots()
        pair.send(tagged(tag, 5000))
    may_read.set()
    assert receiver.recv() == [1]
    child.join()


@pytest.mark.parametrize(("shared", "give_bytes"), [(True, 10_000), (False, 50_000)], ids=["shares", "small"])
def test_a_batch_beyond_the_limit_that_shares_its_slot_or_is_small_is_copied_out(
    monkeypatch, mapped, shared, give_bytes
):
    monkeypatch.setattr(slots, "HELD_SLOTS", 1)
    monkeypatch.setattr(slots, "GIVE_BYTES", give_bytes)
    pair = Pair()
    kept = []
    for tag in range(6):
        kept.append(pair.send(tagged(tag, 5000), shared=shared))
        pair.return_slots()
    assert mapped() == 4  # the slot that is held, and one more that all the others came in; on both sides
    assert [int(batch[0]) for batch in kept] == list(range(6))


def test_what_was_collated_in_a_slot_is_copied_out_beyond_the_limit(monkeypatch):
    monkeypatch.setattr(slots, "HELD_SLOTS", 0)
    pair = Pair()
    inside = pair.pool.allocate(8000)
    inside[:] = 7
    arrived = pair.send(torch.from_numpy(inside))
    assert pair.holdings == Holdings()
    assert (arrived == 7).all()


def test_a_slot_that_no_batch_was_taken_from_goes_back():
    pair, used = Pair(), {}
    pack(tagged(1, 5000), pair.pool, used)
    new, _, fds = pair.pool.ship(used)
    pair.map.adopt(new[0], fds[0])
    Leases(pair.map, used, shared=False)
    assert pair.map.notices() == ([0], [])


def test_an_unknown_notice_is_a_bug_not_a_shrug():
    with pytest.raises(KeyError):
        Pair().pool.take_back(Notices([5], []))
