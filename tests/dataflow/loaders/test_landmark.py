"""A sampler that draws another order than it did is noticed where a state goes on, and no other sampler is accused."""

import functools
import gc
import itertools
import json
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DistributedSampler, Sampler

from connectors.errors import BadInputError
from dataflow.loaders import DataLoader, landmark
from dataflow.loaders.landmark import Landmark, advanced, digest_index
from dataflow.loaders.testing import Numbers

LENGTH = 24


class CountsEpochs(Sampler):
    """Its order is that of an epoch that it counts itself."""

    epochs = 0

    def __len__(self):
        return LENGTH

    def __iter__(self):
        self.epochs += 1
        yield from random.Random(self.epochs).sample(range(LENGTH), LENGTH)


class Nested(Sampler):
    """Its generator is one level deeper than anybody looks."""

    def __init__(self):
        self.inner = {"generator": random.Random(random.SystemRandom().random())}

    def __len__(self):
        return LENGTH

    def __iter__(self):
        return iter(self.inner["generator"].sample(range(10**6), LENGTH))  # never the same batch by chance


class CountedBatches(CountsEpochs):
    """As a batch sampler."""

    def __len__(self):
        return LENGTH // 4

    def __iter__(self):
        numbers = list(super().__iter__())
        for first in range(0, LENGTH, 4):
            yield numbers[first : first + 4]


MISLED = {
    "sampler": (lambda: {"batch_size": 4, "sampler": CountsEpochs()}, "CountsEpochs"),
    "batch sampler": (lambda: {"batch_sampler": CountedBatches()}, "CountedBatches"),
    "no batches": (lambda: {"batch_size": None, "sampler": CountsEpochs()}, "CountsEpochs"),
    "inside of torch's": (lambda: {"batch_sampler": BatchSampler(CountsEpochs(), 4, False)}, "CountsEpochs"),
    "nested generator": (lambda: {"batch_size": 4, "sampler": Nested()}, "Nested"),
    "another list": (lambda: {"batch_size": 4, "sampler": random.sample(range(10**6), LENGTH)}, "list"),
}


class Anything(Numbers):
    """Numbers without an end."""

    def __getitem__(self, index):
        return torch.tensor([index])


def open_loader(way, num_workers=0, **more):
    return DataLoader(Anything(LENGTH), num_workers=num_workers, **MISLED[way][0](), **more)


def stopped(loader, steps=3, epochs=1):
    """Return a loader's state some steps behind so many epochs, as a file keeps it."""
    for _ in range(epochs):
        for _ in loader:
            pass
    iterator = iter(loader)
    for _ in range(steps):
        next(iterator)
    return json.loads(json.dumps(loader.state_dict()))


@pytest.mark.parametrize("workers", [(0, 0), (1, 0), (0, 2)], ids=str)
@pytest.mark.parametrize("way", MISLED)
def test_a_resume_in_another_order_is_refused_by_the_samplers_name(way, workers):
    saved_with, loaded_with = workers
    loader = open_loader(way, loaded_with)
    loader.load_state_dict(stopped(open_loader(way, saved_with), epochs=2))
    for _ in range(2):  # and no epoch begins in its place
        with pytest.raises(BadInputError, match=rf"^{MISLED[way][1]} draws other batches now.*state_dict\(\)"):
            iter(loader)


@pytest.mark.parametrize("workers", ["process", "thread"])
def test_persistent_workers_do_not_go_on_in_another_order(workers):
    loader = open_loader("sampler", 1, persistent_workers=True, workers=workers)
    state = stopped(loader)
    for _ in loader:
        pass
    loader.load_state_dict(state)
    with pytest.raises(BadInputError, match="CountsEpochs"):
        iter(loader)
    gc.collect()


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("way", ["sampler", "batch sampler", "no batches"])
def test_the_same_order_goes_on(way, steps):
    loader = open_loader(way)
    state = stopped(loader, steps)
    rest = [batch.tolist() for batch in itertools.islice(open_at(way, epochs=1), steps, None)]
    resumed = open_at(way, epochs=1)
    resumed.load_state_dict(state)
    assert [batch.tolist() for batch in resumed] == rest != []


def open_at(way, epochs):
    """Return a loader whose sampler was told how many epochs are over."""
    loader = open_loader(way)
    sampler = loader.batch_sampler if way == "batch sampler" else loader.sampler
    sampler.epochs = epochs
    return loader


