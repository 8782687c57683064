"""What readers will read, merged over all of them. Pure: no I/O, and no clock but the seconds it is told.

Each plan is one reader's sequence of block numbers; a window of it is known, from its position to its end. The next
use of a block is the earliest over all plans. Plans are compared on one time line, `zero_s + place * step_s` for each,
drawn anew when a reader's pace turns out to be another; with one plan the order of its blocks is exact in any case.

Methods that change when blocks are wanted return the keys concerned, for the policies that sorted by it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from cache.block_table import BlockTable
from cache.keys import BlockRef, block_key
from connectors.errors import BadInputError

__all__ = ["MAX_AHEAD", "Futures", "Kind", "Plan", "Planned"]

Kind: TypeAlias = Literal["plan", "sequential", "strided", "repeated"]
"""Who says so: the reader itself, or a guess from what was read (`cache.guesses`)."""

MAX_AHEAD = 1 << 20
"""Longest window of one plan, in blocks."""

_FIRST_STEP_S = 0.05
# How wrong the time line of a plan may be before it is drawn anew.
_TOLERANCE = 0.25
_SMOOTHING = 0.3
_SHORTEST_STEP_S = 1e-6


@dataclass(frozen=True, slots=True)
class Planned:
    """One block of a plan."""

    key: bytes
    ref: BlockRef
    kind: Kind = "plan"


class Plan:
    """One reader's future. Made by `Futures.add`; changed through `Futures` only.

    Attributes:
        table: What block numbers refer to; a guess has none.
        kind: Whose plan it is.
        position: Places that the reader has passed.
        end: Places that are known, from the beginning of the plan.
        cursor: The first place that prefetching has not considered yet.
        zero_s: When place 0 is used, on the time line of all plans.
        step_s: Seconds between two places.
        job: For which the reader reads.
    """

    def __init__(self, table: BlockTable | None, kind: Kind, now_s: float, job: str) -> None:
        self.table = table
        self.kind = kind
        self.job = job
        self.position = 0
        self.cursor = 0
        self.zero_s = now_s
        self.step_s = _FIRST_STEP_S
        # Known places from `_first` on; the oldest are cut off from time to time.
        self._entries: list[Planned] = []
        self._first = 0
        # Places still to come, by key.
        self.uses: dict[bytes, deque[int]] = {}
        # Farthest place that was read, and when the pace was looked at last.
        self.front = 0
        self._marked = (0, now_s)
        self._measured_s = _FIRST_STEP_S

    @property
    def end(self) -> int:
        """Places that are known."""
        return self._first + len(self._entries)

    def at(self, place: int) -> Planned:
        """Return what is at a place."""
        return self._entries[place - self._first]

    def time_of(self, place: int) -> float:
        """Return when a place is used."""
        return self.zero_s + place * self.step_s

    def append(self, blocks: Iterable[Planned]) -> list[bytes]:
        """Make the window longer; see `Futures.extend`."""
        keys = []
        for place, planned in enumerate(blocks, self.end):
            self._entries.append(planned)
            self.uses.setdefault(planned.key, deque()).append(place)
            keys.append(planned.key)
        return keys

    def move(self, position: int) -> list[bytes]:
        """Pass places; return the keys whose use there is over."""
        passed = []
        for place in range(self.position, position):
            key = self.at(place).key
            uses = self.uses.get(key)
            if uses is not None and uses[0] <= place:
                uses.popleft()
                if not uses:
                    del self.uses[key]
                passed.append(key)
        self.position = position
        self.front = max(self.front, position)
        self.cursor = max(self.cursor, position)
        if position - self._first > max(1024, len(self._entries) // 2):
            del self._entries[: position - self._first]
            self._first = position
        return passed

    def use(self, key: bytes) -> None:
        """Take note that the first of the block's places was read."""
        uses = self.uses[key]
        self.front = max(self.front, uses.popleft() + 1)
        if not uses:
            del self.uses[key]

    def forget(self) -> list[bytes]:
        """Drop all that lies ahead; return its keys."""
        keys = list(self.uses)
        self.uses.clear()
        del self._entries[self.position - self._first :]
        self.cursor = self.front = self.position
        self._marked = (self.position, self._marked[1])
        return keys

    def drifted(self, now_s: float) -> bool:
        """Measure the pace and draw the time line anew where it is too wrong; say whether it was."""
        mark, marked_s = self._marked
        if self.front > mark and now_s > marked_s:
            self._marked = (self.front, now_s)
            self._measured_s += _SMOOTHING * ((now_s - marked_s) / (self.front - mark) - self._measured_s)
        late_s = abs(self.time_of(self.front) - now_s)
        tolerated_s = _TOLERANCE * max(1, self.end - self.front) * self.step_s
        if late_s <= tolerated_s and abs(self._measured_s - self.step_s) <= _TOLERANCE * self.step_s:
            return False
        self.step_s = max(_SHORTEST_STEP_S, self._measured_s)
        self.zero_s = now_s - self.front * self.step_s
        return True


