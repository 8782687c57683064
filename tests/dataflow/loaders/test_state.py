"""A loaded state goes on with the very batches that were to come, whatever the number of workers."""

import copy
import functools
import itertools
import json
import operator
import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.datapipes.iter import IterableWrapper

from connectors.errors import BadInputError, TransientError
from dataflow.loaders import DataLoader, ElasticBatchSampler
from dataflow.loaders.generators import GeneratorStates
from dataflow.loaders.state import Progress
from dataflow.loaders.testing import Counter, Draws, Noisy, Numbers, Stream
from dataflow.transforms import TransformedDataset

LENGTH = 40


class GlobalShuffle(Sampler):
    """What users write: an order drawn from the global generators when iteration begins."""

    def __init__(self, source, draw):
        self.source = source
        self.draw = draw

    def __len__(self):
        return len(self.source)

    def __iter__(self):
        return iter(self.draw(len(self.source)))


def draw_by_python(length):
    return random.sample(range(length), length)


def draw_by_numpy(length):
    return np.random.permutation(length).tolist()


def draw_by_torch(length):
    return torch.randperm(length).tolist()


class Walk(Sampler):
    """A stateful sampler whose epochs depend on each other."""

    def __init__(self, source):
        self.source = source
        self.stride = 1

    def __len__(self):
        return len(self.source)

    def __iter__(self):
        self.stride += 2
        for step in range(len(self.source)):
            yield step * self.stride % len(self.source)

    def state_dict(self):
        return {"stride": self.stride}

    def load_state_dict(self, state):
        self.stride = state["stride"]


class EagerBatches(Sampler):
    """A batch sampler that draws its order from its own generator as soon as it is iterated."""

    def __init__(self, source):
        self.source = source
        self.generator = torch.Generator().manual_seed(4)

    def __len__(self):
        return len(self.source) // 4

    def __iter__(self):
        return iter(torch.randperm(len(self.source), generator=self.generator).reshape(-1, 4).tolist())


def own_generator():
    return torch.Generator().manual_seed(9)


