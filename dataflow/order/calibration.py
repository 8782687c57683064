"""From measured step times to the weights of unequal replicas."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from connectors.errors import BadInputError

__all__ = ["Calibration", "calibrate"]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What replicas of unequal speed can do together.

    Attributes:
        weights: Units a second of each replica: what `WeightedParts` takes.
        step_s: Predicted seconds of a step when parts follow the weights.
        equal_step_s: Predicted seconds of a step of equal parts, where all wait for the slowest.
    """

    weights: tuple[float, ...]
    step_s: float
    equal_step_s: float


def calibrate(units: npt.ArrayLike, seconds: npt.ArrayLike) -> Calibration:
    """Fit one speed per replica to some steps: the median over steps, so that a hiccup counts for nothing.

    Gather the numbers of all ranks first (`torch.distributed.all_gather_object`): every rank needs the same weights.

    >>> calibrate(units=[[32, 32], [32, 32]], seconds=[[0.1, 0.2], [0.1, 0.2]]).weights
    (320.0, 160.0)

    Args:
        units: Units that each replica read, steps by replicas.
        seconds: How long each computed on them, waiting left out; of the same shape.

    Raises:
        BadInputError: The shapes differ, nothing was measured, or a number is not above 0.
    """
    read, spent = np.asarray(units, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    if read.ndim != 2 or read.shape != spent.shape or not read.size:
        raise BadInputError(f"units and seconds must be steps by replicas, got shapes {read.shape} and {spent.shape}")
    if not ((read > 0) & (spent > 0) & np.isfinite(spent)).all():
        raise BadInputError("every replica must have read something in every measured step, and taken time for it")
    speeds = np.median(read / spent, axis=0)
    batch = float(read.sum(axis=1).mean())
    return Calibration(
        weights=tuple(speeds.tolist()),
        step_s=batch / float(speeds.sum()),
        equal_step_s=batch / len(speeds) / float(speeds.min()),
    )
