"""Datasets that say where they are go on there, told as torchdata's StatefulDataLoader tells them."""

import copy
import itertools
import json

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from dataflow.loaders import DataLoader
from dataflow.loaders.collate import Fetch
from dataflow.loaders.dataset_state import is_state, take_state
from dataflow.loaders.recycling import Recycler
from dataflow.loaders.testing import Numbers, Stream

WAYS = {
    "inline": {},
    "processes": {"num_workers": 2},
    "persistent": {"num_workers": 2, "persistent_workers": True},
    "thread": {"num_workers": 1, "workers": "thread"},
}
WAYS_WITH_A_COPY = {name: options for name, options in WAYS.items() if name != "thread"}


def stopped(loader, steps=3):
    """Return a loader's state after some steps, as a file keeps it, and what was left of the epoch."""
    iterator = iter(loader)
    for _ in range(steps):
        next(iterator)
    state = json.loads(json.dumps(loader.state_dict()))
    return state, [batch.tolist() for batch in iterator]


def rest_of(loader, state):
    loader.load_state_dict(state)
    return [batch.tolist() for batch in loader]


def first_and_step():
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


class Counted(Numbers):
    """Numbers that keep how many were read."""

    def state_dict(self):
        return {"read": 0}

    def load_state_dict(self, state):
        raise AssertionError


class Restarting(IterableDataset):
    """Its own iterator: each `iter()` begins anew, and there is no place before the first."""

    def __init__(self, length):
        self.length = length

    def __iter__(self):
        self.place, self.step = first_and_step()
        return self

    def __next__(self):
        if self.place >= self.length:
            raise StopIteration
        self.place += self.step
        return torch.tensor([self.place - self.step])

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        assert self.step
        self.place = state["place"]


class Walk:
    """An iterator that says where it is, and how often it was read."""

    def __init__(self, length, place, step):
        self.length, self.place, self.step = length, place, step
        self.reads = 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.place >= self.length:
            raise StopIteration
        self.place += self.step
        self.reads += 1
        return torch.tensor([self.place - self.step, self.reads])

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


class Walked(IterableDataset):
    """A stream that leaves its place to its iterators, and has a state beside it."""

    told = None

    def __init__(self, length):
        self.length = length

    def __iter__(self):
        return Walk(self.length, *first_and_step())

    def state_dict(self):
        return {"told": "yes"}

    def load_state_dict(self, state):
        self.told = state["told"]


class Lap(Stream):
    """A stream that begins anew behind its end, and keeps its place itself."""

    place = None

    def __iter__(self):
        first, step = first_and_step()
        self.place = first if self.place is None else self.place
        while self.place < self.length:
            self.place += step
            yield torch.tensor([self.place - step])
        self.place = None

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def fetch_of(dataset):
    loader = DataLoader(dataset)
    options = {"collate_fn": list, "drop_last": False, "epoch": 0, "bad_samples": None, "may_join": False}
    return Fetch(loader._dataset_kind, dataset, auto_collation=True, memory=Recycler(), **options)


def state_of(dataset, asked=()):
    fetch = fetch_of(dataset)
    for samples in asked:
        fetch([None] * samples)
    return take_state(dataset, fetch)


def test_what_can_be_taken_of_datasets_and_iterators_is_a_state_and_nothing_else():
    taken = [
        state_of(Numbers(4)),
        state_of(Counted(4)),
        state_of(Trail(4)),
        state_of(Walked(4)),
        state_of(Restarting(4)),
        state_of(Restarting(4), asked=[4]),
        state_of(Restarting(4), asked=[3, 3]),
        state_of(Stream(4), asked=[5]),
    ]
    assert taken == [
        None,
        {"dataset": {"read": 0}},
        {"dataset": {"seen": []}},
        {"dataset": {"told": "yes"}, "iterator": {"place": 0}},
        {"iterator": {"place": 0}},
        {"iterator": {"place": 4}},
        {"iterator": {"place": 4}, "ended": True},
        None,
    ]
    assert all(map(is_state, taken))
    assert not any(map(is_state, [{}, {"ended": True}, {"dataset": 1, "place": 2}, {"place": 0}, ["dataset"], "x", 0]))


@pytest.mark.parametrize("way", WAYS)
def test_a_stream_that_begins_anew_behind_its_end_is_not_read_again_in_the_epoch_that_it_has_ended(way):
    state, rest = stopped(DataLoader(Lap(9), batch_size=2, **WAYS[way]), steps=5)
    loader = DataLoader(Lap(9), batch_size=2, **WAYS[way])
    assert rest_of(loader, state) == rest == []
    assert len(list(loader)) == 5