def test_a_wrong_set_epoch_after_loading_is_refused_with_both_epochs_and_a_right_one_goes_on():
    def open_loader():
        return DataLoader(Numbers(LENGTH), batch_size=4, sampler=DistributedSampler(range(LENGTH), 1, 0))

    loader = open_loader()
    loader.set_epoch(3)
    iterator = iter(loader)
    next(iterator)
    state, rest = loader.state_dict(), [batch.tolist() for batch in iterator]
    resumed = open_loader()
    resumed.load_state_dict(state)
    resumed.set_epoch(0)
    with pytest.raises(
        BadInputError, match=r"saved in epoch 3 and DistributedSampler is at epoch 0 now.*set_epoch\(3\)"
    ):
        iter(resumed)
    resumed.set_epoch(3)
    assert [batch.tolist() for batch in resumed] == rest


def test_a_user_who_seeds_the_generator_of_a_shuffle_is_not_refused():
    def open_loader():
        generator = torch.Generator()
        return DataLoader(Numbers(LENGTH), batch_size=4, shuffle=True, generator=generator), generator

    loader, generator = open_loader()
    generator.manual_seed(5)
    iterator = iter(loader)
    next(iterator)
    state, rest = loader.state_dict(), [batch.tolist() for batch in iterator]
    resumed, generator = open_loader()
    generator.manual_seed(6)
    resumed.load_state_dict(state)
    assert [batch.tolist() for batch in resumed] == rest


def test_states_without_a_landmark_are_accepted():
    state = stopped(open_loader("sampler"))
    del state["epoch"]["landmark"]
    loader = open_loader("sampler")
    loader.load_state_dict(state)
    assert len(list(loader)) == LENGTH // 4 - 3


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_state_between_epochs_has_none(epochs):
    loader = open_loader("sampler")
    for _ in range(epochs):
        for _ in loader:
            pass
    assert "landmark" not in str(loader.state_dict())
    iter(loader)
    assert "landmark" not in str(loader.state_dict())


def test_out_of_order_batches_leave_a_landmark_that_was_passed():
    loader = DataLoader(Anything(LENGTH), sampler=CountsEpochs(), num_workers=2, in_order=False)
    iterator = iter(loader)
    progress = loader._ledger.progress
    for number in (1, 0, 3, 2):  # as they may arrive
        progress.hand_out(number, number * 10)
        saved = progress.as_dict()
        assert saved.get("landmark", {"batch": 0})["batch"] <= saved["batches"]
    assert saved["landmark"] == {"batch": 2, "digest": digest_index(20)}
    assert saved["batches"] == 4
    del iterator
    resumed = DataLoader(Anything(LENGTH), sampler=CountsEpochs())
    resumed.load_state_dict({**resumed.state_dict(), "epoch": saved})
    with pytest.raises(BadInputError, match="CountsEpochs"):
        iter(resumed)


class Refusing(Numbers):
    """Its origin is away."""

    def __getitem__(self, index):
        raise LookupError(index)


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_batch_that_raised_is_the_next_and_is_compared(epochs):
    loader = DataLoader(Refusing(LENGTH), sampler=CountsEpochs())
    with pytest.raises(LookupError):
        next(iter(loader))
    state = loader.state_dict()
    assert (state["epoch"]["batches"], state["epoch"]["landmark"]["batch"]) == (0, 0)
    resumed = DataLoader(Anything(LENGTH), sampler=CountsEpochs())
    resumed.sampler.epochs = epochs
    resumed.load_state_dict(state)
    if epochs:
        with pytest.raises(BadInputError, match="CountsEpochs"):
            iter(resumed)
    else:
        assert len(list(resumed)) == LENGTH


class Refills(Sampler):
    """Yields the same lists again and again, with other numbers in them."""

    def __init__(self, num_lists):
        self.lists = [[] for _ in range(num_lists)]

    def __len__(self):
        return LENGTH // 4

    def __iter__(self):
        for number, one in zip(range(len(self)), itertools.cycle(self.lists), strict=False):
            one[:] = range(number * 4, number * 4 + 4)
            yield one


@pytest.mark.parametrize("num_lists", [1, 2])
def test_a_sampler_that_refills_its_lists_is_not_accused(num_lists):
    def open_loader():
        return DataLoader(Numbers(LENGTH), batch_sampler=Refills(num_lists))

    for steps in (1, 2, 3, 4, 5):
        loader, resumed = open_loader(), open_loader()
        iterator = iter(loader)
        for _ in range(steps):
            next(iterator)
        resumed.load_state_dict(loader.state_dict())
        assert [batch.flatten().tolist() for batch in resumed] == [batch.flatten().tolist() for batch in iterator]


class Sorting(Numbers):
    """Sorts the list that it is given, to read in the order of a file."""

    def __getitems__(self, indices):
        indices.sort()
        return [self[index] for index in indices]


