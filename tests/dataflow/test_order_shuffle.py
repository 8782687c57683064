import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.errors import BadInputError
from dataflow.order.shuffle import BlockOrder, FullOrder, Order, SequentialOrder

block_sizes = st.lists(st.one_of(st.just(0), st.integers(0, 40)), max_size=30)


def first_sample(sizes: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.array(sizes, dtype=np.int64))])


def all_orders(sizes: list[int], seed: int, epoch: int, window_blocks: int) -> list[Order]:
    n = sum(sizes)
    return [SequentialOrder(n), FullOrder(n, seed, epoch), BlockOrder(first_sample(sizes), seed, epoch, window_blocks)]


@given(sizes=block_sizes, seed=st.integers(0, 99), epoch=st.integers(0, 99), window=st.integers(1, 12))
def test_every_order_holds_each_sample_once(sizes: list[int], seed: int, epoch: int, window: int) -> None:
    for order in all_orders(sizes, seed, epoch, window):
        assert np.array_equal(np.sort(order.take(0, len(order))), np.arange(sum(sizes)))


@given(sizes=block_sizes, window=st.integers(1, 12), data=st.data())
def test_any_part_equals_that_part_of_the_whole(sizes: list[int], window: int, data: st.DataObject) -> None:
    for order in all_orders(sizes, 1, 2, window):
        whole = order.take(0, len(order))
        start = data.draw(st.integers(0, len(order)))
        stop = data.draw(st.integers(start, len(order)))
        assert np.array_equal(order.take(start, stop), whole[start:stop])
        if len(order):
            positions = np.array(data.draw(st.lists(st.integers(0, len(order) - 1), max_size=20)), dtype=np.int64)
            assert np.array_equal(order.at(positions), whole[positions])


@given(sizes=block_sizes, window=st.integers(1, 12))
def test_a_block_is_spread_over_one_window_only(sizes: list[int], window: int) -> None:
    order = BlockOrder(first_sample(sizes), 3, 0, window)
    block_of = np.repeat(np.arange(len(sizes)), sizes)[order.take(0, len(order))]
    open_blocks: set[int] = set()
    remaining = dict(enumerate(sizes))
    # Walk the epoch: a window ends where all blocks seen since its beginning are complete.
    for block in block_of.tolist():
        open_blocks.add(block)
        remaining[block] -= 1
        assert len(open_blocks) <= window
        if not any(remaining[b] for b in open_blocks):
            open_blocks.clear()
    assert not open_blocks


def test_window_of_all_blocks_mixes_all_samples() -> None:
    order = BlockOrder(first_sample([100] * 50), 0, 0, 50)
    block_of = order.take(0, 5000) // 100
    # A block's 100 samples are uniform over the epoch: the deviation of their positions is near n / sqrt(12).
    positions = np.argsort(order.take(0, 5000)).reshape(50, 100)
    assert abs(positions.std(axis=1).mean() / (5000 / 12**0.5) - 1) < 0.05
    assert len(np.unique(block_of[:200])) > 45


def test_epochs_and_seeds_differ_and_repeat_exactly() -> None:
    sizes = [7] * 40
    for make in (lambda s, e: FullOrder(280, s, e), lambda s, e: BlockOrder(first_sample(sizes), s, e, 8)):
        base = make(0, 0).take(0, 280)
        assert np.array_equal(base, make(0, 0).take(0, 280))
        assert (base != make(0, 1).take(0, 280)).mean() > 0.9
        assert (base != make(1, 0).take(0, 280)).mean() > 0.9


def test_blocks_stand_in_another_order_each_epoch() -> None:
    leading = {BlockOrder(first_sample([5] * 20), 0, epoch, 1).take(0, 1)[0] // 5 for epoch in range(40)}
    assert len(leading) > 10


def test_the_end_of_a_huge_order_costs_no_memory_per_sample() -> None:
    n = 10**12
    tracemalloc.start()
    order = FullOrder(n, 0, 0)
    tail = order.take(n - 1000, n)
    blocks = BlockOrder(np.arange(1001, dtype=np.int64) * 10**9, 0, 0, 64)
    far = blocks.take(n - 1000, n)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(np.unique(tail)) == len(np.unique(far)) == 1000
    assert peak_bytes < 2_000_000


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 11)])
def test_positions_outside_are_refused(start: int, stop: int) -> None:
    for order in all_orders([5, 5], 0, 0, 1):
        with pytest.raises(BadInputError, match="10 samples"):
            order.take(start, stop)


@pytest.mark.parametrize("bad", [[1, 2], [0, 3, 2], [], [[0, 1]]])
def test_a_broken_block_table_is_refused(bad: list) -> None:
    with pytest.raises(BadInputError, match="first_sample"):
        BlockOrder(np.array(bad, dtype=np.int64), 0, 0, 4)


def test_a_window_without_blocks_is_refused() -> None:
    with pytest.raises(BadInputError, match="window_blocks"):
        BlockOrder(np.array([0, 5]), 0, 0, 0)


def test_negative_length_is_refused() -> None:
    with pytest.raises(BadInputError, match="-1"):
        FullOrder(-1, 0, 0)


def test_orders_survive_pickling() -> None:
    for order in all_orders([3, 0, 9], 5, 6, 2):
        assert np.array_equal(pickle.loads(pickle.dumps(order)).take(0, 12), order.take(0, 12))
