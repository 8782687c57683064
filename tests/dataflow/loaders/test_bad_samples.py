"""Samples that cannot be read: the same batches on every rank, with any workers and after a resume; no step lost."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from connectors.errors import BadInputError, CorruptError, ThrottledError
from dataflow.loaders import BadSamples, DataLoader, ElasticBatchSampler
from dataflow.loaders.bad_samples import BadSample, Rejects, Sieve
from dataflow.loaders.testing import Failing, Numbers, Stream, WholeBatches

BAD = {3, 8, 9, 21}


def failing(length=24, bad=BAD):
    return Failing(length, {number: ValueError(f"no. {number}") for number in bad})


def batches_of(loader):
    return [batch[:, 0].tolist() for batch in loader]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipped_samples_shorten_their_batches_and_cost_no_step(num_workers):
    loader = DataLoader(failing(), batch_size=4, num_workers=num_workers, bad_samples=BadSamples("skip"))
    assert batches_of(loader) == [
        [number for number in range(first, first + 4) if number not in BAD] for first in range(0, 24, 4)
    ]
    assert loader.stats().counts["samples.bad"] == 4


def test_substitutes_are_good_samples_and_the_same_wherever_they_are_chosen():
    epochs = [
        batches_of(DataLoader(failing(), batch_size=4, num_workers=workers, bad_samples=BadSamples("substitute")))
        for workers in (0, 1, 2)
    ]
    assert epochs[0] == epochs[1] == epochs[2]
    samples = [number for batch in epochs[0] for number in batch]
    assert [len(batch) for batch in epochs[0]] == [4] * 6
    assert [number for place, number in enumerate(samples) if place not in BAD] == sorted(set(range(24)) - BAD)
    assert not BAD & set(samples)


def test_samples_without_a_batch_have_substitutes_too():
    loader = DataLoader(failing(), batch_size=None, bad_samples=BadSamples("substitute"))
    samples = [int(sample) for sample in loader]
    assert len(samples) == 24
    assert not BAD & set(samples)


@pytest.mark.parametrize("action", ["skip", "substitute"])
def test_ranks_have_equal_steps_and_together_what_one_rank_has(action):
    def steps(rank, world_size):
        dataset = failing(32)
        sampler = ElasticBatchSampler(dataset, 8, seed=5, shuffle="full", rank=rank, world_size=world_size)
        return batches_of(DataLoader(dataset, batch_sampler=sampler, bad_samples=BadSamples(action)))

    alone, halves = steps(0, 1), [steps(0, 2), steps(1, 2)]
    assert [len(half) for half in halves] == [len(alone)] * 2
    assert [sorted(left + right) for left, right in zip(*halves, strict=True)] == [sorted(batch) for batch in alone]


def test_a_resumed_loader_goes_on_with_the_same_batches_and_the_same_budget():
    def open_loader(budget=10):
        return DataLoader(failing(), batch_size=4, num_workers=1, bad_samples=BadSamples("substitute", budget))

    whole = batches_of(open_loader())
    loader = open_loader()
    iterator = iter(loader)
    first = [next(iterator)[:, 0].tolist() for _ in range(3)]
    state = json.loads(json.dumps(loader.state_dict()))
    assert state["bad_samples"] == [3, 8, 9]
    resumed = open_loader()
    resumed.load_state_dict(state)
    assert first + batches_of(resumed) == whole
    tight = open_loader(budget=3)
    tight.load_state_dict(state)
    with pytest.raises(CorruptError, match=r"4 samples are bad and the budget is 3: sample 21 .*ValueError: no. 21"):
        batches_of(tight)


def test_a_sample_counts_once_however_many_epochs_read_it():
    loader = DataLoader(failing(), batch_size=4, bad_samples=BadSamples("skip", budget=4))
    assert batches_of(loader) == batches_of(loader)
    assert loader.stats().counts["samples.bad"] == 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_bad_sample_more_than_the_budget_is_an_error_at_its_batch(num_workers):
    loader = DataLoader(failing(), batch_size=4, num_workers=num_workers, bad_samples=BadSamples("skip", budget=1))
    iterator = iter(loader)
    assert [next(iterator)[:, 0].tolist() for _ in range(2)] == [[0, 1, 2], [4, 5, 6, 7]]
    with pytest.raises(CorruptError, match="3 samples are bad and the budget is 1"):
        next(iterator)
    assert next(iterator)[:, 0].tolist() == [12, 13, 14, 15]


def test_the_quarantine_says_what_was_wrong_with_each_sample(tmp_path):
    folder = tmp_path / "bad"
    for _ in range(2):
        batches_of(DataLoader(failing(), batch_size=4, bad_samples=BadSamples("skip", quarantine=folder)))
    found = [json.loads(file.read_text()) for file in sorted(folder.iterdir())]
    assert sorted((entry["sample"], entry["error"]) for entry in found) == [
        (number, f"ValueError: no. {number}") for number in sorted(BAD)
    ]


def test_the_quarantine_has_the_notes_of_an_exception(tmp_path):
    error = ValueError("no")
    error.add_note("in a transform of sample 2")
    batches_of(DataLoader(Failing(4, {2: error}), batch_size=4, bad_samples=BadSamples("skip", quarantine=tmp_path)))
    assert json.loads((tmp_path / "2.json").read_text())["error"] == "ValueError: no; in a transform of sample 2"


def test_a_sample_that_is_named_by_text_leaves_its_file_in_the_quarantine_itself(tmp_path):
    folder = tmp_path / "bad"
    Rejects(BadSamples("skip", quarantine=folder)).add([BadSample("../a/b", "torn")])
    (file,) = folder.iterdir()
    assert json.loads(file.read_text()) == {"sample": "../a/b", "error": "torn"}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_budget_of_nothing_makes_the_first_bad_sample_an_error():
    loader = DataLoader(failing(), batch_size=4, bad_samples=BadSamples("skip", budget=0))
    with pytest.raises(CorruptError, match=r"1 samples are bad and the budget is 0: sample 3 "):
        next(iter(loader))


def test_a_batch_of_bad_samples_only_is_the_error_of_a_sample():
    loader = DataLoader(failing(8, {4, 5, 6, 7}), batch_size=4, bad_samples=BadSamples("skip"))
    with pytest.raises(ValueError, match=r"no\. 4"):
        batches_of(loader)


def test_a_data_set_without_a_good_sample_is_the_error_of_a_sample():
    loader = DataLoader(failing(8, set(range(8))), batch_size=4, bad_samples=BadSamples("substitute"))
    with pytest.raises(ValueError, match=r"no\. 0"):
        batches_of(loader)


@pytest.mark.parametrize("others", [{}, {1: ValueError()}], ids=["in the batch", "behind a bad sample"])
@pytest.mark.parametrize("error", [ThrottledError("slow down"), MemoryError()], ids=["store", "memory"])
@pytest.mark.parametrize(("batch_size", "action"), [(4, "skip"), (None, "substitute")])
def test_a_sample_is_not_blamed_for_the_store_or_the_machine(error, others, batch_size, action):
    loader = DataLoader(Failing(8, {2: error} | others), batch_size=batch_size, bad_samples=BadSamples(action))
    with pytest.raises(type(error)):
        list(loader)


@pytest.mark.parametrize(("batch_size", "action"), [(4, "skip"), (None, "substitute")])
def test_a_sample_is_not_blamed_for_the_collate_function(batch_size, action):
    def collate(samples):
        raise ZeroDivisionError

    loader = DataLoader(Numbers(8), batch_size, collate_fn=collate, bad_samples=BadSamples(action))
    with pytest.raises(ZeroDivisionError):
        list(loader)


class FailingBatches(WholeBatches):
    """Batches that cannot be read where one of their samples cannot."""

    def __getitems__(self, indices):
        if BAD & set(indices):
            raise CorruptError(f"{sorted(BAD & set(indices))} is damaged")
        return super().__getitems__(indices)


def test_datasets_that_read_whole_batches_are_asked_for_single_samples():
    loader = DataLoader(FailingBatches(12), batch_size=4, bad_samples=BadSamples("skip"))
    assert [batch.tolist() for batch in loader] == [
        [[number, sum(other not in BAD for other in range(first, first + 4))] for number in range(first, first + 4)
         if number not in BAD]
        for first in (0, 4, 8)
    ]  # fmt: skip


@given(st.sets(st.integers(0, 30)), st.lists(st.integers(0, 30), min_size=1, max_size=12))
def test_what_is_skipped_is_what_fails_and_the_order_stays(bad, items):
    def probe(item):
        if item in bad:
            raise CorruptError(str(item))

    def make(items):
        for item in items:
            probe(item)
        return list(items)

    good = [item for item in items if item not in bad]
    sieve = Sieve(BadSamples("skip"), make=make, probe=probe, num_samples=31)
    if good:
        assert sieve.make_batch(items) == good
    else:
        with pytest.raises(CorruptError):
            sieve.make_batch(items)
    assert [found.sample for found in sieve.take_found()] == [item for item in items if item in bad]


class Slices(Numbers):
    def __getitems__(self, batch):
        raise ValueError(f"{batch.start} to {batch.stop}")


def test_a_batch_that_does_not_name_its_samples_is_its_own_error():
    with pytest.raises(ValueError, match="0 to 4"):
        next(iter(DataLoader(Slices(8), batch_sampler=[slice(0, 4)], bad_samples=BadSamples("skip"))))


class Endless:
    """A dataset without a length, whose samples a sampler knows."""

    def __getitem__(self, index):
        if index in BAD:
            raise ValueError(index)
        return torch.tensor([index])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_samples_of_a_dataset_without_a_length_are_skipped_and_have_no_substitute(num_workers):
    options = {"batch_size": 4, "sampler": range(2, 10), "num_workers": num_workers}
    loader = DataLoader(Endless(), bad_samples=BadSamples("skip"), **options)
    assert batches_of(loader) == [[2, 4, 5], [6, 7]]
    with pytest.raises(BadInputError, match="dataset has no length"):
        DataLoader(Endless(), bad_samples=BadSamples("substitute"), **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BadSamples("ignore"), "action must be"),
        (lambda: BadSamples("skip", budget=-1), "budget must be"),
        (lambda: DataLoader(Stream(4), bad_samples=BadSamples("skip")), "map-style"),
        (lambda: DataLoader(Numbers(4), batch_size=None, bad_samples=BadSamples("skip")), "substitute"),
    ],
    ids=["action", "budget", "stream", "no batches"],
)
def test_policies_that_cannot_be_followed_are_refused(make, message):
    with pytest.raises(BadInputError, match=message):
        make()


def test_packs_can_be_skipped_and_have_no_substitute():
    class Packs(Numbers):
        def __getitem__(self, numbers):
            if 3 in numbers:
                raise CorruptError("3")
            return torch.tensor(numbers)

    packs = [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert [batch.tolist() for batch in DataLoader(Packs(8), batch_sampler=packs, bad_samples=BadSamples("skip"))] == [
        [[0, 1]],
        [[4, 5], [6, 7]],
    ]
    with pytest.raises(BadInputError, match=r"\[2, 3\] is no sample number"):
        next(iter(DataLoader(Packs(8), batch_sampler=packs, bad_samples=BadSamples("substitute"))))