WAYS = {
    "sequential": lambda data: {"batch_size": 3},
    "drop last": lambda data: {"batch_size": 3, "drop_last": True},
    "no batches": lambda data: {"batch_size": None},
    "shuffle": lambda data: {"batch_size": 3, "shuffle": True},
    "shuffle by generator": lambda data: {"batch_size": 3, "shuffle": True, "generator": own_generator()},
    "replacement": lambda data: {"batch_size": 3, "sampler": RandomSampler(data, True, 50, own_generator())},
    "subset": lambda data: {"sampler": SubsetRandomSampler(range(0, LENGTH, 2))},
    "weighted": lambda data: {"batch_size": 3, "sampler": WeightedRandomSampler([1.0, 2.0] * (LENGTH // 2), 30)},
    "distributed": lambda data: {"batch_size": 3, "sampler": DistributedSampler(data, 2, 1, seed=3)},
    "batch sampler": lambda data: {"batch_sampler": BatchSampler(SequentialSampler(data), 7, drop_last=False)},
    "a list": lambda data: {"batch_size": 3, "sampler": [5, 3, 1] * 9},
    "python": lambda data: {"batch_size": 3, "sampler": GlobalShuffle(data, draw_by_python)},
    "numpy": lambda data: {"batch_size": 3, "sampler": GlobalShuffle(data, draw_by_numpy)},
    "torch": lambda data: {"batch_size": None, "sampler": GlobalShuffle(data, draw_by_torch)},
    "stateful": lambda data: {"batch_size": 3, "sampler": Walk(data)},
    "eager": lambda data: {"batch_sampler": EagerBatches(data)},
    "elastic": lambda data: {"batch_sampler": ElasticBatchSampler(data, 6, rank=0, world_size=1)},
}
# The next epoch follows from the state alone, and not from what the process drew meanwhile.
SELF_CONTAINED = {
    "sequential",
    "drop last",
    "no batches",
    "shuffle by generator",
    "replacement",
    "distributed",
    "batch sampler",
    "a list",
    "stateful",
    "elastic",
}


def make(way, num_workers, **more):
    data = Numbers(LENGTH)
    return DataLoader(data, num_workers=num_workers, **WAYS[way](data), **more)


def seen(batches):
    return [batch.flatten().tolist() for batch in batches]


def disturb():
    """Leave the global generators anywhere."""
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(random.SystemRandom().randrange(1 << 30))


def through_json(state):
    return json.loads(json.dumps(state))


@pytest.mark.parametrize("workers", [(0, 2), (2, 0)], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_the_rest_of_the_epoch_and_the_next_are_as_undisturbed(way, workers):
    before, after = workers
    disturb()
    loader = make(way, before)
    iterator = iter(loader)
    head = seen(next(iterator) for _ in range(4))
    state = through_json(loader.state_dict())
    rest, following = seen(iterator), seen(loader)
    disturb()
    resumed = make(way, after)
    resumed.load_state_dict(state)
    assert seen(resumed) == rest
    assert head + rest != []
    if way in SELF_CONTAINED:
        assert seen(resumed) == following


@settings(max_examples=25)
@given(
    way=st.sampled_from(sorted(set(WAYS) - {"eager"})),
    stops=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    workers=st.lists(st.sampled_from([0, 0, 0, 0, 0, 2]), min_size=5, max_size=5),
)
def test_any_chain_of_resumes_sees_each_batch_once(way, stops, workers):
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    loader = make(way, workers[0])
    iterator, batches = iter(loader), []
    for stop, num_workers in zip(stops, workers[1:], strict=False):
        batches += seen(itertools.islice(iterator, stop))
        if loader._ledger.progress.is_over():
            return  # the next epoch is the caller's
        state = through_json(loader.state_dict())
        disturb()
        loader = make(way, num_workers)
        loader.load_state_dict(state)
        iterator = iter(loader)
    batches += seen(iterator)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    assert batches == seen(make(way, workers[0]))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("way", ["shuffle by generator", "elastic", "distributed"])
def test_states_before_at_the_end_of_and_between_epochs_begin_an_epoch(way, num_workers):
    loader = make(way, num_workers)
    states = [loader.state_dict()]
    epochs = [seen(loader)]
    states.append(loader.state_dict())
    iterator = iter(loader)
    epochs.append(seen(next(iterator) for _ in range(len(loader))))
    states.append(loader.state_dict())  # the last batch is handed out, the end not asked for
    with pytest.raises(StopIteration):
        next(iterator)
    states.append(loader.state_dict())
    epochs += [seen(loader)]
    expected = [epochs[0], epochs[1], epochs[2], epochs[2]]
    for state, epoch in zip(states, expected, strict=True):
        resumed = make(way, num_workers)
        resumed.load_state_dict(through_json(state))
        assert seen(resumed) == epoch


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_state_wanted_while_the_sampler_comes_to_its_end_begins_the_next_epoch(num_workers):
    states = []

    class Sampler(SequentialSampler):
        def __iter__(self):
            yield from range(4)
            states.append(loader.state_dict())  # as a signal handler does, if it comes now

    loader = DataLoader(Numbers(4), sampler=Sampler(range(4)), batch_size=2, num_workers=num_workers)
    iterator = iter(loader)
    assert len([next(iterator), next(iterator), *iterator]) == 2
    assert [state["epoch"] is None for state in states] == [num_workers == 0]


def test_a_state_counts_batches_handed_out_not_drawn_ahead():
    loader = make("sequential", 2, prefetch_factor=4)
    iterator = iter(loader)
    next(iterator)
    assert loader.state_dict()["epoch"]["batches"] == 1


@pytest.mark.parametrize("way", ["shuffle", "elastic"])
def test_a_loaded_state_is_the_state_until_iteration_goes_on(way):
    loader = make(way, 2, in_order=False)
    iterator = iter(loader)
    next(iterator)
    loader._ledger.progress.ahead.add(7)  # as if it had arrived before
    state = through_json(loader.state_dict())
    resumed = make(way, 2, in_order=False)
    resumed.load_state_dict(state)
    assert through_json(resumed.state_dict()) == state
    if way == "elastic":
        resumed.set_epoch(5)
        assert (resumed.state_dict()["sampler"]["epoch"], len(list(resumed))) == (5, len(resumed))


def test_taking_a_state_changes_nothing():
    torch.manual_seed(3)
    plain = seen(make("shuffle", 0))
    torch.manual_seed(3)
    loader, batches = make("shuffle", 0), []
    loader.state_dict()
    for batch in loader:
        batches += seen([batch])
        loader.state_dict()
    assert batches == plain


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("way", ["shuffle", "elastic"])
def test_loading_leaves_the_global_generators_alone(way, num_workers):
    loader = make(way, num_workers)
    iterator = iter(loader)
    next(iterator)
    resumed = make(way, num_workers)
    resumed.load_state_dict(loader.state_dict())
    torch.manual_seed(6)
    expected = torch.rand(3)
    torch.manual_seed(6)
    next(iter(resumed))
    assert torch.equal(torch.rand(3), expected)


class DrawsAsItGoes(Sampler):
    """Its order is drawn index by index, from a global generator."""

    def __len__(self):
        return LENGTH

    def __iter__(self):
        return (random.randrange(LENGTH) for _ in range(LENGTH))


class Yielding(DrawsAsItGoes):
    def __iter__(self):
        yield from super().__iter__()


@pytest.mark.parametrize(
    ("sampler", "steps", "workers"),
    [
        *itertools.product([None, DrawsAsItGoes, Yielding], [0, 1, 3], [(0, 0), (2, 2)]),
        (None, 0, (0, 2)),
        (None, 3, (0, 2)),
        (Yielding, 0, (0, 2)),  # behind that, workers would have had it draw earlier
    ],
    ids=str,
)
def test_what_is_drawn_behind_a_state_is_drawn_again_by_generators_that_were_put_back(sampler, steps, workers):
    def open_loader(num_workers):
        more = {"shuffle": True} if sampler is None else {"sampler": sampler()}
        return DataLoader(Numbers(LENGTH), batch_size=3, num_workers=num_workers, **more)

    disturb()
    loader = open_loader(workers[0])
    iterator = iter(loader)
    for _ in range(steps):
        next(iterator)
    state, generators = through_json(loader.state_dict()), GeneratorStates.now()
    rest, following = seen(iterator), seen(loader)
    disturb()
    resumed = open_loader(workers[1])
    resumed.load_state_dict(state)
    generators.restore()
    assert seen(resumed) == rest
    assert seen(resumed) == following


def test_workers_that_go_on_in_an_elastic_epoch_do_not_draw_what_those_of_the_next_epoch_do():
    def open_loader():
        data = Draws(12)
        return DataLoader(data, batch_sampler=ElasticBatchSampler(data, 3, rank=0, world_size=1), num_workers=1)

    loader = open_loader()
    iterator = iter(loader)
    next(iterator)
    resumed = open_loader()
    resumed.load_state_dict(loader.state_dict())
    torch.manual_seed(6)
    rest, following = (next(iter(resumed))[1].tolist() for _ in range(2))
    assert rest != following


def test_a_persistent_loader_goes_on_from_a_state_in_the_middle_of_an_epoch():
    loader = make("sequential", 2, persistent_workers=True)
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    next(iterator)
    loader.load_state_dict(state)
    assert seen(loader)[0] == [3, 4, 5]
    assert seen(loader)[0] == [0, 1, 2]


@pytest.mark.parametrize(("method", "steps"), [("fork", 0), ("fork", 3), ("spawn", 3)])
def test_workers_that_were_there_before_a_state_draw_what_those_of_a_new_loader_draw(method, steps):
    def open_loader():
        torch.manual_seed(8)  # from which the workers are seeded
        options = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": method}
        if method == "fork":
            options["worker_init_fn"] = lambda worker_id: random.random()
        return DataLoader(Draws(4), batch_size=None, **options)

    loader = open_loader()
    iterator = iter(loader)
    for _ in range(steps):
        next(iterator)
    state = through_json(loader.state_dict())
    for _ in iterator:
        pass
    resumed = open_loader()
    for one in (loader, resumed):
        torch.manual_seed(9)
        one.load_state_dict(state)
    assert list(loader) == list(resumed) != []
    assert list(loader) == list(resumed)


@pytest.mark.parametrize(
    ("way", "workers", "after"),
    [
        ("shuffle by generator", "process", 1),
        ("shuffle by generator", "thread", 1),
        ("shuffle by generator", "thread", 0),
        ("shuffle", "thread", 1),
        ("shuffle", "thread", 0),
        ("eager", "thread", 1),
        ("eager", "thread", 0),
    ],
)
def test_an_epoch_of_workers_that_stay_follows_from_the_state_before_it(way, workers, after):
    options = {"num_workers": 1, "workers": workers, "persistent_workers": True}
    loader = make(way, **options)
    seen(loader)
    state, before = through_json(loader.state_dict()), torch.get_rng_state()
    expected = [seen(loader), seen(loader)]
    resumed = make(way, **options if after else {"num_workers": 0})
    resumed.load_state_dict(state)
    assert through_json(resumed.state_dict()) == state
    torch.set_rng_state(before)
    epochs = [seen(resumed), seen(resumed)]
    assert epochs[: 1 + after] == expected[: 1 + after]
    assert epochs[0] != epochs[1]


def test_out_of_order_batches_are_neither_lost_nor_repeated():
    data = Noisy(60)
    loader = DataLoader(data, batch_size=2, num_workers=2, in_order=False)
    iterator = iter(loader)
    head = seen(next(iterator) for _ in range(11))
    resumed = DataLoader(data, batch_size=2, num_workers=1, in_order=False)
    resumed.load_state_dict(through_json(loader.state_dict()))
    assert sorted(itertools.chain(*head, *seen(resumed))) == list(range(60))


def test_no_sample_is_read_to_get_to_the_position():
    class Counted(Numbers):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    loader = DataLoader(Counted(100), batch_size=5)
    iterator = iter(loader)
    for _ in range(15):
        next(iterator)
    data = Counted(100)
    resumed = DataLoader(data, batch_size=5)
    resumed.load_state_dict(loader.state_dict())
    next(iter(resumed))
    assert data.reads == 5


# --- iterable datasets


class Shuffled(Stream):
    """A stream in an order drawn when it begins."""

    def __iter__(self):
        values = list(super().__iter__())
        random.shuffle(values)
        return iter(values)


def make_pipe():
    return IterableWrapper([torch.tensor([index]) for index in range(33)]).shuffle().sharding_filter()


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("make_stream", [lambda: Stream(33), lambda: Counter(15), lambda: Shuffled(33), make_pipe])
def test_a_stream_goes_on_where_it_was(make_stream, num_workers):
    disturb()
    loader = DataLoader(make_stream(), batch_size=2, num_workers=num_workers)
    iterator = iter(loader)
    for _ in range(5):
        next(iterator)
    state = through_json(loader.state_dict())
    rest = seen(iterator)
    disturb()
    resumed = DataLoader(make_stream(), batch_size=2, num_workers=num_workers)
    resumed.load_state_dict(state)
    assert seen(resumed) == rest
    assert len(seen(resumed)) == 5 + len(rest)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_next_epoch_of_a_data_pipe_is_shuffled_as_undisturbed(num_workers):
    def load():
        return DataLoader(make_pipe(), 2, num_workers=num_workers, generator=torch.Generator().manual_seed(4))

    loader = load()
    iterator = iter(loader)
    next(iterator)
    state = through_json(loader.state_dict())
    rest = [seen(iterator), seen(loader)]
    resumed = load()
    resumed.load_state_dict(state)
    assert [seen(resumed), seen(resumed)] == rest


class Lost(Counter):
    """A stream that cannot say where it is."""

    def state_dict(self):
        raise LookupError("there is no position yet")


class Unsendable(Counter):
    def state_dict(self):
        return {"position": lambda: self.position}


WAYS_TO_READ = [{}, {"num_workers": 2}, {"num_workers": 1, "workers": "thread"}]


@pytest.mark.parametrize("options", WAYS_TO_READ, ids=["inline", "processes", "thread"])
def test_a_stream_that_cannot_say_where_it_is_can_be_read_but_not_resumed(options):
    loader = DataLoader(Lost(9), batch_size=2, **options)
    iterator = iter(loader)
    batches = [next(iterator) for _ in range(2)]
    with pytest.raises(LookupError, match="there is no position yet"):
        loader.state_dict()
    batches += iterator
    assert seen(batches) == seen(DataLoader(Counter(9), batch_size=2, **options))
    loader.state_dict()  # of the next epoch


def test_a_stream_whose_state_cannot_be_sent_can_be_read_but_not_resumed():
    loader = DataLoader(Unsendable(9), batch_size=2, num_workers=1)
    iterator = iter(loader)
    batches = [next(iterator)]
    with pytest.raises(Exception, match=r"(?i)pickle"):
        loader.state_dict()
    assert seen(batches + list(iterator)) == seen(DataLoader(Counter(9), batch_size=2))


def test_a_stream_is_not_resumed_with_another_number_of_workers():
    loader = DataLoader(Stream(30), num_workers=2)
    next(iter(loader))
    with pytest.raises(BadInputError, match="saved with 2 workers and this loader has 1"):
        DataLoader(Stream(30), num_workers=1).load_state_dict(loader.state_dict())


# --- refusals


@pytest.mark.parametrize("foreign", [None, 3, [], {}, {"_num_yielded": 3}, {"version": 1}])
def test_what_is_no_state_is_refused(foreign):
    with pytest.raises(BadInputError, match="not the state of a dataflow DataLoader"):
        make("sequential", 0).load_state_dict(foreign)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("batch_size", DataLoader(Numbers(LENGTH), batch_size=4)),
        ("drop_last", DataLoader(Numbers(LENGTH), batch_size=3, drop_last=True)),
        ("length", DataLoader(Numbers(LENGTH + 30), batch_size=3)),
        ("samplers", DataLoader(Numbers(LENGTH), batch_size=3, shuffle=True)),
        ("samplers", DataLoader(Stream(LENGTH), batch_size=3)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_state_of_another_loader_is_refused_by_name(name, other):
    state = make("sequential", 0).state_dict()
    with pytest.raises(BadInputError, match=rf"saved with {name}="):
        other.load_state_dict(state)


def test_a_state_of_another_dataset_is_refused():
    class Named(Numbers):
        fingerprint = "one"

    class Renamed(Numbers):
        fingerprint = "two"

    state = DataLoader(Named(5)).state_dict()
    DataLoader(Named(5)).load_state_dict(state)
    with pytest.raises(BadInputError, match="fingerprint='one' and this loader has 'two'"):
        DataLoader(Renamed(5)).load_state_dict(state)


def test_a_state_of_another_version_or_a_damaged_one_is_refused():
    state = make("sequential", 0).state_dict()
    with pytest.raises(BadInputError, match="version=99"):
        make("sequential", 0).load_state_dict({**state, "version": 99})
    del state["order"]
    with pytest.raises(BadInputError, match="damaged"):
        make("sequential", 0).load_state_dict(state)


def walk(loader, steps):
    """Begin an epoch and leave it again, or leave the loader untouched."""
    if steps:
        assert len(list(itertools.islice(loader, steps))) == steps


def places_in(value, path=()):
    """Yield where the values of a state are, inner ones after those that hold them."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []:
        yield (*path, key)
        yield from places_in(value[key], (*path, key))


def damaged(state, path, damage):
    """Return a copy of a state with one value replaced, or gone where the damage is `...`."""
    state = copy.deepcopy(state)
    *outer, last = path
    holder = functools.reduce(operator.getitem, outer, state)
    if damage is ...:
        del holder[last]
    else:
        holder[last] = damage
    return state


DAMAGES = [..., None, "x", -1, 1.5, [], {}, [1, 2]]


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("way", ["shuffle", "replacement", "distributed", "python", "elastic", "stream"])
def test_damage_is_refused_in_words_or_does_no_harm(way, steps):
    def load():
        return DataLoader(Stream(LENGTH), batch_size=3) if way == "stream" else make(way, 0)

    loader = load()
    walk(loader, steps)
    state = through_json(loader.state_dict())
    refused = 0
    for path, damage in itertools.product(places_in(state), DAMAGES):
        resumed = load()
        try:
            resumed.load_state_dict(damaged(state, path, damage))
            iterator = iter(resumed)
        except BadInputError:
            refused += 1
            continue
        next(iterator)
        resumed.state_dict()
    assert refused > 50


@pytest.mark.parametrize(("saved", "loaded"), [("shuffle", "own"), ("own", "shuffle")])
def test_an_epoch_is_not_continued_by_another_generator(saved, loaded):
    generators = {"shuffle": None, "own": own_generator()}
    loaders = {way: DataLoader(Numbers(9), shuffle=True, generator=generator) for way, generator in generators.items()}
    loaders[loaded].load_state_dict(loaders[saved].state_dict())  # before an epoch it does not matter
    next(iter(loaders[saved]))
    with pytest.raises(BadInputError, match="a generator of its own, unlike this loader's"):
        loaders[loaded].load_state_dict(loaders[saved].state_dict())


def test_a_place_behind_the_end_of_an_epoch_is_refused():
    loader = make("shuffle", 0)
    next(iter(loader))
    state = loader.state_dict()
    state["epoch"]["batches"] = 1000
    loader.load_state_dict(state)
    with pytest.raises(BadInputError, match="comes after batch 1000 of an epoch that has fewer"):
        iter(loader)


class Vague(SequentialSampler):
    """A sampler that cannot say where it is."""

    def state_dict(self):
        raise LookupError("no state yet")

    def load_state_dict(self, state):
        raise AssertionError


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_sampler_that_cannot_say_where_it_is_can_be_drawn_from(num_workers):
    data = Numbers(5)
    loader = DataLoader(data, sampler=Vague(data), num_workers=num_workers)
    for steps in (0, 1):
        walk(loader, steps)
        with pytest.raises(LookupError, match="no state yet"):
            loader.state_dict()
    assert seen(loader) == [[0], [1], [2], [3], [4]]


class Counting(Sampler):
    """Its state is how many it has yielded, also behind the last one, and what it is told holds for one epoch."""

    def __init__(self, source):
        self.source = source
        self.yielded = self.first = 0

    def __len__(self):
        return len(self.source)

    def __iter__(self):
        self.yielded, self.first = self.first, 0
        for index in range(self.yielded, len(self.source)):
            self.yielded += 1
            yield index

    def state_dict(self):
        return {"yielded": self.yielded}

    def load_state_dict(self, state):
        self.first = state["yielded"]


def make_counting(num_workers=0):
    return DataLoader(Numbers(LENGTH), 5, sampler=Counting(range(LENGTH)), num_workers=num_workers)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("steps", [1, 3, 8], ids=lambda steps: f"after {steps}")
def test_a_sampler_that_counts_goes_on_in_an_epoch_after_one_that_was_left(steps, num_workers):
    loader = make_counting(num_workers)
    for _ in range(2):
        list(itertools.islice(loader, steps))
    iterator = iter(loader)
    next(iterator)
    state, rest = through_json(loader.state_dict()), seen(iterator)
    resumed = make_counting(num_workers)
    resumed.load_state_dict(state)
    assert seen(resumed) == rest
    assert len(seen(resumed)) == 8


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_sampler_that_counts_begins_the_epoch_after_one_that_is_over(num_workers):
    loader = make_counting(num_workers)
    whole = seen(loader)
    for loaded in (make_counting(num_workers), loader):
        loaded.load_state_dict(through_json(loader.state_dict()))
        assert seen(copy.deepcopy(loaded)) == seen(loaded) == seen(loaded) == whole


def test_a_sampler_that_counts_and_has_no_more_is_not_asked_for_ever():
    loader = DataLoader([], sampler=Counting([]))
    loader.load_state_dict(loader.state_dict())
    assert [*loader, *loader] == []


def test_an_elastic_state_goes_on_with_other_ranks_and_workers():
    data = Numbers(LENGTH)

    def run(loaders, steps=None):
        streams = [iter(loader) for loader in loaders]
        rounds = zip(*streams, strict=True) if steps is None else (list(map(next, streams)) for _ in range(steps))
        return [sorted(itertools.chain(*seen(parts))) for parts in rounds]

    def ranks(world_size, num_workers):
        samplers = [
            ElasticBatchSampler(data, 8, seed=2, rank=rank, world_size=world_size) for rank in range(world_size)
        ]
        return [DataLoader(data, batch_sampler=sampler, num_workers=num_workers) for sampler in samplers]

    undisturbed = ranks(1, 0)
    expected = run(undisturbed) + run(undisturbed)
    first = ranks(2, 1)
    batches = run(first, 3)
    state = through_json(first[0].state_dict())
    second = ranks(4, 0)
    for loader in second:
        loader.load_state_dict(state)
    assert batches + run(second) + run(second) == expected


@pytest.mark.parametrize("told", ["loader", "batch_sampler"])
def test_set_epoch_after_an_epoch_is_what_the_state_says(told):
    data = Numbers(LENGTH)
    loader = DataLoader(data, batch_sampler=ElasticBatchSampler(data, 8, rank=0, world_size=1))
    list(loader)
    {"loader": loader, "batch_sampler": loader.batch_sampler}[told].set_epoch(7)
    assert loader.state_dict()["sampler"]["epoch"] == 7


def test_a_loader_tells_the_epoch_to_a_sampler_inside_of_torchs_batch_sampler():
    data = Numbers(LENGTH)
    sampler = DistributedSampler(data, num_replicas=1, rank=0)
    loader = DataLoader(data, sampler=sampler, batch_size=8)
    loader.set_epoch(7)
    assert sampler.epoch == 7
    list(loader)
    assert loader.state_dict()["next_epoch"] == 8


def test_a_loader_counts_on_from_the_epoch_that_it_was_told():
    loader = DataLoader(Numbers(LENGTH), batch_size=8)
    loader.set_epoch(7)
    assert loader.state_dict()["next_epoch"] == 7
    list(loader)
    assert loader.state_dict()["next_epoch"] == 8


EPOCHS = 3


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("counts", ["epochs", "steps"])
@pytest.mark.parametrize(("way", "told"), [
    ("elastic", "loader"), ("elastic", "batch_sampler"), ("distributed", "loader"), ("distributed", "sampler"),
    ("shuffle by generator", "loader"),
])  # fmt: skip
def test_a_script_that_saves_at_any_step_goes_on_in_the_epoch_that_it_says(way, told, counts, num_workers):
    """Whether it takes the end of an epoch for that epoch, which has no batch left, or for the next one."""

    def train(loader, begin):
        teller = loader if told == "loader" else getattr(loader, told)
        for epoch in range(begin, EPOCHS):
            teller.set_epoch(epoch)
            for batch in loader:
                yield epoch, seen([batch]), through_json(loader.state_dict())

    steps = list(train(make(way, num_workers), 0))
    batches = [(epoch, batch) for epoch, batch, _ in steps]
    an_epoch = len(steps) // EPOCHS
    for done in (1, an_epoch - 1, an_epoch, an_epoch + 1, 2 * an_epoch, 3 * an_epoch):
        epoch, _, state = steps[done - 1]
        resumed = make(way, num_workers)
        resumed.load_state_dict(state)
        assert through_json(resumed.state_dict()) == state
        rest = train(resumed, epoch if counts == "epochs" else done // an_epoch)
        assert [(epoch, batch) for epoch, batch, _ in rest] == batches[done:]


def add_noise(number, rng):
    return number + rng.random()


OPTIONS = [
    {},
    {"num_workers": 2},
    {"num_workers": 2, "persistent_workers": True},
    {"num_workers": 2, "workers": "thread"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("way", ["elastic", "distributed"])
def test_an_epoch_that_is_set_behind_iter_is_that_of_its_batches(way, options):
    def load():
        data = TransformedDataset(Numbers(LENGTH), add_noise)
        return DataLoader(data, **WAYS[way](data), **options)

    expected = load()
    expected.set_epoch(3)
    epochs = [seen(expected), seen(expected)]
    loader = load()
    for epoch in epochs[: 1 + (way == "elastic")]:
        iterator = iter(loader)
        if epoch is epochs[0]:
            loader.batch_sampler.sampler.set_epoch(3)  # where frameworks look for it
        head = seen([next(iterator)])
        state = through_json(loader.state_dict())
        assert head + seen(iterator) == epoch
        resumed = load()
        resumed.load_state_dict(state)
        assert seen(resumed) == epoch[1:]


@pytest.mark.parametrize("options", OPTIONS[::3], ids=str)
def test_an_iterator_stays_in_its_epoch_when_a_newer_one_or_a_later_batch_comes(options):
    data = Numbers(LENGTH)
    loader = DataLoader(data, **WAYS["elastic"](data), **options)
    iterator = iter(loader)
    first = next(iterator)
    loader.set_epoch(5)
    others = [iter(loader), iter(copy.copy(loader))]  # which share their sampler
    for batches in (itertools.chain([first], iterator), *others):
        assert sorted(itertools.chain(*seen(batches))) == list(range(LENGTH))


def test_an_iterator_stays_in_its_epoch_when_that_of_a_copy_begins_the_next():
    loader = make("elastic", 1)
    expected = [seen(loader), seen(loader)]
    loader.set_epoch(0)
    iterators = [iter(loader), iter(copy.copy(loader))]
    assert [seen(iterator) for iterator in iterators] == expected


def test_an_older_iterator_is_not_begun_anew():
    loader = make("distributed", 1)
    expected = seen(loader)
    older = iter(loader)
    loader.set_epoch(1)
    newer = iter(loader)
    assert seen(older) == expected
    assert seen(newer) != expected


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("way", ["elastic", "distributed", "shuffle by generator"])
def test_an_epoch_that_was_left_goes_on_unless_another_is_set_behind_iter(way, num_workers):
    """As Lightning sets it where its epochs are shorter than the loader's."""
    loader = make(way, num_workers)
    iterator = iter(loader)
    next(iterator)
    state, rest = through_json(loader.state_dict()), seen(iterator)
    loader.set_epoch(5)
    other = rest if way == "shuffle by generator" else seen(loader)
    for epoch, expected in ((0, rest), (5, other)):
        resumed = make(way, num_workers)
        resumed.load_state_dict(state)
        batches = iter(resumed)
        resumed.set_epoch(epoch)
        assert seen(batches) == expected


@pytest.mark.parametrize("way", ["elastic", "distributed"])
def test_the_end_of_an_epoch_is_passed_once(way):
    loader = make(way, 0)
    expected = seen(itertools.islice(loader, len(loader)))
    state = through_json(loader.state_dict())
    second = seen(loader)
    at_end = make(way, 0)
    at_end.load_state_dict(state)
    at_end.set_epoch(0)
    assert seen(at_end) == []
    if way == "elastic":
        assert seen(at_end) == second
    at_end.set_epoch(0)
    assert seen(at_end) == expected
    behind = make(way, 0)
    behind.load_state_dict(state)
    assert seen(behind) == second
    behind.set_epoch(0)
    assert seen(behind) == expected


@pytest.mark.parametrize("way", ["elastic", "distributed", "shuffle by generator"])
def test_an_epoch_that_was_seen_to_end_may_be_told_again(way):
    loader = make(way, 0)
    epoch = seen(loader)
    resumed = make(way, 0)
    resumed.load_state_dict(through_json(loader.state_dict()))
    resumed.set_epoch(0)
    assert len(seen(resumed)) == len(epoch)


@pytest.mark.parametrize("way", ["elastic", "distributed", "shuffle by generator"])
def test_an_epoch_that_is_to_be_walked_again_is_no_end_of_it(way):
    loader = make(way, 0)
    batches = len([*itertools.islice(loader, len(loader))])
    loader.set_epoch(0)
    resumed = make(way, 0)
    resumed.load_state_dict(through_json(loader.state_dict()))
    assert len(seen(resumed)) == batches


def test_a_state_after_a_state_has_plain_numbers():
    loader = make("distributed", 0)
    loader.load_state_dict(make("distributed", 0).state_dict())
    next(iter(loader))
    assert type(loader.state_dict()["epoch"]["epoch"]) is int
    assert type(loader.state_dict()["epoch"]["order"]["parts"][1]["epoch"]) is int


def sent(loader):
    return pickle.loads(pickle.dumps(loader))


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, sent])
@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}])
def test_a_copy_stands_where_its_loader_stood_and_both_go_their_own_ways(clone, options):
    loader = DataLoader(Numbers(12), batch_size=2, **options)
    batches = iter(loader)
    next(batches)
    stood = loader.state_dict()
    copied = clone(loader)
    assert seen(batches) == [[2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    done = loader.state_dict()
    assert copied.state_dict() == stood
    assert len(seen(copied)) == 6
    next(iter(copied))
    assert loader.state_dict() == done
    assert (loader.stats().batches, copied.stats().batches) == (6, 7)


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, sent])
def test_a_loaded_state_is_that_of_copies_too(clone):
    loader = DataLoader(Numbers(12), batch_size=2)
    next(iter(loader))
    resumed = DataLoader(Numbers(12), batch_size=2)
    resumed.load_state_dict(loader.state_dict())
    copied = clone(resumed)
    for one in (resumed, copied):
        assert seen(one) == [[2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, sent])
