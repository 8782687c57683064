import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connectors.errors import BadInputError
from dataflow.order import BalancedParts, EqualParts, FixedBatches, Mixture, Schedule, Shuffle, WeightedParts
from dataflow.order.plan import BlockTable, plan_epoch


def schedule_of(
    sizes: list[int], batch: int, tail: str = "short", shuffle: str = "block"
) -> tuple[Schedule, BlockTable]:
    first_sample = np.concatenate([[0], np.cumsum(np.array(sizes, dtype=np.int64))])
    source = Shuffle(int(first_sample[-1]), first_sample, shuffle, seed=1, window_blocks=2)
    return Schedule(source, FixedBatches(batch, tail)), BlockTable(first_sample, np.array(sizes, dtype=np.int64) * 10)


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=10),
    batch=st.integers(1, 20),
    replicas=st.integers(1, 6),
    tail=st.sampled_from(["short", "drop", "pad"]),
)
def test_a_plan_accounts_for_every_sample(sizes: list[int], batch: int, replicas: int, tail: str) -> None:
    schedule, table = schedule_of(sizes, batch, tail)
    found = plan_epoch(schedule, EqualParts(), replicas, table, epoch=3, max_steps=None)
    rest = sum(sizes) % batch
    assert found.num_steps == found.walked_steps == schedule.batching.count_steps(sum(sizes))
    assert found.num_dropped == (rest if tail == "drop" else 0)
    assert found.num_repeated == 0
    assert sum(share.num_samples for share in found.replicas) == sum(sizes) - found.num_dropped
    assert sum(share.num_padding for share in found.replicas) == (batch - rest if rest and tail == "pad" else 0)


def test_bytes_and_blocks_are_those_of_the_parts() -> None:
    schedule, table = schedule_of([10, 0, 30], 20, shuffle="full")
    found = plan_epoch(schedule, EqualParts(), 1, table, epoch=0, max_steps=None)
    (only,) = found.replicas
    assert (only.sample_bytes, only.num_blocks, only.block_bytes) == (400, 2, 400)
    assert found.batch_units == found.part_units == (20, 20)
    assert found.balance_units == found.balance_bytes == 1.0


def test_unequal_parts_show_in_the_balance() -> None:
    schedule, table = schedule_of([40], 20)
    found = plan_epoch(schedule, WeightedParts((1.0, 3.0)), 2, table, epoch=0, max_steps=None)
    assert found.part_units == (5, 15)
    assert found.balance_units == pytest.approx(1.5)
    assert [share.num_samples for share in found.replicas] == [10, 30]


def test_a_part_of_an_epoch_claims_nothing_about_the_rest() -> None:
    schedule, table = schedule_of([100], 10)
    found = plan_epoch(schedule, EqualParts(), 2, table, epoch=0, max_steps=3)
    assert (found.num_steps, found.walked_steps, found.num_dropped) == (10, 3, None)
    assert sum(share.num_samples for share in found.replicas) == 30


def test_a_schedule_that_repeats_is_found_out() -> None:
    class Broken(Shuffle):
        def order(self, epoch: int):
            order = super().order(epoch)
            order.at = lambda positions: positions // 2
            return order

    _, table = schedule_of([100], 10)
    schedule = Schedule(Broken(100, None, False, 0, 1), FixedBatches(10, "short"))
    found = plan_epoch(schedule, EqualParts(), 2, table, epoch=0, max_steps=None)
    assert (found.num_dropped, found.num_repeated) == (50, 50)


def test_no_replica_or_no_step_is_refused() -> None:
    schedule, table = schedule_of([10], 10)
    for replicas, steps in [(0, None), (1, 0)]:
        with pytest.raises(BadInputError, match=">= 1"):
            plan_epoch(schedule, EqualParts(), replicas, table, epoch=0, max_steps=steps)


@given(
    sizes=st.lists(st.integers(5, 60), min_size=2, max_size=4),
    epoch_samples=st.integers(0, 400),
    period=st.integers(50, 90),
    epoch=st.integers(0, 3),
    batch=st.integers(1, 40),
)
@settings(max_examples=30)
def test_a_mixture_loses_and_repeats_nothing_in_the_own_epochs_of_its_datasets(
    sizes: list[int], epoch_samples: int, period: int, epoch: int, batch: int
) -> None:
    sources = tuple(Shuffle(size, None, "full", number, 1) for number, size in enumerate(sizes))
    weights = tuple(range(1, len(sizes) + 1))
    mixture = Mixture(sources, tuple(sizes), weights, epoch_samples, period, 5)
    tables = [BlockTable(np.array([0, size]), np.array([size])) for size in sizes]
    schedule = Schedule(mixture, FixedBatches(batch, "short"))
    found = plan_epoch(schedule, EqualParts(), 2, BlockTable.joined(tables), epoch=epoch, max_steps=None)
    assert (found.num_dropped, found.num_repeated) == (0, 0)
    assert sum(source.num_reads for source in found.sources) == epoch_samples
    assert [source.num_samples for source in found.sources] == sizes


def test_a_mixture_that_reads_one_sample_for_another_is_found_out() -> None:
    class Broken(Shuffle):
        def order(self, epoch: int):
            order = super().order(epoch)
            order.at = lambda positions: positions // 2 * 2
            return order

    sources = (Broken(100, None, False, 0, 1), Shuffle(100, None, "full", 0, 1))
    mixture = Mixture(sources, (100, 100), (1.0, 1.0), 200, 100, 5)
    table = BlockTable.joined([BlockTable(np.array([0, 100]), np.array([100]))] * 2)
    schedule = Schedule(mixture, FixedBatches(10, "short"))
    found = plan_epoch(schedule, EqualParts(), 2, table, epoch=0, max_steps=None)
    assert [(source.num_dropped, source.num_repeated) for source in found.sources] == [(50, 50), (0, 0)]


def test_costs_are_compared_with_equal_parts() -> None:
    schedule, table = schedule_of([400], 40)
    costs = np.random.default_rng(0).lognormal(0, 1, 400)
    balanced = plan_epoch(schedule, BalancedParts(costs), 4, table, epoch=0, max_steps=None, costs=costs)
    equal = plan_epoch(schedule, EqualParts(), 4, table, epoch=0, max_steps=None, costs=costs)
    assert balanced.balance_costs < balanced.equal_costs == equal.balance_costs == equal.equal_costs
