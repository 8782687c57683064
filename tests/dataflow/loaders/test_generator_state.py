"""Any generator goes on where it was, and with it a sampler that draws from one of its own."""

import json
import random

import numpy as np
import pytest
import torch
from torch.utils.data import Sampler

from connectors.errors import BadInputError
from dataflow.loaders import DataLoader
from dataflow.loaders.generator_state import decode_generator, encode_generator, own_generators, try_generator
from dataflow.loaders.testing import Numbers

LENGTH = 24

# How to make one from a seed, and how to draw an order from it.
KINDS = {
    "torch": (lambda seed: torch.Generator().manual_seed(seed), lambda g: torch.randperm(LENGTH, generator=g).tolist()),
    "python": (random.Random, lambda g: g.sample(range(LENGTH), LENGTH)),
    "RandomState": (np.random.RandomState, lambda g: g.permutation(LENGTH).tolist()),
    "PCG64": (np.random.default_rng, lambda g: g.permutation(LENGTH).tolist()),
    "MT19937": (lambda seed: np.random.Generator(np.random.MT19937(seed)), lambda g: g.permutation(LENGTH).tolist()),
    "Philox": (lambda seed: np.random.Generator(np.random.Philox(seed)), lambda g: g.permutation(LENGTH).tolist()),
    "SFC64": (lambda seed: np.random.Generator(np.random.SFC64(seed)), lambda g: g.permutation(LENGTH).tolist()),
}


def through_json(state):
    return json.loads(json.dumps(state))


def seen(batches):
    return [batch[:, 0].tolist() for batch in batches]


@pytest.mark.parametrize("kind", KINDS)
def test_a_generator_goes_on_where_another_one_was(kind):
    make, draw = KINDS[kind]
    first, second = make(1), make(2)
    draw(first)
    saved = through_json(encode_generator(first))
    expected = [draw(first) for _ in range(3)]
    decode_generator(second, saved)
    assert [draw(second) for _ in range(3)] == expected


@pytest.mark.parametrize(
    ("make", "draw"), [(random.Random, random.Random.gauss), (np.random.RandomState, np.random.RandomState.normal)]
)
def test_the_second_of_two_normal_numbers_that_are_drawn_together_is_kept(make, draw):
    first, second = make(1), make(2)
    draw(first, 0, 1)
    decode_generator(second, through_json(encode_generator(first)))
    assert [draw(second, 0, 1) for _ in range(3)] == [draw(first, 0, 1) for _ in range(3)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("saved", [None, [], {}, "", "no base64", [3, "AAAA", None], {"bit_generator": "unknown"}])
def test_damage_is_found_before_a_generator_is_touched(kind, saved):
    make, draw = KINDS[kind]
    generator = make(1)
    with pytest.raises((LookupError, TypeError, ValueError, AttributeError, RuntimeError)):
        try_generator(generator, saved)
    assert draw(generator) == draw(make(1))


def shortened(state):
    """Yield the state with one of its arrays cut off behind 8 bytes."""
    places = state.items() if isinstance(state, dict) else enumerate(state)
    for place, value in places:
        others = ["AAAAAAAAAAA="] if isinstance(value, str) and place != "bit_generator" else []
        for other in [*others, *(shortened(value) if isinstance(value, dict) else ())]:
            copied = state.copy()
            copied[place] = other
            yield copied


@pytest.mark.parametrize(("kind", "arrays"), [("RandomState", 1), ("MT19937", 1), ("Philox", 3), ("SFC64", 1)])
def test_an_array_that_is_cut_off_is_refused_where_numpy_reads_on_behind_it(kind, arrays):
    generator = KINDS[kind][0](1)
    damaged = [*shortened(through_json(encode_generator(generator)))]
    assert len(damaged) == arrays
    for saved in damaged:
        with pytest.raises(ValueError, match="reshape"):
            try_generator(generator, saved)


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_a_legacy_state_of_another_length_is_refused_as_one_of_numpy_ended_there(length):
    generator = KINDS["RandomState"][0](1)
    saved = through_json(encode_generator(generator))
    assert len(saved) == 4
    with pytest.raises(ValueError, match="unpack"):
        try_generator(generator, [*saved, 0.0][:length])


@pytest.mark.parametrize("position", [-1, 5, 625, 10**8])
@pytest.mark.parametrize("kind", ["RandomState", "MT19937", "Philox"])
def test_a_place_outside_of_what_a_generator_has_in_store_is_refused_as_numpy_would_read_there(kind, position):
    generator = KINDS[kind][0](1)
    saved = through_json(encode_generator(generator))
    if kind == "RandomState":
        saved[1], last = position, 624
    elif kind == "MT19937":
        saved["state"]["pos"], last = position, 624
    else:
        saved["buffer_pos"], last = position, 4
    if 0 <= position <= last:
        try_generator(generator, saved)
    else:
        with pytest.raises(ValueError, match=rf"pos of a generator is {position}, and lies in \[0, {last}\]"):
            try_generator(generator, saved)


def test_generators_that_all_share_are_nobodys_own():
    class Owner:
        def __init__(self):
            self.everybodys = [random, torch.default_generator, np.random.mtrand._rand]
            self.torchs, self.numpys, self.pythons = torch.default_generator, np.random.mtrand._rand, random
            self.rng = random.Random(1)

    owner = Owner()
    assert own_generators(owner) == {"rng": owner.rng}
    assert own_generators([1, 2]) == {}


class Shuffled(Sampler):
    """What users write: an order from a generator that belongs to the sampler."""

    def __init__(self, kind):
        self.make, self.draw = KINDS[kind]
        self.rng = self.make(7)

    def __len__(self):
        return LENGTH

    def __iter__(self):
        return iter(self.draw(self.rng))


class Drawing(Shuffled):
    """The same, drawn as it goes."""

    def __iter__(self):
        for _ in range(LENGTH):
            yield self.draw(self.rng)[0]


class Late(Shuffled):
    """The same, with a generator that it makes when it needs one."""

    def __init__(self, kind):
        super().__init__(kind)
        self.rng = None

    def __iter__(self):
        self.rng = self.make(7)
        return super().__iter__()


@pytest.mark.parametrize("sampler", [Shuffled, Drawing, Late])
@pytest.mark.parametrize(("kind", "num_workers"), [("torch", 0), ("python", 0), ("RandomState", 0), ("PCG64", 1)])
def test_an_epoch_of_a_sampler_with_a_generator_of_its_own_is_continued(kind, num_workers, sampler):
    def make():
        return DataLoader(Numbers(LENGTH), batch_size=4, sampler=sampler(kind), num_workers=num_workers)

    loader, resumed = make(), make()
    list(loader)
    batches = iter(loader)
    next(batches)
    resumed.load_state_dict(through_json(loader.state_dict()))
    assert seen(resumed) == seen(batches)
    between = make()
    between.load_state_dict(through_json(loader.state_dict()))
    assert seen(between) == seen(resumed) == seen(loader)


def test_a_state_with_another_kind_of_generator_is_refused():
    saved, loader = (DataLoader(Numbers(LENGTH), sampler=Shuffled(kind)) for kind in ("python", "PCG64"))
    next(iter(saved))
    with pytest.raises(BadInputError, match="the loader state is damaged"):
        loader.load_state_dict(saved.state_dict())
