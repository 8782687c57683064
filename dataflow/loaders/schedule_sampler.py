"""The sampler that deals the global batches of any schedule to ranks.

A state is a place in the schedule, which knows nothing of ranks and workers, so any other number of them goes on from
it.
"""

from __future__ import annotations

import logging
import operator
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch.distributed
from torch.utils.data import Sampler

from connectors.errors import BadInputError
from dataflow.order import (
    BEGINNING,
    Division,
    Epoch,
    EqualParts,
    GlobalBatch,
    Mesh,
    Place,
    Schedule,
    WeightedParts,
    divide,
    rank_from_environment,
)

__all__ = ["Part", "ScheduleSampler", "find_rank", "look_up"]

_log = logging.getLogger(__name__)

STATE_VERSION = 1
# Own samples looked up at once, in the end: enough that numpy's cost per call vanishes, few enough for the L2 cache.
# The first look is for one step and each next one for twice as many samples, so that no first batch waits for others.
_LOOK_AHEAD_SAMPLES = 1 << 15


# Sample numbers, or one list of them for each pack.
_Units: TypeAlias = "npt.NDArray[np.int64] | list[list[int]]"


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank reads in one step.

    Attributes:
        units: As the sampler yields it: sample numbers, or one list of sample numbers per pack.
        gradient_weight: Factor for the mean loss of this rank's units (without padding) that makes the average over
            replicas equal the average over the global batch; 1.0 where all parts are equal.
        num_padding: How many units at the end only repeat others, to be left out of the loss.
    """

    units: list[Any]
    gradient_weight: float
    num_padding: int


class _Run:
    """One pass over an epoch: the place where it begins, how many steps of the epoch are drawn, and how they are dealt.

    Attributes:
        divisions: From which step on (ascending) batches are dealt how; steps before the first are dealt like it.
    """

    def __init__(self, schedule: Schedule, division: Division, epoch: int, first: Place = BEGINNING) -> None:
        self.divisions = [(first.step, division)]
        self.epoch = epoch
        self.first = first
        self.step = first.step
        self._schedule = schedule

    @cached_property
    def plan(self) -> Epoch:
        """The epoch's batches; made when first needed, since a block order costs a pass over the blocks."""
        return self._schedule.epoch(self.epoch)

    def division_at(self, step: int) -> Division:
        """Return how a step is dealt."""
        if len(self.divisions) == 1:
            return self.divisions[0][1]
        return next((division for first, division in reversed(self.divisions) if first <= step), self.divisions[0][1])

    def divide_from(self, step: int, division: Division) -> None:
        """Deal `step` and all that follow in this way."""
        self.divisions = [(first, kept) for first, kept in self.divisions if first < step] + [(step, division)]


