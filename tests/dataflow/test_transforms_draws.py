import threading

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dataflow.transforms import Draws
from dataflow.transforms.epoch import current_epoch, reading_epoch

NUMBERS = st.lists(st.integers(0, 2**62), min_size=1, max_size=8)


def draws(seed: int, epoch: int, samples: list[int]) -> Draws:
    return Draws(seed, epoch, np.array(samples, np.int64))


@given(seed=st.integers(), epoch=st.integers(0), samples=NUMBERS, data=st.data())
def test_what_is_drawn_for_a_sample_does_not_depend_on_its_batch(
    seed: int, epoch: int, samples: list[int], data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, len(samples) - 1))
    batch, alone = draws(seed, epoch, samples), draws(seed, epoch, [samples[place]])
    for other in range(len(samples)):
        batch[other].random()
    assert batch[place].integers(2**63, size=4).tolist() == alone[0].integers(2**63, size=4).tolist()
    assert batch.seed_at(place) == alone.seed_at(0)


@given(seed=st.integers(), epoch=st.integers(0), samples=NUMBERS)
def test_seed_epoch_and_sample_each_make_other_numbers(seed: int, epoch: int, samples: list[int]) -> None:
    here = draws(seed, epoch, samples)
    others = [draws(seed + 1, epoch, samples), draws(seed, epoch + 1, samples), draws(seed, epoch, [samples[0] + 1])]
    found = {one[0].integers(2**63) for one in [here, *others]}
    assert len(found) == 4
    assert len({one.seed_at(0) for one in [here, *others]}) == 4


@given(samples=NUMBERS, start=st.integers(0, 8), stop=st.integers(0, 8))
def test_a_slice_has_the_generators_of_its_samples(samples: list[int], start: int, stop: int) -> None:
    whole = draws(3, 1, samples)
    part = whole[start:stop]
    assert [rng.random() for rng in part] == [rng.random() for rng in whole][start:stop]


def test_the_numbers_stay_what_they_are_from_release_to_release() -> None:
    assert draws(7, 2, [11])[0].integers(1000, size=3).tolist() == PINNED


PINNED = [382, 698, 753]


def test_the_epoch_is_that_of_the_thread_and_of_the_innermost_block() -> None:
    seen = []
    with reading_epoch(3):
        with reading_epoch(5):
            assert current_epoch() == 5
        assert current_epoch() == 3
        thread = threading.Thread(target=lambda: seen.append(current_epoch()))
        thread.start()
        thread.join()
    assert (current_epoch(), seen) == (0, [0])
