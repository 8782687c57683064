import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dataflow.order import BalancedParts, EqualParts, FullOrder, GlobalBatch, SequentialOrder, divide


def loads(parts, costs: np.ndarray) -> np.ndarray:
    return np.array([costs[parts.of(replica)].sum() for replica in range(len(parts.starts) - 1)])


@given(costs=st.lists(st.integers(0, 1000), min_size=1, max_size=120), num_parts=st.integers(1, 10))
def test_counts_stay_equal_and_nothing_is_lost(costs: list[int], num_parts: int) -> None:
    array = np.array(costs)
    parts = divide(
        BalancedParts(array), GlobalBatch(SequentialOrder(len(costs)), np.arange(len(costs)), None, 0), num_parts
    )
    assert np.array_equal(np.sort(parts.units), np.arange(len(costs)))
    sizes = np.diff(parts.starts)
    assert sizes.max() - sizes.min() <= 1
    load = loads(parts, array)
    # The greedy rule: no part is ahead of another by more than one unit's cost.
    assert load.max() - load.min() <= array.max()


def test_slowest_over_mean_falls_from_a_fifth_to_a_few_thousandths() -> None:
    costs = np.minimum(np.random.default_rng(0).lognormal(6, 1, 64_000), 4096)
    before, after = [], []
    for start in range(0, 64_000, 1024):
        batch = GlobalBatch(FullOrder(64_000, 0, 0), np.arange(start, min(start + 1024, 64_000)), None, 0)
        own = costs[batch.samples()]
        for division, found in [(EqualParts(), before), (BalancedParts(costs), after)]:
            load = loads(divide(division, batch, 16), own)
            found.append(load.max() / load.mean())
    assert np.mean(before) > 1.2
    assert np.mean(after) < 1.005


def test_packs_are_weighed_whole() -> None:
    starts = np.array([0, 3, 4, 6, 7])
    costs = np.array([1, 1, 1, 3, 5, 5, 10])
    batch = GlobalBatch(SequentialOrder(7), np.arange(7), starts, 0)
    parts = divide(BalancedParts(costs), batch, 2)
    assert sorted(map(sorted, (parts.of(0).tolist(), parts.of(1).tolist()))) == [[0, 2], [1, 3]]