class ScheduleSampler(Sampler[list[Any]]):
    """Yields this rank's part of every global batch; give it to a `DataLoader` as `batch_sampler`.

    All ranks have the same number of steps. If a global batch has fewer units (samples or packs) than there are
    replicas, some parts are empty lists.

    Every iterator walks the next epoch. The first walks epoch 0, or the one that `set_epoch` named, or continues where
    a loaded state says. An iterator takes its epoch at its first draw, because torch's loader makes one that it never
    uses. Not thread-safe. The sampler looks up its rank once, when it is made: initialise torch.distributed before.
    Iterating raises `BadInputError` if it was initialised later and gives another rank.

    Args:
        schedule: The global batches; the same on every rank.
        fingerprint: Names the data that the sample numbers belong to; a state with another one is refused.
        rank: This process; by default from torch.distributed when it is initialised, else from the launcher's
            environment (`dataflow.order.rank_from_environment`), else 0 of 1.
        world_size: The number of processes; given together with `rank` or not at all.
        mesh: Which ranks read the same samples; by default each rank reads its own.
        division: How a global batch is dealt to replicas; the same on every rank, and free to change at a resume.

    Raises:
        BadInputError: An argument is out of range or the arguments do not fit together.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        fingerprint: str,
        rank: int | None = None,
        world_size: int | None = None,
        mesh: Mesh | None = None,
        division: Division = EqualParts(),  # noqa: B008  frozen and empty
    ) -> None:
        self._is_told = rank is not None
        self.rank, self.world_size = find_rank(rank, world_size)
        if mesh is not None and mesh.num_ranks != self.world_size:
            raise BadInputError(f"the mesh has {mesh.num_ranks} ranks and the job {self.world_size}; they must agree")
        self.replica = self.rank if mesh is None else mesh.replica_of(self.rank)
        self.num_replicas = self.world_size if mesh is None else mesh.num_replicas
        self.schedule = schedule
        self._given_division = self._division = division
        self._identity = {"version": STATE_VERSION, "fingerprint": fingerprint, **schedule.identity()}
        self._run = self._next = _Run(schedule, division, 0)

    def __len__(self) -> int:
        """The number of steps of a whole epoch, the same on every rank.

        Where it depends on the lengths of samples it may differ from epoch to epoch; then this plans the whole current
        epoch, once.
        """
        known = self.schedule.batching.count_steps(self.schedule.source.num_samples)
        return len(self._run.plan) if known is None else known

    def __iter__(self) -> Iterator[list[Any]]:
        """Walk the next epoch.

        Raises:
            BadInputError: The sampler looked up its rank before torch.distributed was initialised, and found another.
        """
        found = None if self._is_told else _job_rank()
        if found is not None and found != (self.rank, self.world_size):
            raise BadInputError(
                f"this sampler was made before torch.distributed was initialised, for rank {self.rank} of "
                f"{self.world_size}, and the process is rank {found[0]} of {found[1]}: make it afterwards, or pass "
                "rank= and world_size="
            )
        self._run = self._next
        return _Walk(self._draw())

    @property
    def sampler(self) -> ScheduleSampler:
        """The sampler itself: what knows torch's batch samplers calls `set_epoch` of the sampler inside."""
        return self

    @property
    def epoch(self) -> int:
        """The epoch that the newest iterator walks; before there is one, the epoch that it will walk."""
        return self._run.epoch

    @property
    def first_step(self) -> int:
        """The step of its epoch at which the newest iterator begins: 0, unless a state was loaded."""
        return self._run.first.step

    def set_epoch(self, epoch: int) -> None:
        """Let the next iterator walk this epoch; a loaded position inside the same epoch is kept."""
        if self._next.epoch != operator.index(epoch):
            self._next = _Run(self.schedule, self._division, operator.index(epoch))
        self._run = self._next

    @property
    def steps_drawn(self) -> int:
        """How far the newest iterator is in its epoch, in steps; a loader with workers draws ahead of training."""
        return self._run.step

    def set_division(self, division: Division, *, step: int | None = None) -> None:
        """Deal batches this way from now on, such as by weights measured anew; on every rank the same.

        Global batches stay what they are. `WeightedParts` that were set become part of states: the same number of
        replicas goes on with them, any other with the division that its samplers are made with.

        Args:
            division: How.
            step: From this step of the current epoch on, which no rank may have drawn yet (`steps_drawn`); by default
                from the next iterator on, and an epoch that is under way goes on as it began.

        Raises:
            BadInputError: The step was drawn already.
        """
        if step is not None:
            if step < self._run.step:
                raise BadInputError(f"step {step} was drawn already, as one of {self._run.step}; name a later one")
            self._run.divide_from(step, division)
        self._division = division
        if self._next is not self._run or step is None:
            self._next.divisions = [(self._next.first.step, division)]

    def division_of(self, epoch: int) -> Division:
        """Return how the batches of an epoch are dealt in the end, as far as that is known now."""
        return self._run.divisions[-1][1] if epoch == self._run.epoch else self._division

    def part_at(self, step: int) -> Part:
        """Return what this rank reads in a step of the current epoch, counted from the epoch's beginning.

        Raises:
            BadInputError: The epoch has no such step.
        """
        batch = self._run.plan.batch(step, self._run.first)
        parts = divide(self._run.division_at(step), batch, self.num_replicas)
        return Part(
            units=_units_of(batch, parts.of(self.replica)),
            gradient_weight=parts.gradient_weight(self.replica),
            num_padding=int(parts.num_padding[self.replica]),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the steps that the newest iterator has yielded, as plain JSON.

        Whoever draws ahead of training wants `state_at` instead.
        """
        return self.state_at(self._run.step)

    def state_at(self, step: int) -> dict[str, Any]:
        """Return the state after the first `step` steps of the current epoch, counted from the epoch's beginning.

        After the last step that is the beginning of the next epoch. Rank and world size are not part of it: any number
        of ranks may load the same state.

        Raises:
            BadInputError: The epoch has fewer steps.
        """
        run = self._run
        place = run.first if step == run.first.step else run.plan.place(step, run.first)
        epoch = run.epoch
        if place.step and place.position == self.schedule.source.num_samples:
            epoch, place = epoch + 1, BEGINNING
        state = {**self._identity, "epoch": epoch, "position": place.position, "step": place.step}
        weights = self._weights_from(place.step) if epoch == run.epoch else self._weights_of(self._division, 0)
        return {**state, "replica_weights": weights} if weights else state

    def _weights_from(self, step: int) -> list[list[Any]]:
        """Return the weights that were set and hold from a step of the current epoch on."""
        later = [(first, division) for first, division in self._run.divisions if first > step]
        in_force = (step, self._run.division_at(step))
        return [entry for first, division in (in_force, *later) for entry in self._weights_of(division, first)]

    def _weights_of(self, division: Division, first: int) -> list[list[Any]]:
        if not isinstance(division, WeightedParts) or division is self._given_division:
            return []
        return [[first, list(division.weights)]]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iterator go on from `state`, for the price of planning one window. Every rank loads the same.

        Raises:
            BadInputError: The state is damaged or of another version, dataset, order or batch size; nothing changes.
        """
        if not isinstance(state, Mapping):
            raise BadInputError(f"a sampler state is a mapping, got {type(state).__qualname__}")
        missing = [name for name in (*self._identity, "epoch", "position", "step") if name not in state]
        if missing and state.get("version", STATE_VERSION) == STATE_VERSION:
            raise BadInputError(f"the sampler state lacks {', '.join(missing)}")
        for name, own in self._identity.items():
            if state[name] != own or type(state[name]) is not type(own):
                raise BadInputError(_MISFITS.get(name, _MISFIT).format(name=name, theirs=state[name], own=own))
        numbers = {name: state[name] for name in ("epoch", "position", "step")}
        if not all(type(number) is int for number in numbers.values()) or min(numbers["position"], numbers["step"]) < 0:
            raise BadInputError(f"epoch, position and step of a sampler state are whole numbers, got {numbers}")
        run = _Run(self.schedule, self._division, numbers["epoch"], Place(numbers["step"], numbers["position"]))
        for first, division in self._divisions_in(state):
            run.divide_from(first, division)
        if run.first != BEGINNING:
            run.plan.check(run.first)
        self._run = self._next = run
        self._division = run.divisions[-1][1]

    def _divisions_in(self, state: Mapping[str, Any]) -> list[tuple[int, Division]]:
        """Return the weights that a state holds, where they are those of as many replicas."""
        try:
            found = [
                (operator.index(first), tuple(map(float, weights)))
                for first, weights in state.get("replica_weights", ())
            ]
        except (TypeError, ValueError):
            raise BadInputError(f"the weights of the sampler state are damaged: {state['replica_weights']!r}") from None
        if any(len(weights) != self.num_replicas for _, weights in found):
            _log.info("the state has weights of another number of replicas than %d: not used", self.num_replicas)
            return []
        return [(first, WeightedParts(weights)) for first, weights in found]

    def _draw(self) -> Iterator[_Units]:
        run = self._run = self._next
        self._next = _Run(self.schedule, self._division, run.epoch + 1)
        window, inside = run.plan.enter(run.first.position) if run.first.position else (0, 0)
        while window < run.plan.num_windows:
            divisions = run.divisions
            for units in self._read(run, window, inside):
                run.step += 1
                inside += 1
                yield units
                if run.divisions is not divisions:
                    break  # what was looked up ahead is dealt anew
            else:
                window, inside = window + 1, 0

    def _read(self, run: _Run, window: int, first: int) -> Iterator[_Units]:
        """Yield this rank's part of each step of a window, from step `first` on, the next one to be drawn."""
        drawn = run.step - first

        def own(step: int, batch: GlobalBatch) -> npt.NDArray[np.int64]:
            return divide(run.division_at(drawn + step), batch, self.num_replicas).of(self.replica)

        for batch, units, samples in look_up(run.plan, window, first, own):
            yield _pack(batch, units, samples)


_MISFIT = (
    "the sampler state was saved with {name}={theirs!r} and this sampler has {own!r}, which changes the "
    "order of samples: build the sampler as it was, or begin without the state"
)
_MISFITS = {
    "version": "the sampler state has version {theirs!r} and this release reads {own}; use the release that wrote it",
    "fingerprint": (
        "the sampler state belongs to another dataset (fingerprint {theirs!r}, this one has {own!r}); where samples "
        "have been appended since, open_dataset(revision=) opens the version it belongs to"
    ),
}


class _Walk(Iterator[list[Any]]):
    """The steps of an epoch, as lists.

    Attributes:
        arrays: The same steps for who takes samples as an array: int64, or still lists of lists where units are packs.
    """

    def __init__(self, steps: Iterator[_Units]) -> None:
        self.arrays = steps

    def __next__(self) -> list[Any]:
        return _as_list(next(self.arrays))


def look_up(
    plan: Epoch, window: int, first: int, own: Callable[[int, GlobalBatch], npt.NDArray[np.int64]]
) -> Iterator[tuple[GlobalBatch, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Yield for each step of a window, from step `first` on, the batch, one's own units of it and their samples.

    Args:
        plan: The epoch.
        window: Its window.
        first: Counts inside the window.
        own: Returns one's own units of a step and its batch; called ahead of what is yielded.
    """
    steps = plan.window(window)
    waiting: list[tuple[GlobalBatch, npt.NDArray[np.int64]]] = []
    num_waiting, num_wanted = 0, 1
    for step in range(first, len(steps)):
        batch = steps.batch(plan.order, step)
        waiting.append((batch, own(step, batch)))
        num_waiting += len(waiting[-1][1])
        if num_waiting >= num_wanted:
            yield from _look_up_together(plan, waiting)
            num_wanted = min(2 * num_waiting, _LOOK_AHEAD_SAMPLES)
            waiting, num_waiting = [], 0
    yield from _look_up_together(plan, waiting)


def _look_up_together(
    plan: Epoch, waiting: list[tuple[GlobalBatch, npt.NDArray[np.int64]]]
) -> Iterator[tuple[GlobalBatch, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    if not waiting:
        return
    positions = [batch.positions_of(units) for batch, units in waiting]
    samples = plan.order.at(np.concatenate(positions))
    end = 0
    for (batch, units), own in zip(waiting, positions, strict=True):
        begin, end = end, end + len(own)
        yield batch, units, samples[begin:end]


def _units_of(batch: GlobalBatch, units: npt.NDArray[np.int64]) -> list[Any]:
    return _as_list(_pack(batch, units, batch.order.at(batch.positions_of(units))))


def _pack(batch: GlobalBatch, units: npt.NDArray[np.int64], samples: npt.NDArray[np.int64]) -> _Units:
    if batch.unit_starts is None:
        return samples
    ends = np.cumsum(np.diff(batch.unit_starts)[units]).tolist()
    return [samples[begin:end].tolist() for begin, end in zip([0, *ends], ends, strict=False)]


def _as_list(units: _Units) -> list[Any]:
    return units.tolist() if isinstance(units, np.ndarray) else units


def find_rank(rank: int | None = None, world_size: int | None = None) -> tuple[int, int]:
    """Return rank and world size of this process: as given, else as torch.distributed, the launcher or nobody says.

    Raises:
        BadInputError: One is given without the other, or they do not fit together.
    """
    if (rank is None) != (world_size is None):
        raise BadInputError(f"give rank and world_size together or neither, got rank={rank}, world_size={world_size}")
    if rank is None or world_size is None:
        return _job_rank() or rank_from_environment(os.environ) or (0, 1)
    if not 0 <= rank < world_size:
        raise BadInputError(
            f"rank must lie in [0, world_size), got rank {rank} of world size {world_size}: ranks count from 0"
        )
    return operator.index(rank), operator.index(world_size)


def _job_rank() -> tuple[int, int] | None:
    """Return rank and world size of this process, where torch.distributed knows them."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return None
