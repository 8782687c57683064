import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connectors.errors import BadInputError
from dataflow.order import Filtered, Mixture, Selection, Shuffle, mixture_weights


def mixture(sizes: list[int], weights: list[float], epoch_samples: int, period: int, seed: int = 3) -> Mixture:
    sources = tuple(Shuffle(size, None, "full", 10 + number, 1) for number, size in enumerate(sizes))
    return Mixture(sources, tuple(sizes), tuple(weights), epoch_samples, period, seed)


def source_of(numbers: np.ndarray, sizes: list[int]) -> np.ndarray:
    return np.searchsorted(np.cumsum(sizes), numbers, side="right")


cases = st.lists(st.tuples(st.integers(4, 50), st.integers(1, 9)), min_size=1, max_size=5)


@given(case=cases, period=st.integers(50, 90), epoch_samples=st.integers(0, 500), epoch=st.integers(0, 3))
@settings(max_examples=25)
def test_shares_are_exact_after_every_period(
    case: list[tuple[int, int]], period: int, epoch_samples: int, epoch: int
) -> None:
    sizes, weights = map(list, zip(*case, strict=True))
    mixed = mixture(sizes, weights, period * 6, period)
    sources = source_of(mixed.order(epoch).take(0, period * 6), sizes)
    given_so_far = np.zeros(len(sizes))
    for end in range(period, period * 6 + 1, period):
        given_so_far = np.bincount(sources[:end], minlength=len(sizes))
        # Shares count from the very first epoch: a later one has a rounding at both its ends.
        assert (abs(given_so_far - mixed.shares() * end) <= 2).all()
        if epoch == 0:
            assert (abs(given_so_far - mixed.shares() * end) <= 1).all()


@given(case=cases)
@settings(max_examples=25)
def test_each_source_is_read_whole_before_any_of_its_samples_comes_again(case: list[tuple[int, int]]) -> None:
    sizes, weights = map(list, zip(*case, strict=True))
    mixed = mixture(sizes, weights, 180, 60)
    numbers = np.concatenate([mixed.order(epoch).take(0, 180) for epoch in range(2)])
    source = source_of(numbers, sizes)
    for which, size in enumerate(sizes):
        turns = range((source == which).sum() // size + 1)
        expected = np.concatenate([mixed.sources[which].order(turn).take(0, size) for turn in turns])
        # Inside a period chance decides who comes when; at its end each source stands where it would be alone.
        for end in range(60, 361, 60):
            found = numbers[:end][source[:end] == which] - sum(sizes[:which])
            assert sorted(found) == sorted(expected[: len(found)])


@given(case=cases, data=st.data())
@settings(max_examples=25)
def test_any_part_equals_that_part_of_the_whole(case: list[tuple[int, int]], data: st.DataObject) -> None:
    sizes, weights = map(list, zip(*case, strict=True))
    mixed = mixture(sizes, weights, 200, 70)
    order = mixed.order(1)
    whole = order.take(0, 200)
    start = data.draw(st.integers(0, 200))
    stop = data.draw(st.integers(start, 200))
    assert np.array_equal(mixed.order(1).take(start, stop), whole[start:stop])
    positions = np.array(data.draw(st.lists(st.integers(0, 199), max_size=30)), dtype=np.int64)
    assert np.array_equal(order.at(positions), whole[positions])


@given(case=cases, position=st.integers(0, 600))
@settings(max_examples=25)
def test_what_was_given_before_a_position_is_what_the_order_gave(case: list[tuple[int, int]], position: int) -> None:
    sizes, weights = map(list, zip(*case, strict=True))
    mixed = mixture(sizes, weights, 200, 70)
    numbers = np.concatenate([mixed.order(epoch).take(0, 200) for epoch in range(3)])[:position]
    expected = np.bincount(source_of(numbers, sizes), minlength=len(sizes))
    assert mixed.given_before(position).tolist() == expected.tolist()


def test_a_period_of_one_batch_makes_every_batch_exact() -> None:
    sizes = [100, 900, 50]
    sources = source_of(mixture(sizes, [1, 2, 5], 64 * 20, 64).order(0).take(0, 64 * 20), sizes).reshape(20, 64)
    for batch in sources:
        assert np.bincount(batch, minlength=3).tolist() == [8, 16, 40]
    assert len({tuple(batch) for batch in sources.tolist()}) == 20


def test_shares_do_not_drift_at_the_end_of_a_huge_epoch() -> None:
    mixed = mixture([10**9, 10**9, 10**9], [1, 1, 1], 3 * 10**11, 1000)
    order = mixed.order(0)
    end = 3 * 10**11
    given_by_then = order._given(np.array([end // 1000]))[:, 0]
    assert given_by_then.sum() == end
    assert (abs(given_by_then - mixed.shares() * end) <= 1).all()
    tail = np.bincount(source_of(order.take(end - 3000, end), [10**9] * 3), minlength=3)
    assert (abs(tail - 1000) <= 1).all()


def test_filters_and_blocks_mix_too() -> None:
    blocks = Shuffle(100, np.arange(0, 101, 10), "block", 1, 4)
    kept = Filtered(Shuffle(60, None, "full", 2, 1), Selection(np.arange(60) % 3 == 0))
    mixed = Mixture((blocks, kept), (100, 60), (1.0, 1.0), 40, 10, 0)
    numbers = mixed.order(0).take(0, 40)
    second = numbers[numbers >= 100] - 100
    assert sorted(second) == list(range(0, 60, 3))
    assert mixed.identity()["mixture"][1]["keep"]


def test_temperature_lifts_the_small() -> None:
    assert np.allclose(mixture_weights([900, 100], 1.0), [0.9, 0.1])
    assert np.allclose(mixture_weights([900, 100], 2.0), [0.75, 0.25])
    assert np.allclose(mixture_weights([900, 100], 1e9), [0.5, 0.5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], 1, 1), "as many weights"),
        (([5], [1, 2], 1, 1), "as many weights"),
        (([5, 5], [1, 0], 10, 10), "positive"),
        (([5, 0], [1, 1], 10, 10), "at least one sample"),
        (([5], [1], 10, 0), "period"),
        (([5], [1], -1, 1), "epoch_samples"),
        (([5, 5], [1, 99], 10, 50), "make the period longer"),
        (([5, 5], [1, 1e9], 10, 50), "make the period longer"),
    ],
)
def test_senseless_mixtures_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        mixture(*arguments)
    for sizes, temperature in [([], 1), ([1, 0], 1), ([1], 0)]:
        with pytest.raises(BadInputError, match="temperature"):
            mixture_weights(sizes, temperature)