@pytest.mark.parametrize("way", WAYS)
def test_a_stream_that_is_its_own_iterator_is_told_when_it_has_begun(way):
    state, rest = stopped(DataLoader(Restarting(30), batch_size=2, **WAYS[way]))
    assert rest_of(DataLoader(Restarting(30), batch_size=2, **WAYS[way]), state) == rest
    assert max(number for batch in rest for (number,) in batch) == 29


@pytest.mark.parametrize("way", WAYS)
def test_an_iterator_that_says_where_it_is_reads_nothing_again(way):
    state, rest = stopped(DataLoader(Walked(32), batch_size=2, **WAYS[way]))
    resumed = rest_of(DataLoader(Walked(32), batch_size=2, **WAYS[way]), state)
    assert [[sample[0] for sample in batch] for batch in resumed] == [[sample[0] for sample in batch] for batch in rest]
    assert resumed[0][0][1] == 1  # its first read


def test_a_stream_with_both_states_is_told_both():
    state, _ = stopped(DataLoader(Walked(32), batch_size=2))
    dataset = Walked(32)
    rest_of(DataLoader(dataset, batch_size=2), state)
    assert dataset.told == "yes"


class Trail(IterableDataset):
    """Its state is the very list that it goes on with."""

    def __init__(self, length):
        self.length = length
        self.seen = []

    def __iter__(self):
        while len(self.seen) < self.length:
            self.seen.append(len(self.seen))
            yield torch.tensor([self.seen[-1]])

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"num_workers": 1, "workers": "thread"}], ids=str)
def test_a_state_that_the_dataset_goes_on_with_is_that_of_its_batch(options):
    loader = DataLoader(Trail(12), batch_size=2, **options)
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    assert len(list(iterator)) == 5
    assert state["epoch"]["shard_states"] == [{"dataset": {"seen": [0, 1]}}]
    assert rest_of(DataLoader(Trail(12), batch_size=2, **options), state) == [[[k], [k + 1]] for k in range(2, 12, 2)]


class Noise(Dataset):
    """Adds noise from the process's generator, of which it keeps the state."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.tensor(float(index)) + torch.rand(()) / 2

    def state_dict(self):
        return {"generator": torch.get_rng_state().tolist()}

    def load_state_dict(self, state):
        torch.set_rng_state(torch.tensor(state["generator"], dtype=torch.uint8))


def open_noise(options):
    return DataLoader(Noise(), 4, shuffle=True, generator=torch.Generator().manual_seed(2), **options)


@pytest.mark.parametrize("way", WAYS_WITH_A_COPY)
def test_what_a_map_style_dataset_keeps_goes_on_in_each_worker(way):
    state, rest = stopped(open_noise(WAYS[way]))
    torch.manual_seed(77)
    loader = open_noise(WAYS[way])
    assert rest_of(loader, state) == rest
    assert rest_of(loader, state) == rest  # also where the workers are there already


class Counting(Numbers):
    """Counts its samples."""

    count = 0

    def __getitem__(self, index):
        self.count += 1
        return torch.tensor(self.count)

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


@pytest.mark.parametrize("epochs", [0, 1])
def test_what_a_map_style_dataset_keeps_is_part_of_a_state_between_epochs_without_workers(epochs):
    loader = DataLoader(Counting(4), batch_size=2)
    for _ in range(epochs):
        list(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = DataLoader(Counting(4), batch_size=2)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert [batch.tolist() for batch in resumed] == [batch.tolist() for batch in loader]
    with_a_worker = DataLoader(Counting(4), batch_size=2, num_workers=1)
    with_a_worker.load_state_dict(state)
    assert [batch.tolist() for batch in with_a_worker] == [[1, 2], [3, 4]]


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"num_workers": 2, "workers": "thread"}], ids=str)
def test_with_other_workers_its_samples_go_on_and_a_warning_says_what_does_not(options, caplog):
    state, rest = stopped(open_noise({"num_workers": 2}))
    resumed = rest_of(open_noise(options), state)
    assert [list(map(int, batch)) for batch in resumed] == [list(map(int, batch)) for batch in rest]
    (warning,) = [record.getMessage() for record in caplog.records if "starts over" in record.getMessage()]
    assert warning.startswith("the state of Noise was kept by 2 workers")


class Silent(Numbers):
    """Cannot say what it keeps."""

    def state_dict(self):
        raise LookupError("it is not known yet")

    def load_state_dict(self, state):
        raise AssertionError


@pytest.mark.parametrize("way", WAYS_WITH_A_COPY)
def test_a_map_style_dataset_that_cannot_say_what_it_keeps_can_be_read_but_not_resumed(way):
    loader = DataLoader(Silent(8), batch_size=2, **WAYS[way])
    iterator = iter(loader)
    batches = [next(iterator)]
    with pytest.raises(LookupError, match="it is not known yet"):
        loader.state_dict()
    batches += iterator
    assert [batch[:, 0].tolist() for batch in batches] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert len(list(loader)) == 4


def test_threads_that_share_a_dataset_do_not_ask_it():
    loader = DataLoader(Silent(8), batch_size=2, num_workers=2, workers="thread")
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    assert "shards" not in state["epoch"]
    resumed = DataLoader(Silent(8), batch_size=2, num_workers=2, workers="thread")
    resumed.load_state_dict(state)
    assert len(list(resumed)) == 3


def test_a_worker_that_dies_is_followed_by_one_that_is_told():
    whole = [
        batch.tolist() for batch in DataLoader(Noise(), 4, num_workers=1, generator=torch.Generator().manual_seed(3))
    ]
    loader = DataLoader(Noise(), 4, num_workers=1, generator=torch.Generator().manual_seed(3))
    iterator = iter(loader)
    batches = [next(iterator).tolist()]
    iterator._workers[0].kill()
    batches += [batch.tolist() for batch in iterator]
    assert batches == whole


class Asking(Numbers):
    """A dataset whose state is another protocol's."""

    def state_dict(self, num_samples, from_beginning):
        raise AssertionError

    def load_state_dict(self, state):
        raise AssertionError


