"""Weights of unequal ranks, measured while they train and agreed on by all.

    seconds of each rank's own steps -> an exchange every so many steps -> the same weights -> from the same step on

The exchange is a collective of the training loop's thread: nothing is drawn while it lasts. Each rank says how many
steps its loader has drawn ahead, and the new weights hold from the first step that nobody has drawn. All compute them
from the same numbers, so no rank needs to be told. A rank that is killed before, in or after the exchange changes
nothing: weights are in the sampler's state, and what was measured since the last exchange is measured again.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed

from connectors.errors import BadInputError
from dataflow.loaders.schedule_sampler import ScheduleSampler
from dataflow.order import WeightedParts, calibrate

__all__ = ["Tuning", "WeightTuner"]

_log = logging.getLogger(__name__)

Gather: TypeAlias = Callable[[Any], list[Any]]


@dataclass(frozen=True, slots=True)
class Tuning:
    """What one exchange found; the same on every rank.

    Attributes:
        weights: Units a second of each replica.
        first_step: From which step of its epoch on batches are dealt by them; None where that would gain too little.
        measured_step_s: Median seconds of a step since the exchange before, the slowest replica counting.
        slowest_over_mean: How much longer the slowest replica took than the mean of all; median.
        predicted_step_s: What the exchange before said of these steps; None for the first.
        next_step_s: Seconds of a step that are predicted now.
    """

    weights: tuple[float, ...]
    first_step: int | None
    measured_step_s: float
    slowest_over_mean: float
    predicted_step_s: float | None
    next_step_s: float


class WeightTuner:
    """Measures the speed of each replica and lets the sampler deal batches by it, again and again.

    In a training loop::

        tuner = WeightTuner(sampler)
        for batch in loader:
            with tuner.computing(len(batch["label"])):
                ...  # what this rank does alone
            ...  # what waits for others

    The code in the block must not wait for other ranks, or all ranks look alike. If gradients are exchanged during the
    backward pass (DDP), measure the forward pass alone, which is in proportion to the rest. A replica counts as its
    slowest rank. Not thread-safe; every rank has one, and enters a block in each step.

    Args:
        sampler: Whose division is tuned; multiply losses by the gradient weights of its `part_at`.
        every_steps: Steps between two exchanges.
        least_gain: Weights stay as they are if new ones promise to save less than this share of a step.
        device: Where steps are computed; on an accelerator its events measure, and the host waits for them only at an
            exchange.
        gather: Brings an object of every rank to every rank, in order of ranks; by default
            `torch.distributed.all_gather_object` where that is initialised. Without either, there is one rank.
        clock: Seconds on the host.

    Attributes:
        tunings: What was found so far, the latest last; at most 1,000.

    Raises:
        BadInputError: An argument is out of range, or there are ranks to exchange with and no way to.
    """

    def __init__(
        self,
        sampler: ScheduleSampler,
        *,
        every_steps: int = 50,
        least_gain: float = 0.02,
        device: str | torch.device | None = None,
        gather: Gather | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if every_steps < 1 or not 0 <= least_gain < 1:
            raise BadInputError(f"need every_steps >= 1 and least_gain in [0, 1), got {every_steps} and {least_gain}")
        self._sampler = sampler
        self._every_steps = every_steps
        self._least_gain = least_gain
        self._gather = gather or _default_gather(sampler.world_size)
        device = None if device is None else torch.device(device)
        self._device = None if device is None or device.type == "cpu" else torch.get_device_module(device)
        self._clock = clock
        self._measured: list[tuple[int, Callable[[], float]]] = []
        self.tunings: list[Tuning] = []

    @contextlib.contextmanager
    def computing(self, units: int) -> Iterator[None]:
        """Measure the block; then, every so many steps, exchange what was measured with all ranks.

        Args:
            units: What this rank reads in the step: samples without padding, or packs; 0 where its part is empty.

        Raises:
            BadInputError: The ranks are not in one epoch.
        """
        finish = self._begin()
        yield
        self._measured.append((units, finish()))
        if len(self._measured) == self._every_steps:
            self._exchange()

    def _begin(self) -> Callable[[], Callable[[], float]]:
        """Start a watch; what is returned stops it, and what that returns reads it."""
        if self._device is None:
            began_s = self._clock()

            def stop() -> Callable[[], float]:
                elapsed_s = self._clock() - began_s
                return lambda: elapsed_s

            return stop
        begin, end = (self._device.Event(enable_timing=True) for _ in range(2))
        begin.record()

        def record() -> Callable[[], float]:
            end.record()

            def read() -> float:
                end.synchronize()
                return float(begin.elapsed_time(end)) / 1000

            return read

        return record

    def _exchange(self) -> None:
        sampler = self._sampler
        steps = [(units, read()) for units, read in self._measured]
        self._measured.clear()
        gathered = self._gather((sampler.replica, sampler.epoch, sampler.steps_drawn, steps))
        if len({epoch for _, epoch, _, _ in gathered}) > 1:
            raise BadInputError(
                f"ranks are in the epochs {[epoch for _, epoch, _, _ in gathered]}: enter `computing` once in every "
                "step, on every rank"
            )
        units, seconds = (np.zeros((self._every_steps, sampler.num_replicas)) for _ in range(2))
        for replica, _, _, of_rank in gathered:
            units[:, replica] = [number for number, _ in of_rank]
            seconds[:, replica] = np.maximum(seconds[:, replica], [second for _, second in of_rank])
        usable = ((units > 0) & (seconds > 0)).all(axis=1)
        if usable.any():
            self._tune(units[usable], seconds[usable], max(drawn for _, _, drawn, _ in gathered))
        else:
            _log.info("no step in which every replica had something to do: weights stay as they are")

    def _tune(self, units: Any, seconds: Any, first_step: int) -> None:
        found = calibrate(units, seconds)
        measured_s = float(np.median(seconds.max(axis=1)))
        gains = found.step_s < measured_s * (1 - self._least_gain)
        tuning = Tuning(
            weights=found.weights,
            first_step=first_step if gains else None,
            measured_step_s=measured_s,
            slowest_over_mean=float(np.median(seconds.max(axis=1) / seconds.mean(axis=1))),
            predicted_step_s=self.tunings[-1].next_step_s if self.tunings else None,
            next_step_s=found.step_s if gains else measured_s,
        )
        self.tunings = [*self.tunings[-999:], tuning]
        if gains:
            self._sampler.set_division(WeightedParts(found.weights), step=first_step)
        _log.info(
            "steps took %.4g s (predicted: %s), slowest over mean %.3f; %s",
            measured_s,
            "nothing" if tuning.predicted_step_s is None else f"{tuning.predicted_step_s:.4g} s",
            tuning.slowest_over_mean,
            f"new weights from step {first_step} on, for {found.step_s:.4g} s" if gains else "weights stay",
        )


def _default_gather(world_size: int) -> Gather:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        size = torch.distributed.get_world_size()
        if size != world_size:
            raise BadInputError(
                f"the sampler has {world_size} ranks and torch.distributed {size}: pass gather= to exchange among yours"
            )
        return _all_gather
    if world_size > 1:
        raise BadInputError(
            f"{world_size} ranks have to exchange what they measure: initialise torch.distributed, or pass gather="
        )
    return lambda own: [own]


def _all_gather(own: Any) -> list[Any]:
    gathered = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, own)
    return gathered
