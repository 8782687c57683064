"""How many batches to ask each worker for ahead of the caller.

As many as `prefetch_factor` says, until the caller is found waiting again and again for batches that are small. What a
batch costs is then less its making than the message for it, and the waking of a worker and of the trainer. With more
batches asked for, and several by each message, a worker goes from one to the next and whoever wakes finds several.

    every so many messages: did the caller wait, and are batches small? -> twice as many

More is only asked for where nobody can tell: of samplers that draw the same however early they are drawn from, of
workers that end with their epoch or draw no random numbers (else the next epoch's depend on how many batches of one
that was left were made), and of data that comes through a cache only as much as its ring hardly feels.
"""

from __future__ import annotations

__all__ = ["AHEAD_BYTES", "MAX_DEPTH", "Depth"]

MAX_DEPTH = 64
# Of one worker, beyond what `prefetch_factor` asks for.
AHEAD_BYTES = 16 << 20
# How many messages of batches are looked at, and in how many of them a caller who is kept waiting has waited: not in
# each, since several arrive at a time.
_LOOK_MESSAGES = 16
_WAITS = 4
# In how many messages what is asked of a worker is at least, so that there is always some in the making.
_MESSAGES = 2


class Depth:
    """The number, as it grows. Used by one thread.

    Args:
        given: `prefetch_factor`.
        most: How far it may be exceeded; 0 where it may not.

    Attributes:
        batches: Batches to ask each worker for.
        at_once: How many of them to ask for together, in one message.
    """

    def __init__(self, given: int, *, most: int) -> None:
        self.batches = self._given = given
        self.at_once = 1
        self._most = most
        self._delivered = 0
        self._waits = 0
        self._largest_bytes = 0

    def hold(self) -> None:
        """Ask for as many as were given, from now on."""
        self.batches, self.at_once, self._most = self._given, 1, 0

    def waited(self) -> None:
        """The caller waited for a batch."""
        self._waits += 1

    def delivered(self, size_bytes: int) -> int:
        """The caller got a batch of so many bytes; return by how much the number has grown."""
        self._delivered += 1
        self._largest_bytes = max(self._largest_bytes, size_bytes)
        if self._delivered < _LOOK_MESSAGES * self.at_once:
            return 0
        is_kept_waiting = self._waits >= _WAITS
        self._delivered = self._waits = 0
        grown = min(2 * self.batches, self._most)
        if not self._most or not is_kept_waiting or grown * self._largest_bytes > AHEAD_BYTES:
            return 0
        more, self.batches = max(0, grown - self.batches), max(grown, self.batches)
        self.at_once = max(1, self.batches // _MESSAGES)
        return more
