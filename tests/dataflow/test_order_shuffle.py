import pickle
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connectors.errors import BadInputError
from dataflow.order.feistel import Permutation
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


def many_blocks(num_blocks: int) -> list[int]:
    """More blocks than one group has, some of them empty."""
    return np.random.default_rng(num_blocks).integers(0, 5, num_blocks).tolist()


@given(num_blocks=st.integers(32_768, 45_000), window=st.integers(1, 64), data=st.data())
@settings(max_examples=8)
def test_any_part_of_many_blocks_equals_that_part_of_the_whole(
    num_blocks: int, window: int, data: st.DataObject
) -> None:
    table = first_sample(many_blocks(num_blocks))
    order = BlockOrder(table, 1, 2, window)
    whole = order.take(0, len(order))
    assert np.array_equal(np.sort(whole), np.arange(len(order)))
    start = data.draw(st.integers(0, len(order)))
    stop = data.draw(st.integers(start, min(start + 2000, len(order))))
    assert np.array_equal(order.take(start, stop), whole[start:stop])
    anew = BlockOrder(table, 1, 2, window)
    positions = np.array(data.draw(st.lists(st.integers(0, len(order) - 1), max_size=20)), dtype=np.int64)
    assert np.array_equal(anew.at(positions), whole[positions])


def test_positions_at_the_border_of_groups_are_those_of_the_whole() -> None:
    table = first_sample(many_blocks(33_000))
    order = BlockOrder(table, 1, 2, 64)
    whole, ends = order.take(0, len(order)), order._group_ends[:3].tolist()
    assert [int(BlockOrder(table, 1, 2, 64).take(end, end + 1)[0]) for end in ends] == whole[ends].tolist()
    walked = BlockOrder(table, 1, 2, 64)
    parts = [walked.take(start, start + 100) for start in range(0, ends[-1], 100)]  # some of them lie in two groups
    assert np.array_equal(np.concatenate(parts), whole[: len(parts) * 100])


def test_the_tables_of_a_group_are_made_once_while_it_is_walked() -> None:
    order = BlockOrder(np.arange(33_000), 1, 2, 64)
    order.take(0, 10)
    opened = order._opened
    assert len(opened.groups) == 1
    order.take(10, 20)
    assert order._opened is opened


def test_blocks_are_dealt_to_many_groups_or_are_one() -> None:
    tables = (np.arange(num_blocks + 1) for num_blocks in (1024, 32_767, 32_768))
    assert [BlockOrder(table, 0, 0, 64)._num_groups for table in tables] == [1, 1, 64]
    assert BlockOrder(np.arange(200_000), 0, 0, 256)._num_groups == 64  # of 8 windows or more


@pytest.mark.parametrize(("num_blocks", "window"), [(32_768, 64), (40_000, 1), (33_333, 7)])
def test_many_blocks_are_spread_over_one_window_each(num_blocks: int, window: int) -> None:
    check_windows(many_blocks(num_blocks), window)


@given(sizes=block_sizes, window=st.integers(1, 12))
def test_a_block_is_spread_over_one_window_only(sizes: list[int], window: int) -> None:
    check_windows(sizes, window)


def check_windows(sizes: list[int], window: int) -> None:
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


def test_going_on_among_a_million_blocks_looks_at_one_group_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    permuted = []
    apply = Permutation.apply

    def watched(self: Permutation, elements: np.ndarray, *rest: Any) -> np.ndarray:
        permuted.append(elements.size)
        return apply(self, elements, *rest)

    monkeypatch.setattr(Permutation, "apply", watched)
    table = np.arange(0, 10**9 + 1, 1000)
    tracemalloc.start()
    order = BlockOrder(table, 0, 0, 64)
    begun_bytes, _ = tracemalloc.get_traced_memory()
    order.take(500_000_000, 500_000_256)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(permuted) < 20_000
    assert begun_bytes < 200_000
    assert peak_bytes < 2_000_000, "beside one bit of scratch a block, while the table is checked"


def test_many_blocks_are_as_mixed_as_by_a_permutation() -> None:
    num_blocks, num_epochs = 40_000, 20
    table = np.arange(num_blocks + 1)
    orders = np.array([BlockOrder(table, 0, epoch, 1).take(0, num_blocks) for epoch in range(num_epochs)])
    places = np.argsort(orders, axis=1)
    # Each block lands everywhere: its mean place over the epochs is within 6 standard deviations of the middle.
    deviation = num_blocks / 12**0.5
    assert np.abs(places.mean(axis=0) - (num_blocks - 1) / 2).max() < 6 * deviation / num_epochs**0.5
    # Its place tells nothing of where it is stored, nor of the places of others near it or far from it, nor of the
    # epoch before: a permutation has a correlation of 0.005, and not being in one group with its row brings 0.016.
    stored = np.arange(num_blocks)
    for epoch in range(1, num_epochs):
        own = places[epoch]
        for other in (stored, *(np.roll(own, lag) for lag in (1, 2, 32, 64, 4096)), places[epoch - 1]):
            assert abs(np.corrcoef(own, other)[0, 1]) < 0.05
    distance = np.abs(np.diff(places, axis=1)).mean()
    assert abs(distance / (num_blocks / 3) - 1) < 0.02


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
