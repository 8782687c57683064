"""The state of a disk, from what its calls come back with. Pure: knows no disk and no clock.

    normal      read and written
    unstable    too many calls fail: read, but not written; probes say when it is normal again
    down        reads fail as well, or a call does not return: left alone but for the probes

A full disk is none of these: others may have filled it, and may make room again. It is read, and after a back-off it is
tried with one block more than it had room for, again and again until one succeeds. In between, blocks come in the place
of others (`cache.ledger`), unless that fails too: then none does, so that they do not all leave for nothing.
Nor is a slow one: its queue of writes fills, and what does not fit there is not let in (`cache.ledger`). The outcome of
one call says little, since a single file may lie on a bad sector, so it is the rate that counts.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, TypeAlias

from connectors.errors import BadInputError

__all__ = ["Admission", "DiskHealth", "DiskLimits", "DiskState"]

Admission: TypeAlias = Literal["open", "one", "replacing", "closed"]
"""What may be written now: as much as the queue takes, one block at a time, or nothing."""


# A reader may still hold the file of a block that left, whose space is free later.
_MAX_NOT_REPLACED = 3


class DiskState(StrEnum):
    """See the module's docstring."""

    NORMAL = "normal"
    UNSTABLE = "unstable"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class DiskLimits:
    """When a disk is distrusted and when it is trusted again.

    Attributes:
        window: How many calls back the rates look.
        unstable_failures: A disk is unstable from so many failures in the window ...
        unstable_share: ... that are also this share of it.
        down_failures: An unstable disk is down from so many failures of reads since it became so ...
        down_share: ... that are also this share of the reads since then.
        stuck_s: A disk is down when calls are under way and none has returned for so long.
        first_retry_s: Until the first probe, and the first write to a full disk; doubled by each failure.
        last_retry_s: The longest such pause.
        good_probes: So many in a row make a disk normal again.
    """

    window: int = 64
    unstable_failures: int = 3
    unstable_share: float = 0.1
    down_failures: int = 8
    down_share: float = 0.5
    stuck_s: float = 10.0
    first_retry_s: float = 1.0
    last_retry_s: float = 60.0
    good_probes: int = 3

    def __post_init__(self) -> None:
        for name in ("window", "unstable_failures", "down_failures", "good_probes"):
            if getattr(self, name) < 1:
                raise BadInputError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("unstable_share", "down_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInputError(f"{name} must be within 0 and 1, got {getattr(self, name)}")
        if self.stuck_s <= 0:
            raise BadInputError(f"stuck_s must be > 0, got {self.stuck_s}")
        if not 0 < self.first_retry_s <= self.last_retry_s:
            raise BadInputError(f"0 < first_retry_s <= last_retry_s, got {self.first_retry_s} and {self.last_retry_s}")


class DiskHealth:
    """One disk. Times are seconds on any one clock that never goes back.

    Attributes:
        state: See the module's docstring.
        since_s: When it came to this state.
        reason: What brought it there; None while normal.
        full_since_s: When a write first found no space; None while there is some.
        full_reason: What that write said.
        retry_at_s: When the next probe, or the next write to a full disk, is due; None while nothing is to be retried.
    """

    def __init__(self, limits: DiskLimits, now_s: float) -> None:
        self.state = DiskState.NORMAL
        self.since_s = now_s
        self.reason: str | None = None
        self.full_since_s: float | None = None
        self.full_reason: str | None = None
        self.retry_at_s: float | None = None
        self._limits = limits
        self._pause_s = limits.first_retry_s
        self._good_probes = 0
        # While full: so many blocks in a row could not even come in the place of others.
        self._not_replaced = 0
        # Outcomes, true for success: of all calls while normal, of reads while unstable.
        self._outcomes: deque[bool] = deque(maxlen=limits.window)

    def admission(self, now_s: float) -> Admission:
        """Say what may be written."""
        if self.state is not DiskState.NORMAL:
            return "closed"
        if self.full_since_s is None:
            return "open"
        if self.retry_at_s is None or now_s >= self.retry_at_s:
            return "one"
        return "replacing" if self._not_replaced < _MAX_NOT_REPLACED else "closed"

    @property
    def readable(self) -> bool:
        """Whether reads are tried."""
        return self.state is not DiskState.DOWN

    @property
    def probing(self) -> bool:
        """Whether `retry_at_s` is when to probe, rather than when to write again."""
        return self.state is not DiskState.NORMAL

    @property
    def ailment(self) -> str | None:
        """What keeps it from taking more, in words; None where nothing does."""
        return self.full_reason if self.state is DiskState.NORMAL else f"the disk is {self.state}: {self.reason}"

    def read(self) -> None:
        """A read came back well."""
        self._outcomes.append(True)

    def written(self, *, more: bool) -> None:
        """A write came back well. Where it is `more` than lay there when the disk was found full, there is space."""
        if self.state is DiskState.NORMAL:
            self._outcomes.append(True)
            self._not_replaced = 0
            if self.full_since_s is not None and more:
                self.full_since_s = self.full_reason = self.retry_at_s = None
                self._pause_s = self._limits.first_retry_s

    def filled(self, now_s: float, reason: str, *, more: bool) -> None:
        """A write found no space, no quota or no inode; `more` as in `written`."""
        if self.state is not DiskState.NORMAL:
            return
        if self.full_since_s is None:
            self.full_since_s, self._not_replaced = now_s, _MAX_NOT_REPLACED
        else:
            self._not_replaced = 0 if more else self._not_replaced + 1
            if self.retry_at_s is not None and now_s < self.retry_at_s:
                # Was under way when the disk was found full, or came in the place of others.
                return
        self.full_reason = reason
        self._retry_later(now_s)

    def failed(self, now_s: float, reason: str, *, reading: bool) -> None:
        """A call failed in another way."""
        limits = self._limits
        if self.state is DiskState.DOWN or (self.state is DiskState.UNSTABLE and not reading):
            return
        self._outcomes.append(False)
        failures = self._outcomes.count(False)
        if self.state is DiskState.NORMAL:
            if failures >= limits.unstable_failures and failures >= limits.unstable_share * len(self._outcomes):
                self._become(DiskState.UNSTABLE, now_s, reason)
        elif failures >= limits.down_failures and failures >= limits.down_share * len(self._outcomes):
            self._become(DiskState.DOWN, now_s, reason)

    def stuck(self, now_s: float, reason: str) -> None:
        """A call does not return."""
        if self.state is not DiskState.DOWN:
            self._become(DiskState.DOWN, now_s, reason)

    def probed(self, now_s: float, *, readable: bool, writable: bool, reason: str | None = None) -> None:
        """A probe came back: whether it could read, and whether it could write."""
        if self.state is DiskState.NORMAL:
            return
        if not (readable and writable):
            self._good_probes = 0
        if not readable and self.state is DiskState.UNSTABLE:
            self._become(DiskState.DOWN, now_s, reason or "a probe could not read")
        elif readable and self.state is DiskState.DOWN:
            self._become(DiskState.UNSTABLE, now_s, reason or self.reason or "was down")
        elif reason is not None:
            self.reason = reason
        if not (readable and writable):
            self._retry_later(now_s)
            return
        self._good_probes += 1
        if self._good_probes >= self._limits.good_probes:
            self._become(DiskState.NORMAL, now_s, None)
        else:
            self.retry_at_s = now_s + self._limits.first_retry_s

    def stats(self, now_s: float, now_unix_s: float) -> dict[str, Any]:
        """Return everything that a person wants to know, with Unix times, as JSON types."""
        full = None
        if self.full_since_s is not None:
            full = {"since_unix_s": now_unix_s - (now_s - self.full_since_s), "reason": self.full_reason}
        return {
            "state": self.state.value,
            "state_since_unix_s": now_unix_s - (now_s - self.since_s),
            "state_reason": self.reason,
            "full": full,
        }

    def _become(self, state: DiskState, now_s: float, reason: str | None) -> None:
        was, was_since_s = self.state, self.since_s
        self.state, self.since_s, self.reason = state, now_s, reason
        self._outcomes.clear()
        self.full_since_s = self.full_reason = None
        if state is DiskState.NORMAL:
            self.retry_at_s = None
            return
        if was is DiskState.NORMAL:
            self._good_probes = 0
            # A disk that passes its probes and fails again soon is probed less and less often.
            if now_s - was_since_s > self._limits.last_retry_s:
                self._pause_s = self._limits.first_retry_s
            self._retry_later(now_s)
        elif self.retry_at_s is None:
            self._retry_later(now_s)

    def _retry_later(self, now_s: float) -> None:
        self.retry_at_s = now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, self._limits.last_retry_s)
