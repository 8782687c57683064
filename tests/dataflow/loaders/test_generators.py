"""The global generators, watched and put back."""

import random

import numpy as np
import pytest
import torch

from dataflow.loaders.generators import GeneratorStates, GeneratorWatch, generators_kept, seed_worker

DRAWS = [
    random.random,
    lambda: random.gauss(0, 1),
    np.random.rand,
    lambda: np.random.randn(1),
    lambda: torch.rand(1),
    lambda: [random.random() for _ in range(624)],
]


def draw():
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.randn(1).item()


@pytest.fixture(autouse=True)
def _kept():
    with generators_kept():
        yield


def test_states_put_back_draw_the_same_again():
    draw()
    states = GeneratorStates.now()
    first = [draw() for _ in range(3)]
    states.restore()
    assert [draw() for _ in range(3)] == first


def test_kept_generators_do_not_notice_what_was_drawn():
    states = GeneratorStates.now()
    expected = draw()
    states.restore()
    with generators_kept():
        draw()
    assert draw() == expected


def test_each_worker_has_draws_of_its_own():
    drawn = []
    for worker_id in (0, 1):
        seed_worker(5, worker_id)
        drawn.append(draw())
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("is_quick", [True, False])
@pytest.mark.parametrize("draws", DRAWS)
def test_any_draw_is_seen_and_no_draw_is_not(draws, is_quick, monkeypatch):
    if not is_quick:  # an interpreter that keeps them elsewhere
        monkeypatch.setattr("dataflow.loaders.generators._quick_look", lambda _: None)
    watch = GeneratorWatch()
    assert (watch._look_at_python is not random.getstate) == is_quick
    assert watch.changed() is not None
    assert watch.changed() is None
    draws()
    states = watch.changed()
    assert states is not None
    expected = draw()
    states.restore()
    assert draw() == expected


def test_the_second_of_a_pair_of_normal_numbers_is_seen():
    watch = GeneratorWatch()
    np.random.seed(1)
    np.random.randn()
    watch.changed()
    np.random.randn()
    states = watch.changed()
    expected = np.random.randn()
    states.restore()
    assert np.random.randn() == expected
    watch.changed()


def test_a_draw_after_a_long_silence_is_seen_at_once():
    watch = GeneratorWatch()
    watch.changed()
    assert [watch.changed() for _ in range(100)] == [None] * 100
    random.random()
    assert watch.changed() is not None
