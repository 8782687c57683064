"""How many requests an origin takes at once: additive increase, multiplicative decrease. Pure.

A store that says "slow down" is asked for half as much at once, and for one request more with every round of requests
that it answers (the rule of TCP; D.-M. Chiu and R. Jain, 1989).
"""

from __future__ import annotations

__all__ = ["Aimd"]

# One refusal seldom comes alone, and a burst of them is one piece of news.
_DECREASE_PAUSE_S = 1.0


class Aimd:
    """A limit between 1 and `max_requests`; begins at the upper end."""

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._requests = float(max_requests)
        self._decreased_s = float("-inf")

    @property
    def max_requests(self) -> int:
        """The limit now."""
        return int(self._requests)

    def answered(self) -> None:
        """A request was answered."""
        self._requests = min(float(self._max_requests), self._requests + 1 / self._requests)

    def refused(self, now_s: float) -> None:
        """A request was refused because there were too many."""
        if now_s - self._decreased_s >= _DECREASE_PAUSE_S:
            self._decreased_s = now_s
            self._requests = max(1.0, self._requests / 2)