def test_a_dataset_that_sorts_its_indices_is_not_accused():
    def open_loader():
        generator = torch.Generator().manual_seed(1)
        return DataLoader(Sorting(LENGTH), batch_size=6, shuffle=True, generator=generator)

    loader, resumed = open_loader(), open_loader()
    iterator = iter(loader)
    next(iterator)
    resumed.load_state_dict(loader.state_dict())
    assert torch.equal(torch.cat(list(resumed)), torch.cat(list(iterator)))


@pytest.mark.parametrize("chain", [1, 3])
def test_a_loaded_state_is_handed_on_with_its_landmark(chain):
    state = stopped(open_loader("sampler"))
    handed_on = state
    for _ in range(chain):
        loader = pickle.loads(pickle.dumps(open_loader("sampler")))
        loader.load_state_dict(handed_on)
        handed_on = pickle.loads(pickle.dumps(loader)).state_dict()
    assert handed_on == state


class Slices(Sampler):
    """Yields what cannot be pickled."""

    def __len__(self):
        return 6

    def __iter__(self):
        return (iter(range(first, first + 4)) for first in range(0, LENGTH, 4))


class Takes(Numbers):
    def __getitem__(self, index):
        return list(index)


def test_an_index_without_a_digest_is_not_compared_and_does_not_hinder_a_copy():
    def open_loader():
        return DataLoader(Takes(LENGTH), batch_size=None, sampler=Slices())

    loader, resumed = open_loader(), open_loader()
    next(iter(loader))
    state = pickle.loads(pickle.dumps(loader)).state_dict()
    assert "landmark" not in state["epoch"]
    resumed.load_state_dict(state)
    assert len(list(resumed)) == 5


def test_no_digest_is_made_while_batches_are_handed_out(monkeypatch):
    made = []
    monkeypatch.setattr(landmark, "digest_index", lambda index: made.append(index) or "00" * 8)
    loader = open_loader("sampler")
    iterator = iter(loader)
    for _ in range(4):
        next(iterator)
    assert made == []
    loader.state_dict()
    assert len(made) == 1


def test_the_state_stays_small():
    state = stopped(DataLoader(range(10**5), batch_size=10**4, sampler=range(10**5)), epochs=0)
    assert len(json.dumps(state)) < 500


# --- going on

ORDER = [7, 5, 6, 4]


@pytest.mark.parametrize("number", range(5))
def test_behind_any_batch_comes_what_follows_it_and_no_more_is_drawn_at_once_but_a_first_one(number):
    for mark in (None, *(Landmark.of(place, ORDER[place]) for place in range(min(number + 1, 4)))):
        drawn = []
        rest, is_same = advanced((drawn.append(index) or index for index in ORDER), number, mark)
        assert drawn == ORDER[: max(number, 1 + (mark.batch if mark else 0))]
        assert (list(rest), is_same) == (ORDER[number:], True)


@pytest.mark.parametrize("mark", [Landmark.of(1, 7), Landmark.of(4, 5)], ids=["another", "behind the end"])
def test_a_landmark_that_is_not_there_is_noticed(mark):
    _, is_same = advanced(iter(ORDER), 4, mark)
    assert is_same is False


def test_an_order_that_ends_before_the_place_is_refused():
    with pytest.raises(BadInputError, match="comes after batch 5 of an epoch that has fewer"):
        advanced(iter(ORDER), 5, None)


@pytest.mark.parametrize("batch", [0, 3])
def test_a_saved_landmark_is_the_same_when_it_is_loaded(batch):
    mark = Landmark.of(batch, 7)
    assert Landmark.from_dict(json.loads(json.dumps(mark.as_dict())), batches=3) == mark


@pytest.mark.parametrize("damage", [{"batch": -1}, {"batch": 4}, {"digest": "00" * 7}, {"digest": "00" * 9}], ids=str)
def test_a_damaged_landmark_is_refused(damage):
    with pytest.raises(ValueError, match="out of range"):
        Landmark.from_dict({"batch": 3, "digest": "00" * 8} | damage, batches=3)


# --- digests

