import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.errors import BadInputError
from dataflow.order import Epoch, Filtered, FixedBatches, Selection, Shuffle

masks = st.one_of(
    st.lists(st.booleans(), max_size=60),
    st.tuples(st.integers(0, 2000), st.floats(0, 1), st.integers(0, 9)).map(
        lambda how: (np.random.default_rng(how[2]).random(how[0]) < how[1]).tolist()
    ),
)


@given(mask=masks)
def test_the_kth_kept_sample_is_found(mask: list[bool]) -> None:
    kept = np.flatnonzero(np.array(mask, dtype=bool))
    selection = Selection(np.array(mask, dtype=bool))
    assert len(selection) == len(kept)
    assert selection.numbers(np.arange(len(kept))).tolist() == kept.tolist()
    assert selection.numbers(np.arange(len(kept))[::-1]).tolist() == kept[::-1].tolist()
    everywhere = np.arange(len(mask) + 1)
    assert selection.count_before(everywhere).tolist() == np.searchsorted(kept, everywhere).tolist()


@given(
    sizes=st.lists(st.integers(0, 25), min_size=1, max_size=12),
    shuffle=st.sampled_from(["block", "full", False]),
    share=st.floats(0, 1),
    batch=st.integers(1, 20),
)
def test_an_epoch_has_each_kept_sample_once_and_no_other(
    sizes: list[int], shuffle: str, share: float, batch: int
) -> None:
    first_sample = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    mask = np.random.default_rng(0).random(first_sample[-1]) < share
    source = Filtered(Shuffle(len(mask), first_sample, shuffle, 1, 2), Selection(mask))
    found = [b.samples() for b in Epoch(source, FixedBatches(batch, "short"), 0).batches()]
    numbers = np.concatenate(found) if found else np.empty(0)
    assert np.array_equal(np.sort(numbers), np.flatnonzero(mask))
    assert len(found) == -(-source.num_samples // batch)
    if shuffle is False:
        assert np.array_equal(numbers, np.flatnonzero(mask))


def test_blocks_without_kept_samples_are_not_read_and_windows_hold_the_others() -> None:
    first_sample = np.arange(0, 1001, 10)
    mask = np.repeat(np.arange(100) % 4 == 0, 10)
    order = Filtered(Shuffle(1000, first_sample, "block", 3, 20), Selection(mask)).order(0)
    blocks = order.take(0, 250) // 10
    assert set(blocks.tolist()) == set(range(0, 100, 4))
    assert all(len(set(blocks[start : start + 50])) <= 25 for start in range(0, 250, 50))


def test_a_large_mask_takes_little_more_than_its_bits() -> None:
    selection = Selection(np.ones(1_000_000, dtype=bool))
    assert selection._bits.nbytes + selection._kept_before.nbytes < 1_000_000 / 8 * 1.2


def test_state_tells_masks_apart() -> None:
    source = Shuffle(600, None, "full", 0, 1)
    one, other = np.ones(600, dtype=bool), np.ones(600, dtype=bool)
    other[599] = False
    assert Filtered(source, Selection(one)).identity() != Filtered(source, Selection(other)).identity()


def test_senseless_masks_are_refused() -> None:
    with pytest.raises(BadInputError, match="int64"):
        Selection(np.arange(3))
    with pytest.raises(BadInputError, match="mask speaks of 3 samples and the dataset has 4"):
        Filtered(Shuffle(4, None, "full", 0, 1), Selection(np.ones(3, dtype=bool)))
