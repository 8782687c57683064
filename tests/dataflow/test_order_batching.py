import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.errors import BadInputError
from dataflow.order.batching import FixedBatches, GlobalBatch, Steps
from dataflow.order.shuffle import FullOrder, SequentialOrder


@given(num_samples=st.integers(1, 300), batch=st.integers(1, 60), tail=st.sampled_from(["short", "drop", "pad"]))
def test_a_tail_is_kept_dropped_or_filled(num_samples: int, batch: int, tail: str) -> None:
    batching = FixedBatches(batch, tail)
    order = SequentialOrder(num_samples)
    steps = batching.plan(order, 0, 0, num_samples)
    rest = num_samples % batch
    assert len(steps) == batching.count_steps(num_samples)
    found = [steps.batch(order, step) for step in range(len(steps))]
    expected = list(range(num_samples - rest if tail == "drop" else num_samples))
    if tail == "pad":
        padding = batch - rest if rest else 0
        expected += [position % num_samples for position in range(padding)]
        assert [b.num_padding for b in found] == [0] * (len(found) - 1) + [padding]
    assert np.concatenate([b.positions for b in found] or [[]]).tolist() == expected
    assert all(b.num_units == batch for b in found[: num_samples // batch])
    assert steps.consumed().tolist() == [*range(0, num_samples - rest + 1, batch)] + (
        [num_samples] if rest and tail != "drop" else []
    )


def test_windows_hold_whole_batches_and_are_never_much_larger_than_one() -> None:
    for batch in (1, 7, 1000, 65_536, 10**6):
        window = FixedBatches(batch, "short").window_samples
        assert window % batch == 0
        assert window <= max(2**18, batch)


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=12), data=st.data())
def test_units_of_several_samples_are_kept_together(lengths: list[int], data: st.DataObject) -> None:
    starts = np.concatenate([[0], np.cumsum(lengths)])
    order = FullOrder(int(starts[-1]), 0, 0)
    batch = GlobalBatch(order, np.arange(starts[-1]), starts, 0)
    units = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=12))
    expected = [position for unit in units for position in range(starts[unit], starts[unit + 1])]
    assert batch.num_units == len(lengths)
    assert batch.positions_of(np.array(units, dtype=np.int64)).tolist() == expected
    assert batch.unit_sums(np.ones(starts[-1], dtype=np.int64)).tolist() == lengths
    assert batch.samples().tolist() == order.take(0, len(order)).tolist()


@given(
    packs=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=5), min_size=1, max_size=5),
    seed=st.integers(0, 9),
)
def test_each_step_of_a_window_has_its_own_units_and_uses_up_their_positions(packs: list[list[int]], seed: int) -> None:
    lengths = [length for step in packs for length in step]
    positions = np.random.default_rng(seed).permutation(sum(lengths))
    steps = Steps(
        positions, np.concatenate([[0], np.cumsum(lengths)]), np.concatenate([[0], np.cumsum([len(p) for p in packs])])
    )
    order, ends = SequentialOrder(sum(lengths)), np.cumsum([0, *map(sum, packs)]).tolist()
    assert len(steps) == len(packs)
    assert steps.consumed().tolist() == ends
    for step, (pack, first, last) in enumerate(zip(packs, ends[:-1], ends[1:], strict=True)):
        batch = steps.batch(order, step)
        assert batch.positions.tolist() == positions[first:last].tolist()
        assert batch.unit_starts is not None
        assert batch.unit_starts.tolist() == [0, *np.cumsum(pack).tolist()]
        assert batch.num_padding == 0


def test_a_window_without_a_batch_uses_up_nothing() -> None:
    steps = FixedBatches(4, "drop").plan(SequentialOrder(3), 0, 0, 3)
    assert (len(steps), steps.consumed().tolist()) == (0, [0])


@given(start=st.integers(0, 5), num_samples=st.integers(1, 20), tail=st.sampled_from(["short", "drop", "pad"]))
def test_a_later_window_goes_on_with_the_positions_where_it_starts(start: int, num_samples: int, tail: str) -> None:
    order, batching = SequentialOrder(5 * 4 + num_samples), FixedBatches(4, tail)
    whole, rest = batching.plan(order, 0, 0, len(order)), batching.plan(order, 0, start * 4, len(order))
    assert len(rest) == len(whole) - start
    for step in range(len(rest)):
        assert rest.batch(order, step).positions.tolist() == whole.batch(order, start + step).positions.tolist()


def test_batchings_that_make_other_batches_have_other_identities() -> None:
    identities = [FixedBatches(size, tail).identity() for size in (4, 5) for tail in ("short", "drop", "pad")]
    assert identities[:3] == [
        {"global_batch_size": 4, "drop_last": False, "pad_last": False},
        {"global_batch_size": 4, "drop_last": True, "pad_last": False},
        {"global_batch_size": 4, "drop_last": False, "pad_last": True},
    ]
    assert len({str(identity) for identity in identities}) == 6


@pytest.mark.parametrize(("batch", "tail", "message"), [(0, "short", "global_batch_size"), (1, "keep", "'keep'")])
def test_bad_arguments_are_named(batch: int, tail: str, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        FixedBatches(batch, tail)