INDICES = st.recursive(
    st.integers() | st.text() | st.binary() | st.none() | st.booleans() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(INDICES)
def test_an_index_has_the_same_digest_when_it_is_made_again(index):
    assert digest_index(pickle.loads(pickle.dumps(index))) == digest_index(index) is not None


@given(st.lists(st.integers(-(2**62), 2**62), min_size=1), st.randoms(use_true_random=False))
def test_a_number_is_the_same_in_numpy_and_torch_and_the_order_of_a_list_does_not_count(numbers, order):
    shuffled = order.sample(numbers, len(numbers))
    assert len({*map(digest_index, (numbers, shuffled, np.array(numbers), torch.tensor(shuffled)))}) == 1
    assert len({*map(digest_index, (numbers[0], np.int64(numbers[0]), torch.tensor(numbers[0])))}) == 1


@given(st.lists(st.lists(st.integers(0, 30), max_size=5).map(sorted).map(tuple), unique=True, max_size=6))
def test_other_batches_have_other_digests(batches):
    assert len({digest_index(list(batch)) for batch in batches}) == len(batches)


@pytest.mark.parametrize(
    ("index", "other"),
    [((1, 2), (2, 1)), ((1, 2), [1, 2]), (1, "1"), ("a", b"a"), (["ab"], ["a", "b"]), (slice(1, 2), slice(2, 1)),
     ([[1, 2], [3]], [[1], [2, 3]]), ({"a": 1}, {"a": 2}), (None, 0), (1, [1]), (range(3), range(4))],
    ids=repr,
)  # fmt: skip
def test_unlike_indices_have_unlike_digests(index, other):
    assert digest_index(index) != digest_index(other)


def deep():
    inner = []
    inner.append(inner)
    return inner


def nested(wrap, levels):
    return functools.reduce(lambda inner, _: wrap(inner), range(levels), 1)


@pytest.mark.parametrize("wrap", [lambda inner: (inner,), lambda inner: [inner]], ids=["tuples", "lists"])
def test_eight_levels_are_too_deep_for_a_digest(wrap):
    assert digest_index(nested(wrap, 7)) is not None
    assert digest_index(nested(wrap, 8)) is None


@pytest.mark.parametrize("index", [object(), deep(), iter([1]), lambda: 1, [object()]], ids=lambda value: "")
def test_what_no_other_process_could_find_again_has_no_digest(index):
    assert digest_index(index) is None


@pytest.mark.parametrize(
    ("index", "digest"),
    [
        (7, "283a6b3a9638ea55"),
        ([3, 1, 2], "ca7520fca05daef9"),
        ((3, 1, 2), "b421005d8c83bb35"),
        ({"a": [1]}, "94b798b6bed98166"),
        (slice(1, 9, None), "6ace4e4806c761e9"),
        ([None, 0.5, "é", b"e", True], "b24e8ca41b4c3611"),
    ],
    ids=lambda value: "",
)
def test_digests_never_change_between_releases(index, digest):
    # A saved state holds one of these: with others, a resume of every foreign sampler would be refused.
    assert digest_index(index) == digest


def test_digests_are_those_of_every_process():
    program = "from dataflow.loaders.landmark import digest_index; print(digest_index(({'a', 'b', 'c'}, 'é', [3, 1])))"
    found = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True).stdout
    assert found.strip() == digest_index(({"a", "b", "c"}, "é", [3, 1]))


def open_rank(rank, num_replicas=2):
    sampler = DistributedSampler(range(LENGTH), num_replicas, rank)
    return DataLoader(Numbers(LENGTH), batch_size=8 // num_replicas, sampler=sampler)


def test_one_rank_of_torchs_distributed_sampler_saves_for_all():
    saver = open_rank(0)
    iterators = [iter(saver), iter(open_rank(1))]
    for iterator in iterators:
        next(iterator)
    state = saver.state_dict()
    for rank, iterator in enumerate(iterators):
        resumed = open_rank(rank)
        resumed.load_state_dict(state)
        going_on = iter(resumed)
        assert next(going_on).tolist() == next(iterator).tolist()
        again = open_rank(rank)
        again.load_state_dict(resumed.state_dict())  # what such a rank saves is its own
        assert [batch.tolist() for batch in again] == [batch.tolist() for batch in iterator]


def test_a_rank_that_takes_the_state_of_another_still_compares_its_own_batches():
    iterator = iter(saver := open_rank(0))
    next(iterator)
    resumed = open_rank(1)
    resumed.load_state_dict(saver.state_dict())
    next(iter(resumed))
    changed = open_rank(1)
    changed.load_state_dict(resumed.state_dict())
    changed.sampler.seed = 5
    with pytest.raises(BadInputError, match="DistributedSampler draws other batches"):
        iter(changed)


def test_an_epoch_that_was_dealt_to_another_number_of_ranks_is_refused():
    iterator = iter(saver := open_rank(0, 2))
    next(iterator)
    state = saver.state_dict()
    changed = open_rank(0, 4)
    state |= {"batch_size": changed.batch_size, "length": len(changed)}
    with pytest.raises(BadInputError, match=r"dealt to 2 ranks and this loader's deals it to 4.*ElasticBatchSampler"):
        changed.load_state_dict(state)
