from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.errors import BadInputError
from dataflow.order import BucketBatches, Epoch, FixedBatches, PackedBatches, Place, Schedule, Shuffle

LENGTHS = np.random.default_rng(0).integers(1, 60, 400)


def batchings(num_samples: int) -> list[Any]:
    lengths = LENGTHS[:num_samples]
    return [
        FixedBatches(7, "short"),
        FixedBatches(7, "drop"),
        FixedBatches(7, "pad"),
        FixedBatches(70_000, "short"),
        BucketBatches(lengths, 240, 2, None, None, window_samples=90, seed=1),
        PackedBatches(lengths, 64, 5, window_samples=110, seed=1),
    ]


class SmallWindows(FixedBatches):
    """Fixed batches in windows of two, so that an epoch has many."""

    @property
    def window_samples(self) -> int:
        return 2 * self.global_batch_size


def epochs(num_samples: int) -> list[Epoch]:
    found = [*batchings(num_samples), SmallWindows(7, "short"), SmallWindows(7, "drop")]
    return [Schedule(Shuffle(num_samples, None, "full", 0, 1), batching).epoch(2) for batching in found]


@given(num_samples=st.integers(0, 400), data=st.data())
def test_a_place_leads_back_to_its_step_from_anywhere(num_samples: int, data: st.DataObject) -> None:
    for epoch in epochs(num_samples):
        batches = [batch.positions.tolist() for batch in epoch.batches()]
        assert len(batches) == len(epoch)
        if not batches:
            continue
        step = data.draw(st.integers(0, len(batches) - 1))
        known = epoch.place(data.draw(st.integers(0, len(batches) - 1)))
        place = epoch.place(step, known)
        assert place == epoch.place(step)
        epoch.check(place)
        assert epoch.batch(step, known).positions.tolist() == batches[step]
        window, inside = epoch.enter(place.position)
        assert epoch.window(window).batch(epoch.order, inside).positions.tolist() == batches[step]
        assert place.position == sum(map(len, batches[:step]))
        assert epoch.place(len(batches)) == Place(len(batches), num_samples)


def test_steps_outside_the_epoch_are_refused() -> None:
    for epoch in epochs(300):
        for step in (-1, len(epoch) + 1):
            with pytest.raises(BadInputError, match="step must lie in"):
                epoch.place(step)
        with pytest.raises(BadInputError, match="steps, counted from 0"):
            epoch.batch(len(epoch))
        with pytest.raises(BadInputError, match="no step of epoch 2 begins"):
            epoch.enter(300)
        with pytest.raises(BadInputError, match="no step of epoch 2 begins"):
            epoch.enter(-7)


def test_going_on_from_a_known_place_plans_no_window_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []
    plan = PackedBatches.plan

    def watched(self: PackedBatches, order: Any, epoch: int, start: int, stop: int) -> Any:
        planned.append(start)
        return plan(self, order, epoch, start, stop)

    batching = PackedBatches(LENGTHS, 64, 5, window_samples=50, seed=1)
    schedule = Schedule(Shuffle(400, None, "full", 0, 1), batching)
    place = schedule.epoch(0).place(31)
    monkeypatch.setattr(PackedBatches, "plan", watched)
    epoch = schedule.epoch(0)
    assert epoch.place(32, place).step == 32
    assert planned
    assert min(planned) == place.position // 50 * 50


def test_identity_names_all_that_decides_the_batches() -> None:
    source = Shuffle(400, None, "block", 7, 16)
    assert Schedule(source, FixedBatches(8, "drop")).identity() == {
        "shuffle": "full",
        "window_blocks": 16,
        "seed": 7,
        "global_batch_size": 8,
        "drop_last": True,
        "pad_last": False,
    }
    packed = Schedule(source, PackedBatches(LENGTHS, 64, 5, window_samples=50, seed=1)).identity()
    other = Schedule(source, PackedBatches(LENGTHS + 1, 64, 5, window_samples=50, seed=1)).identity()
    assert packed["lengths"] != other["lengths"]