class Telling(Numbers):
    """A dataset that nobody can tell where it was."""

    def state_dict(self):
        raise AssertionError


class Module(torch.nn.Module, Dataset):
    """A dataset that is a module: its state are its parameters."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return index

    def load_state_dict(self, *arguments):
        raise AssertionError


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("dataset", [Asking(20), Telling(20), Module()], ids=["asking", "telling", "module"])
def test_a_map_style_dataset_whose_state_is_no_place_is_not_asked(dataset, options):
    state, rest = stopped(DataLoader(dataset, batch_size=2, **options))
    assert "shard_states" not in state["epoch"]
    assert rest_of(DataLoader(dataset, batch_size=2, **options), state) == rest


class Laps(IterableDataset):
    """Counts its epochs, which have other samples each, as streams written for torchdata do; or stays at its end."""

    def __init__(self, length, *, begins_anew):
        self.length = length
        self.begins_anew = begins_anew
        self.lap = self.place = 0
        self.told = None

    def __iter__(self):
        info = get_worker_info()
        first = 0 if info is None else 100 * info.id
        self.place, self.told = self.told or 0, None
        while self.place < self.length:
            self.place += 1
            yield torch.tensor([first + self.place - 1, self.lap])
        if self.begins_anew:
            self.lap, self.place = self.lap + 1, 0

    def state_dict(self):
        return {"lap": self.lap, "place": self.place}

    def load_state_dict(self, state):
        self.lap, self.told = state["lap"], state["place"]


class Circling(Laps):
    """The same, as its own iterator."""

    def __iter__(self):
        self.walk = super().__iter__()
        return self

    def __next__(self):
        return next(self.walk)

    def __getstate__(self):
        return {**self.__dict__, "walk": None}


class Sticking(Laps):
    """The same, which begins every epoch where it was told last."""

    def __iter__(self):
        told = self.told
        yield from super().__iter__()
        self.told = told


WAYS_THAT_LAST = {
    "inline": {},
    "thread": {"num_workers": 2, "workers": "thread"},
    "processes": {"num_workers": 2, "persistent_workers": True},
}


@pytest.mark.parametrize("way", WAYS_THAT_LAST)
@pytest.mark.parametrize("begins_anew", [True, False])
@pytest.mark.parametrize("kind", [Laps, Circling, Sticking])
def test_what_a_stream_keeps_goes_on_from_epoch_to_epoch(kind, begins_anew, way):
    def load():
        return DataLoader(kind(9, begins_anew=begins_anew), batch_size=2, **WAYS_THAT_LAST[way])

    def epoch(loader):
        return [batch.tolist() for batch in loader]

    loader = load()
    assert "datasets" not in loader.state_dict()  # it has nothing to say before it is read
    epochs = [epoch(loader)]
    state = json.loads(json.dumps(loader.state_dict()))
    epochs += [epoch(loader) for _ in range(2)]
    assert (epochs[0] != epochs[1] != epochs[2]) == begins_anew
    resumed = load()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert epoch(copy.deepcopy(resumed)) == epochs[1]
    assert [epoch(resumed), epoch(resumed)] == epochs[1:]
    again = json.loads(json.dumps(resumed.state_dict()))
    copied = copy.deepcopy(resumed)
    assert epoch(loader) == epoch(resumed) == epoch(copied) == rest_of(load(), again)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_workers": 1, "persistent_workers": True}, {"num_workers": 1, "workers": "thread"}],
    ids=["inline", "process", "thread"],
)
def test_a_stream_in_its_second_epoch_is_told_of_the_first(options):
    def load():
        return DataLoader(Laps(9, begins_anew=True), batch_size=2, **options)

    loader = load()
    list(loader)
    iterator = iter(loader)
    states, batches = [loader.state_dict()], []
    for batch in iterator:
        batches.append(batch.tolist())
        states.append(json.loads(json.dumps(loader.state_dict())))
    assert len(states) == 6
    for done, state in enumerate(states[:-1]):
        assert rest_of(load(), state) == batches[done:]


class Rising(Laps):
    """Counts its epochs when they begin, and stays at its end."""

    def __iter__(self):
        self.lap += self.told is None
        yield from super().__iter__()


@pytest.mark.parametrize("way", WAYS_THAT_LAST)
def test_a_stream_that_has_nothing_where_it_ended_is_iterated_once_more(way):
    def load():
        return DataLoader(Rising(9, begins_anew=False), batch_size=2, **WAYS_THAT_LAST[way])

    loader = load()
    first = [batch.tolist() for batch in loader]
    state = loader.state_dict()
    assert rest_of(load(), state) == [batch.tolist() for batch in loader] != first


class Untold(Laps):
    def load_state_dict(self, state):
        raise AssertionError


@pytest.mark.parametrize("way", WAYS_THAT_LAST)
def test_a_stream_that_goes_on_by_itself_is_told_nothing(way):
    loader = DataLoader(Untold(9, begins_anew=True), batch_size=2, **WAYS_THAT_LAST[way])
    assert len({str([batch.tolist() for batch in loader]) for _ in range(3)}) == 3


@pytest.mark.parametrize("way", WAYS_THAT_LAST)
def test_a_stream_that_was_left_in_its_second_epoch_is_read_from_the_beginning(way):
    def load():
        return DataLoader(Laps(9, begins_anew=True), batch_size=2, **WAYS_THAT_LAST[way])

    loader = load()
    whole = len(list(loader))
    next(iter(loader))
    iter(loader)
    assert len(rest_of(load(), loader.state_dict())) == whole


def test_a_stream_that_ends_with_its_workers_begins_as_it_is():
    def load():
        return DataLoader(Laps(9, begins_anew=True), batch_size=2, num_workers=1)

    loader = load()
    first = [batch.tolist() for batch in loader]
    state = loader.state_dict()
    assert "datasets" not in state
    assert [batch.tolist() for batch in loader] == rest_of(load(), state) == first


class Seeded(Numbers):
    """Draws from a generator of its own."""

    def __init__(self, length):
        super().__init__(length)
        self.generator = torch.Generator().manual_seed(5)

    def __getitem__(self, index):
        return torch.rand((), generator=self.generator)

    def state_dict(self):
        return {"generator": self.generator.get_state().tolist()}

    def load_state_dict(self, state):
        self.generator.set_state(torch.tensor(state["generator"], dtype=torch.uint8))


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_what_a_map_style_dataset_keeps_goes_on_in_workers_that_stay(steps):
    def load():
        return DataLoader(Seeded(12), 4, num_workers=2, persistent_workers=True)

    loader = load()
    list(loader)
    iterator = iter(loader) if steps else iter(())
    for _ in range(steps):
        next(iterator)
    state = json.loads(json.dumps(loader.state_dict()))
    rest = [batch.tolist() for batch in itertools.chain(iterator, loader)]
    resumed = load()
    assert rest_of(resumed, state) + [batch.tolist() for _ in range(steps in (1, 2)) for batch in resumed] == rest


def test_a_worker_that_dies_between_epochs_is_followed_by_one_that_is_told():
    loader, undisturbed = (
        DataLoader(Laps(9, begins_anew=True), batch_size=2, num_workers=1, persistent_workers=True) for _ in range(2)
    )
    for _ in range(2):
        assert [batch.tolist() for batch in loader] == [batch.tolist() for batch in undisturbed]
        loader._iterator._workers[0].kill()
        loader._iterator._workers[0].join()