class Futures:
    """All plans together."""

    def __init__(self) -> None:
        self._plans: dict[int, Plan] = {}
        self._numbers = 0

    def __len__(self) -> int:
        return len(self._plans)

    @property
    def plans(self) -> Sequence[Plan]:
        """The plans there are."""
        return list(self._plans.values())

    def add(self, table: BlockTable, now_s: float, job: str = "") -> int:
        """Begin a plan over a table of blocks; return its number."""
        return self._add(Plan(table, "plan", now_s, job))

    def guess(self, kind: Kind, now_s: float) -> int:
        """Begin a plan that no reader has made; return its number."""
        return self._add(Plan(None, kind, now_s, ""))

    def _add(self, plan: Plan) -> int:
        self._numbers += 1
        self._plans[self._numbers] = plan
        return self._numbers

    def plan(self, number: int) -> Plan:
        """Return one plan."""
        return self._plans[number]

    def extend(self, number: int, blocks: npt.NDArray[np.int32]) -> list[bytes]:
        """Make a plan's window longer.

        Raises:
            BadInputError: A block is not in the table, or the window would be longer than `MAX_AHEAD`.
        """
        plan, table = self._plans[number], self._plans[number].table
        assert table is not None
        if len(blocks) and (blocks.min() < 0 or blocks.max() >= len(table)):
            wrong = blocks[(blocks < 0) | (blocks >= len(table))][0]
            raise BadInputError(f"a plan names block {wrong} of a table of {len(table)} blocks")
        if plan.end - plan.position + len(blocks) > MAX_AHEAD:
            raise BadInputError(f"a plan may reach {MAX_AHEAD} blocks ahead of its reader; extend it as that goes on")
        refs = {block: table.ref(block) for block in set(blocks.tolist())}
        known = {block: Planned(block_key(ref), ref) for block, ref in refs.items()}
        return plan.append([known[block] for block in blocks.tolist()])

    def append(self, number: int, blocks: Iterable[Planned]) -> list[bytes]:
        """Make a guess longer."""
        return self._plans[number].append(blocks)

    def advance(self, number: int, position: int, now_s: float) -> list[bytes]:
        """Pass all places before `position`; going back is ignored.

        Raises:
            BadInputError: The plan is not known that far.
        """
        plan = self._plans[number]
        if position > plan.end:
            raise BadInputError(f"a plan of {plan.end} blocks cannot be at position {position}")
        passed = plan.move(position) if position > plan.position else []
        # One plan alone needs no clock: the order of its blocks is that of their places.
        if len(self._plans) > 1 and plan.drifted(now_s):
            passed.extend(plan.uses)
        return passed

    def forget(self, number: int) -> list[bytes]:
        """Drop all that lies ahead in a plan, because its reader will do something else."""
        return self._plans[number].forget()

    def remove(self, number: int) -> list[bytes]:
        """End a plan."""
        return list(self._plans.pop(number).uses)

    def use(self, key: bytes) -> Kind | None:
        """Take note that somebody read a block: the plan that wanted it first has it. None: no plan wanted it."""
        wanting = [plan for plan in self._plans.values() if key in plan.uses]
        if not wanting:
            return None
        # What a reader has announced is never taken for a guess.
        first = min(wanting, key=lambda plan: (plan.kind != "plan", plan.time_of(plan.uses[key][0])))
        first.use(key)
        return first.kind

    def next_use(self, key: bytes) -> float:
        """Return when a block is wanted next; infinity where nobody said."""
        return min(
            (plan.time_of(plan.uses[key][0]) for plan in self._plans.values() if key in plan.uses), default=math.inf
        )

    def job_of(self, key: bytes) -> str:
        """Return for which job a block is wanted next; empty where nobody said."""
        wanting = (plan for plan in self._plans.values() if key in plan.uses)
        first = min(wanting, key=lambda plan: plan.time_of(plan.uses[key][0]), default=None)
        return "" if first is None else first.job

    def near_use(self, key: bytes) -> float:
        """As `next_use`, but infinity where prefetching has not come to it yet: nothing was brought for that use."""
        return min(
            (
                plan.time_of(plan.uses[key][0])
                for plan in self._plans.values()
                if key in plan.uses and plan.uses[key][0] < plan.cursor
            ),
            default=math.inf,
        )

    def peek(self) -> Planned | None:
        """Return the block that is wanted first of all those not considered yet; `take` goes past it."""
        plan = self._soonest()
        return None if plan is None else plan.at(plan.cursor)

    def take(self) -> None:
        """Go past the block that `peek` returned."""
        plan = self._soonest()
        if plan is not None:
            plan.cursor += 1

    def _soonest(self) -> Plan | None:
        best: Plan | None = None
        for plan in self._plans.values():
            while plan.cursor < plan.end and plan.cursor not in plan.uses.get(plan.at(plan.cursor).key, ()):
                plan.cursor += 1  # read already
            ahead = plan.cursor < plan.end
            if ahead and (best is None or plan.time_of(plan.cursor) < best.time_of(best.cursor)):
                best = plan
        return best
