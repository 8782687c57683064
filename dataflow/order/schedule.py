"""A schedule: every global batch of every epoch, from a source and a batching.

It knows nothing of ranks. A place in an epoch is the number of positions consumed, so it means the same to any number
of ranks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from connectors.errors import BadInputError
from dataflow.order.batching import Batching, GlobalBatch, Steps
from dataflow.order.source import Source

__all__ = ["BEGINNING", "Epoch", "Place", "Schedule"]

# What draws ahead and what asks for states are rarely more than a window apart.
_WINDOWS_KEPT = 3


@dataclass(frozen=True, slots=True)
class Place:
    """A border between two global batches of an epoch.

    Attributes:
        step: Global batches before it.
        position: Positions of the order that those batches consumed.
    """

    step: int
    position: int


BEGINNING = Place(step=0, position=0)
"""Where an epoch begins."""


class Epoch:
    """The global batches of one epoch, planned window by window as they are asked for. Not thread-safe.

    Args:
        source: Gives the order.
        batching: Cuts it.
        number: Which epoch.
    """

    def __init__(self, source: Source, batching: Batching, number: int) -> None:
        self.number = number
        self.order = source.order(number)
        self._batching = batching
        self._window_samples = batching.window_samples
        self._windows: OrderedDict[int, Steps] = OrderedDict()
        # Known numbers of steps by window; empty where they follow from the batching alone.
        self._counted: dict[int, int] = {}

    @property
    def num_windows(self) -> int:
        """Windows in the epoch."""
        return -(-len(self.order) // self._window_samples)

    def __len__(self) -> int:
        """The number of steps; where only planning tells, this plans the whole epoch once, window by window."""
        known = self._batching.count_steps(len(self.order))
        return known if known is not None else sum(self._count(window) for window in range(self.num_windows))

    def window(self, window: int) -> Steps:
        """Return the global batches of one window."""
        steps = self._windows.get(window)
        if steps is None:
            start = window * self._window_samples
            stop = min(start + self._window_samples, len(self.order))
            steps = self._windows[window] = self._batching.plan(self.order, self.number, start, stop)
            self._counted[window] = len(steps)
            if len(self._windows) > _WINDOWS_KEPT:
                self._windows.popitem(last=False)
        return steps

    def batch(self, step: int, known: Place = BEGINNING) -> GlobalBatch:
        """Return one global batch; `known` as in `place`.

        Raises:
            BadInputError: The epoch has no such step.
        """
        window, inside = self._find(step, known)
        if window == self.num_windows:
            raise BadInputError(f"epoch {self.number} has only {step} steps, counted from 0")
        return self.window(window).batch(self.order, inside)

    def batches(self) -> Iterator[GlobalBatch]:
        """Yield every global batch, planning one window at a time."""
        for window in range(self.num_windows):
            steps = self.window(window)
            for step in range(len(steps)):
                yield steps.batch(self.order, step)

    def place(self, step: int, known: Place = BEGINNING) -> Place:
        """Return the place before a step, or the end of the epoch for the number of steps.

        Args:
            step: Steps since the beginning of the epoch.
            known: A place at or before it. Where steps have to be counted by planning, counting begins there.

        Raises:
            BadInputError: The epoch has no such step.
        """
        window, inside = self._find(step, known)
        if window == self.num_windows:
            return Place(step, len(self.order))
        return Place(step, window * self._window_samples + int(self.window(window).consumed()[inside]))

    def enter(self, position: int) -> tuple[int, int]:
        """Return the window and the step inside it that begin at `position`.

        Raises:
            BadInputError: No global batch of this epoch begins there.
        """
        window, consumed = divmod(position, self._window_samples)
        if 0 <= window < self.num_windows:
            found = np.flatnonzero(self.window(window).consumed()[:-1] == consumed)
            if found.size:
                return window, int(found[0])
        raise BadInputError(f"no step of epoch {self.number} begins at position {position} of {len(self.order)}")

    def check(self, place: Place) -> None:
        """Insist that a place lies on a border between global batches of this epoch.

        Raises:
            BadInputError: It does not.
        """
        window, inside = self.enter(place.position)
        per_window = self._batching.count_steps(self._window_samples)
        if per_window is not None and place.step != window * per_window + inside:
            raise BadInputError(
                f"position {place.position} of epoch {self.number} does not lie before step {place.step}"
            )

    def _find(self, step: int, known: Place) -> tuple[int, int]:
        per_window = self._batching.count_steps(self._window_samples)
        if per_window is not None:
            if 0 <= step <= len(self):
                return divmod(step, per_window) if step < len(self) else (self.num_windows, 0)
        elif step >= 0:
            if step < known.step:
                known = BEGINNING
            window = known.position // self._window_samples
            # Back to the border of that window, from where whole windows are counted.
            inside = step - known.step + (self.enter(known.position)[1] if known.position else 0)
            while window < self.num_windows and inside >= self._count(window):
                inside -= self._count(window)
                window += 1
            if window < self.num_windows or inside == 0:
                return window, inside
        raise BadInputError(f"step must lie in [0, {len(self)}], got {step}")

    def _count(self, window: int) -> int:
        if window not in self._counted:
            self.window(window)
        return self._counted[window]


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """Every epoch of a training run.

    Attributes:
        source: Which samples, in which order.
        batching: How they become global batches.
    """

    source: Source
    batching: Batching

    def epoch(self, number: int) -> Epoch:
        """Return one epoch."""
        return Epoch(self.source, self.batching, number)

    def identity(self) -> dict[str, Any]:
        """Return as plain JSON what a state must agree on."""
        return {**self.source.identity(), **self.batching.identity()}
