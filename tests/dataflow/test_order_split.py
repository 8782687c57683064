import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.errors import BadInputError
from dataflow.order.batching import GlobalBatch
from dataflow.order.shuffle import SequentialOrder
from dataflow.order.split import EqualParts, Parts, WeightedParts, divide, part_bounds, split_batch


@given(length=st.integers(0, 500), world_size=st.integers(1, 70))
def test_parts_are_disjoint_complete_and_near_equal(length: int, world_size: int) -> None:
    samples = np.arange(length)
    parts = [split_batch(samples, rank, world_size) for rank in range(world_size)]
    assert np.array_equal(np.concatenate(parts), samples)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_huge_lengths_do_not_overflow() -> None:
    assert part_bounds(2**62, 1023, 1024) == (2**62 - 2**52, 2**62)


@pytest.mark.parametrize(("rank", "world_size"), [(4, 4), (-1, 4), (0, 0)])
def test_a_rank_outside_the_world_is_refused(rank: int, world_size: int) -> None:
    with pytest.raises(BadInputError, match=f"rank {rank} of world size {world_size}"):
        part_bounds(8, rank, world_size)


def whole_batch(num_samples: int, num_padding: int = 0) -> GlobalBatch:
    return GlobalBatch(SequentialOrder(num_samples), np.arange(num_samples), None, num_padding)


def assert_complete(parts: Parts, num_units: int) -> None:
    assert np.array_equal(np.sort(parts.units), np.arange(num_units))
    assert parts.starts[0] == 0
    assert parts.starts[-1] == num_units
    assert (np.diff(parts.starts) >= 0).all()


@given(length=st.integers(0, 200), num_parts=st.integers(1, 20))
def test_equal_parts_are_those_of_split_batch(length: int, num_parts: int) -> None:
    parts = divide(EqualParts(), whole_batch(length), num_parts)
    assert_complete(parts, length)
    for replica in range(num_parts):
        assert parts.of(replica).tolist() == split_batch(np.arange(length), replica, num_parts).tolist()


@given(length=st.integers(0, 200), weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=12))
def test_weighted_parts_are_within_one_unit_of_their_share(length: int, weights: list[float]) -> None:
    parts = divide(WeightedParts(tuple(weights)), whole_batch(length), len(weights))
    assert_complete(parts, length)
    exact = np.array(weights) / sum(weights) * length
    assert (abs(np.diff(parts.starts) - exact) <= 1 + 1e-9).all()


@given(
    length=st.integers(1, 100),
    weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=8),
    data=st.data(),
)
def test_gradient_weights_make_the_mean_over_replicas_the_mean_over_the_batch(
    length: int, weights: list[float], data: st.DataObject
) -> None:
    num_padding = data.draw(st.integers(0, length - 1))
    parts = divide(WeightedParts(tuple(weights)), whole_batch(length, num_padding), len(weights))
    losses = np.arange(length) ** 2.0
    total = 0.0
    for replica in range(len(weights)):
        own = parts.of(replica)
        real = own[: len(own) - parts.num_padding[replica]]
        assert set(own[len(real) :]) <= set(range(length - num_padding, length))
        if len(real):
            total += parts.gradient_weight(replica) * losses[real].mean()
        else:
            assert parts.gradient_weight(replica) == 0.0
    assert np.isclose(total / len(weights), losses[: length - num_padding].mean())


@given(length=st.integers(1, 60), num_parts=st.integers(1, 12), data=st.data())
def test_padding_evens_the_parts_out(length: int, num_parts: int, data: st.DataObject) -> None:
    num_padding = data.draw(st.integers(0, length - 1))
    parts = divide(EqualParts(), whole_batch(length, num_padding), num_parts)
    assert_complete(parts, length)
    sizes = np.diff(parts.starts)
    assert sizes.max() - sizes.min() <= 1
    assert parts.num_padding.sum() == num_padding


def test_weights_that_do_not_fit_are_refused() -> None:
    for weights in [(), (1.0, 0.0), (1.0, -1.0), (float("nan"),), (float("inf"),)]:
        with pytest.raises(BadInputError, match="weights"):
            WeightedParts(weights)
    with pytest.raises(BadInputError, match="2 weights for 3 replicas"):
        divide(WeightedParts((1.0, 2.0)), whole_batch(9), 3)