def test_a_copy_knows_where_the_stream_was_whatever_became_of_it_since(clone):
    loader = DataLoader(Counter(12), batch_size=2)
    batches = iter(loader)
    next(batches)
    copied = clone(loader)
    next(batches)
    resumed = DataLoader(Counter(12), batch_size=2)
    resumed.load_state_dict(copied.state_dict())
    assert seen(resumed)[0] == [3, 4]


def test_a_copy_can_be_made_while_the_stream_cannot_say_where_it_is():
    loader = DataLoader(Lost(4))
    next(iter(loader))
    copied = copy.copy(loader)
    with pytest.raises(LookupError, match="there is no position yet"):
        copied.state_dict()


class Interrupted(Numbers):
    """Numbers, some of which cannot be had now."""

    def __init__(self, length, *missing):
        super().__init__(length)
        self.missing = missing

    def __getitem__(self, number):
        if number in self.missing:
            raise TransientError(f"sample {number}: the origin is away")
        return super().__getitem__(number)


MAKERS = [{}, {"num_workers": 1}, {"num_workers": 2, "workers": "thread"}, {"num_workers": 2, "in_order": False}]


@pytest.mark.parametrize("failed", [0, 5])
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("is_elastic", [False, True])
def test_a_batch_that_raised_is_not_lost_to_who_stops_there_and_resumes(failed, maker, is_elastic):
    def make(data, **options):
        if is_elastic:
            sampler = ElasticBatchSampler(data, 2, shuffle=False, rank=0, world_size=1)
            return DataLoader(data, batch_sampler=sampler, **options)
        return DataLoader(data, batch_size=2, **options)

    loader = make(Interrupted(12, 2 * failed), **maker)
    with pytest.raises(TransientError):
        seen(loader)
    copied, resumed = copy.copy(loader), make(Interrupted(12))
    assert copied.state_dict() == loader.state_dict()
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    rest = seen(resumed)
    assert [2 * failed, 2 * failed + 1] in rest
    if maker.get("in_order", True):
        assert len(rest) == 6 - failed


