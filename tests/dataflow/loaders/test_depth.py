"""How far ahead workers are asked for batches."""

import os

import pytest
import torch
from torch.utils.data import BatchSampler, Dataset, RandomSampler, Sampler, SequentialSampler

from dataflow.loaders import DataLoader
from dataflow.loaders.depth import AHEAD_BYTES, MAX_DEPTH, Depth
from dataflow.loaders.order_state import draws_unseen


def grown(depth: Depth, *, waits: int, size_bytes: int = 1000, batches: int = 640) -> int:
    """Deliver batches, of each 16 of which so many were waited for."""
    for number in range(batches):
        if number % 16 < waits:
            depth.waited()
        depth.delivered(size_bytes)
    return depth.batches


def test_a_caller_who_waits_for_small_batches_has_more_made_ahead():
    assert grown(Depth(2, most=MAX_DEPTH), waits=16, batches=15) == 2
    assert grown(Depth(2, most=MAX_DEPTH), waits=16, batches=16) == 4
    assert grown(Depth(2, most=MAX_DEPTH), waits=4) == MAX_DEPTH


def test_each_step_of_growth_takes_as_many_messages_however_many_batches_they_carry():
    assert grown(Depth(2, most=MAX_DEPTH), waits=16, batches=16 + 31) == 4  # two batches a message by now
    assert grown(Depth(2, most=MAX_DEPTH), waits=16, batches=16 + 32) == 8


def test_what_is_asked_of_a_worker_is_spread_over_two_messages():
    depth = Depth(2, most=MAX_DEPTH)
    assert depth.at_once == 1
    grown(depth, waits=16)
    assert depth.at_once == MAX_DEPTH // 2


def test_a_caller_who_rarely_waits_has_not():
    assert grown(Depth(2, most=MAX_DEPTH), waits=3) == 2


def test_large_batches_are_made_ahead_up_to_a_number_of_bytes():
    assert grown(Depth(2, most=MAX_DEPTH), waits=16, size_bytes=AHEAD_BYTES // 4) == 4
    assert grown(Depth(2, most=MAX_DEPTH), waits=16, size_bytes=AHEAD_BYTES // 4 + 1) == 2


def test_one_large_batch_speaks_for_all_that_came_with_it():
    depth = Depth(2, most=MAX_DEPTH)
    depth.delivered(AHEAD_BYTES)
    assert grown(depth, waits=16) == 2


def test_a_depth_that_may_not_grow_does_not():
    assert grown(Depth(2, most=0), waits=16) == 2
    assert grown(Depth(2, most=7), waits=16) == 7
    assert grown(Depth(4, most=3), waits=16) == 4
    fixed = Depth(4, most=0)
    grown(fixed, waits=16)
    assert fixed.at_once == 1


def test_a_depth_that_is_held_is_what_was_given():
    depth = Depth(3, most=MAX_DEPTH)
    grown(depth, waits=16)
    depth.hold()
    assert (grown(depth, waits=16), depth.at_once) == (3, 1)


def test_a_given_depth_is_never_less():
    assert grown(Depth(100, most=MAX_DEPTH), waits=16) == 100


@pytest.mark.parametrize(("given", "end"), [(3, MAX_DEPTH), (MAX_DEPTH + 1, MAX_DEPTH + 1)])
def test_growth_is_told_as_often_as_it_happens(given, end):
    depth = Depth(given, most=MAX_DEPTH)
    told = 0
    for _ in range(1000):
        depth.waited()
        told += depth.delivered(1)
    assert given + told == depth.batches == end


class Own(Sampler):
    def __init__(self, drawn):
        self.drawn = drawn

    def __iter__(self):
        for number in range(200):
            self.drawn.append(number)
            yield number


def test_only_draws_that_nobody_sees_are_made_earlier():
    data = range(10)
    assert draws_unseen(BatchSampler(RandomSampler(data), 2, drop_last=False))
    assert draws_unseen(SequentialSampler(data))
    assert not draws_unseen(Own([]))
    assert not draws_unseen(BatchSampler(Own([]), 2, drop_last=False))


class Counting(Dataset):
    """Leaves a byte in a file for each sample that any worker reads."""

    def __init__(self, folder):
        self.file = folder / "reads"

    def __len__(self):
        return 400

    def __getitem__(self, number):
        descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, b".")
        os.close(descriptor)
        return torch.tensor(number)


@pytest.mark.parametrize("options", [{}, {"in_order": False}, {"persistent_workers": True}])
def test_every_batch_comes_once_however_far_ahead_they_are_made(tmp_path, options):
    loader = DataLoader(Counting(tmp_path), batch_size=2, shuffle=True, num_workers=2, **options)
    for _ in range(2):
        numbers = [number for batch in loader for number in batch.tolist()]
        assert sorted(numbers) == list(range(400))
    assert loader.dataset.file.stat().st_size == 800


def test_a_sampler_of_the_users_is_drawn_no_earlier_however_long_the_caller_waits(tmp_path):
    drawn = []
    loader = DataLoader(Counting(tmp_path), sampler=Own(drawn), num_workers=2, prefetch_factor=3)
    for number, _ in zip(range(200), loader, strict=True):
        assert len(drawn) <= number + 1 + 6


def test_a_state_counts_batches_handed_out_however_far_ahead_they_are_made(tmp_path):
    torch.manual_seed(5)
    loader = DataLoader(Counting(tmp_path), batch_size=2, shuffle=True, num_workers=2)
    batches = iter(loader)
    first = [next(batches).tolist() for _ in range(120)]
    state = loader.state_dict()
    rest = [batch.tolist() for batch in batches]
    other = DataLoader(Counting(tmp_path), batch_size=2, shuffle=True, num_workers=1)
    other.load_state_dict(state)
    assert [batch.tolist() for batch in other] == rest
    assert sorted(number for batch in first + rest for number in batch) == list(range(400))


def test_a_look_at_what_has_arrived_is_no_wait(tmp_path, monkeypatch):
    batches = iter(DataLoader(Counting(tmp_path), batch_size=2, num_workers=1))
    waits = []
    monkeypatch.setattr(batches._depth, "waited", lambda: waits.append(1))
    batches._attend(0)
    assert not waits
