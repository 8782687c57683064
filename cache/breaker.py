"""A circuit breaker: when to leave somebody who fails or is slow alone, and when to look again. Pure, knows no clock.

closed      asked as usual; so many slow answers in a row, or one failure, open it
open        left alone for a while
half-open   after that, one trial: fine closes it, anything else opens it again
"""

from __future__ import annotations

__all__ = ["Breaker"]


class Breaker:
    """Told what happened, with times in seconds that only grow.

    Args:
        retry_s: Time to leave it alone.
        max_slow: Slow answers in a row that open it.
    """

    def __init__(self, *, retry_s: float, max_slow: int) -> None:
        self._retry_s = retry_s
        self._max_slow = max_slow
        self._slow = 0
        self._open_until_s: float | None = None

    @property
    def tripped(self) -> bool:
        """Whether it is open or half-open: the last that was heard is that something is wrong."""
        return self._open_until_s is not None

    def is_open(self, now_s: float) -> bool:
        """Say whether it is to be left alone now."""
        return self._open_until_s is not None and now_s < self._open_until_s

    def failed(self, now_s: float) -> bool:
        """There was no answer. Returns whether that is news."""
        news = not self.tripped
        self._open_until_s = now_s + self._retry_s
        return news

    def was_slow(self, now_s: float) -> bool:
        """The answer was right and late. Returns whether that opened it, and is news."""
        self._slow += 1
        if self.tripped or self._slow >= self._max_slow:
            return self.failed(now_s)
        return False

    def was_fine(self) -> bool:
        """The answer was as it should be. Returns whether that is news."""
        news = self.tripped
        self._slow, self._open_until_s = 0, None
        return news