class InterruptedStream(IterableDataset):
    """Numbers from 0 on, of which one cannot be read the first time."""

    def __init__(self, length, fails_at=None):
        self.length = length
        self.fails_at = fails_at

    def __iter__(self):
        for number in range(self.length):
            if number == self.fails_at:
                raise TransientError("the origin is away")
            yield number


@pytest.mark.parametrize("maker", [{}, {"num_workers": 1}, {"num_workers": 1, "workers": "thread"}])
def test_a_batch_of_a_stream_that_raised_is_not_lost_to_who_stops_there_and_resumes(maker):
    loader = DataLoader(InterruptedStream(12, fails_at=5), batch_size=2, **maker)
    with pytest.raises(TransientError):
        seen(loader)
    resumed = DataLoader(InterruptedStream(12), batch_size=2, **maker)
    resumed.load_state_dict(loader.state_dict())
    assert seen(resumed) == [[4, 5], [6, 7], [8, 9], [10, 11]]


@pytest.mark.parametrize("maker", MAKERS[:3])
def test_who_goes_on_behind_a_batch_that_raised_has_passed_it(maker):
    loader = DataLoader(Interrupted(12, 4, 10), batch_size=2, **maker)
    batches = iter(loader)
    assert seen(itertools.islice(batches, 2)) == [[0, 1], [2, 3]]
    with pytest.raises(TransientError):
        next(batches)
    assert seen(itertools.islice(batches, 1)) == [[6, 7]]
    resumed = DataLoader(Numbers(12), batch_size=2)
    resumed.load_state_dict(loader.state_dict())
    assert seen(resumed) == [[8, 9], [10, 11]]
    next(batches)
    with pytest.raises(TransientError):
        next(batches)
    assert next(batches, None) is None
    resumed.load_state_dict(loader.state_dict())
    assert len(seen(resumed)) == 6


@pytest.mark.parametrize("maker", MAKERS)
def test_a_batch_that_had_just_been_counted_when_ctrl_c_came_is_not_lost(maker, monkeypatch):
    def interrupted(*arguments, hand_out=Progress.hand_out):
        hand_out(*arguments)
        raise KeyboardInterrupt

    loader, resumed = (DataLoader(Numbers(12), batch_size=2, **options) for options in (maker, {}))
    batches = iter(loader)
    before = seen(itertools.islice(batches, 2))
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "hand_out", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(batches)
    resumed.load_state_dict(loader.state_dict())
    assert sorted(before + seen(resumed)) == [[first, first + 1] for first in range(0, 12, 2)]
