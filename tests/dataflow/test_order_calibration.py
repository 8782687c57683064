import numpy as np
import pytest

from connectors.errors import BadInputError
from dataflow.order import EqualParts, GlobalBatch, SequentialOrder, WeightedParts, calibrate, divide

SPEEDS = np.array([100.0, 200.0, 100.0, 330.0])


def step_seconds(division, global_batch_size: int) -> np.ndarray:
    batch = GlobalBatch(SequentialOrder(global_batch_size), np.arange(global_batch_size), None, 0)
    return np.diff(divide(division, batch, len(SPEEDS)).starts) / SPEEDS


def test_unequal_replicas_end_a_step_together_after_one_calibration() -> None:
    equal = step_seconds(EqualParts(), 256)
    rng = np.random.default_rng(0)
    noisy = equal * rng.normal(1, 0.02, (50, 4))
    noisy[7, 1] = 30.0  # one step in which a rank was stopped
    found = calibrate(np.full((50, 4), 64), noisy)
    assert np.allclose(found.weights, SPEEDS, rtol=0.02)
    weighted = step_seconds(WeightedParts(found.weights), 256)
    assert weighted.max() == pytest.approx(found.step_s, rel=0.03)
    assert equal.max() == pytest.approx(found.equal_step_s, rel=0.02)


def test_mixed_throughput_is_nearly_the_sum_of_solo_throughputs() -> None:
    together = 256 / step_seconds(WeightedParts(tuple(SPEEDS)), 256).max() / SPEEDS.sum()
    equal = 256 / step_seconds(EqualParts(), 256).max() / SPEEDS.sum()
    assert together > 0.97
    assert equal < 0.56


@pytest.mark.parametrize(
    ("units", "seconds"), [([[1, 1]], [[1]]), ([], []), ([[0, 1]], [[1, 1]]), ([[1]], [[0]]), ([[1]], [[np.inf]])]
)
def test_senseless_measurements_are_refused(units: list, seconds: list) -> None:
    with pytest.raises(BadInputError):
        calibrate(units, seconds)
