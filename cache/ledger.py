"""What a tier holds and what it owes: limits, charges and the choice of who leaves. Pure, no I/O.

The order of calls is what keeps the limits, also for a moment and with many writers at once:

    reserve   the policy names victims, which are not chosen again, and counts the newcomer in; space is charged for it
              as far as the victims do not make room
    hide      a victim lies elsewhere, or nowhere any more
    settle    the victims are gone from the medium; what they freed beyond the newcomer is given back; or `give_up`:
              some cannot be removed, and are held as before
    commit    the newcomer is written and from now on held; or `abandon`: it is not, and its space is given back

So what lies on the medium never exceeds `used_bytes`, and `used_bytes` never exceeds the capacity. What cannot be
removed from the medium stays charged until the same block comes again, and with it a file in its place. The same goes,
to the same moments, for the blocks of each quota and its account.

A medium that others have filled has less room than the capacity says. What lay there when that was found counts as the
capacity then, while admission is "replacing".
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TypeAlias

from cache.disk import Admission
from cache.policy import Account, Policy

__all__ = ["UNLIMITED_BLOCKS", "Counters", "Entry", "Ledger", "Reservation"]

UNLIMITED_BLOCKS = sys.maxsize

_SURPLUS_BLOCKS = 256

Entry: TypeAlias = tuple[bytes, int]
"""Key and length of a block."""


@dataclass(slots=True)
class Counters:
    """What happened in a tier since it was opened. `hit_bytes` counts blocks' own bytes, the others the medium's."""

    hits: int = 0
    hit_bytes: int = 0
    insertions: int = 0
    written_bytes: int = 0
    evictions: int = 0
    evicted_bytes: int = 0
    refused: int = 0
    corrupt: int = 0
    errors: int = 0


@dataclass(frozen=True, slots=True)
class Reservation:
    """Space for one block that is about to be written, and the blocks that leave for it."""

    key: bytes
    length: int
    size_bytes: int
    victims: list[Entry]
    victim_bytes: int
    shares: list[_Share]


@dataclass(slots=True)
class _Share:
    """The part of a reservation that concerns one account: what comes to it and what leaves it."""

    account: Account
    size_bytes: int = 0
    victim_bytes: int = 0


class Ledger:
    """Belongs to the event loop's thread.

    Args:
        policy: Chooses what stays; owned.
        cost_bytes: What a block of so many bytes takes on the medium.
        capacity_bytes: Most bytes on the medium; see `resize`.
        capacity_blocks: Most blocks.
        max_queued_bytes: Most bytes reserved and not yet written.
        accounts_of: The quotas that a block is under, which the policy keeps to.

    Attributes:
        used_bytes: What is on the medium, or may come to it under a reservation.
        used_blocks: As `used_bytes`.
        admission: What is let in: nothing before what lies on the medium is known, one block at a time while that is an
            experiment, and no more than a full medium had room for.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        cost_bytes: Callable[[int], int],
        capacity_bytes: int,
        capacity_blocks: int,
        max_queued_bytes: int,
        accounts_of: Callable[[bytes], Sequence[Account]] = lambda _key: (),
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.capacity_blocks = capacity_blocks
        self._target_bytes, self._target_blocks = capacity_bytes, capacity_blocks
        self.used_bytes = 0
        self.used_blocks = 0
        self.admission: Admission = "open"
        self._room_bytes = sys.maxsize
        self.counters = Counters()
        self._policy = policy
        # Blocks come in few lengths, and a scan asks for each of a million.
        self._cost_bytes = lru_cache(maxsize=1024)(cost_bytes)
        self._max_queued_bytes = max_queued_bytes
        self._queued_bytes = 0
        self._lengths: dict[bytes, int] = {}
        self._accounts_of = accounts_of
        # Of blocks that take space on the medium, or will; most are under no quota.
        self._accounts: dict[bytes, Sequence[Account]] = {}
        # By block: lengths and quotas of what lies there to no use, since it could not be removed.
        self._remains: dict[bytes, list[tuple[int, Sequence[Account]]]] = {}
        # On their way in or out, so neither let in nor chosen.
        self._busy: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._lengths)

    def holds(self, key: bytes) -> bool:
        """Say whether the block is here; a victim is until `hide`."""
        return key in self._lengths

    def knows(self, key: bytes) -> bool:
        """Say whether the block is here, or on its way in or out."""
        return key in self._lengths or key in self._busy

    def keys(self) -> list[bytes]:
        """Return the blocks that are here."""
        return list(self._lengths)

    def count_hit(self, key: bytes, length: int) -> None:
        """Take note of a read."""
        self.counters.hits += 1
        self.counters.hit_bytes += length
        self._policy.touch(key)

    def wants(self, key: bytes, length: int) -> bool:
        """Say whether the block would be let in. Changes nothing."""
        chosen = self._choose(key, self._cost_bytes(length))
        return chosen is not None and self._busy.isdisjoint(chosen)

    def reserve(self, key: bytes, length: int) -> Reservation | None:
        """Charge space for a block and single out its victims; None where it is not let in, or is `undecided` yet."""
        size_bytes = self._cost_bytes(length)
        chosen = self._choose(key, size_bytes)
        if chosen is None:
            self.counters.refused += key not in self._lengths
            return None
        if not self._busy.isdisjoint(chosen):
            return None
        victims = [(victim, self._lengths[victim]) for victim in chosen]
        victim_bytes = self._total_bytes(victims)
        shares = self._shares(key, size_bytes, victims)
        for share in shares:
            share.account.used_bytes += max(0, share.size_bytes - share.victim_bytes)
        self.used_bytes += max(0, size_bytes - victim_bytes)
        self.used_blocks += not victims
        self._queued_bytes += size_bytes
        for victim in chosen:
            self._policy.remove(victim)
        # From now on, so that a better newcomer waits to displace it rather than displace a better one.
        self._policy.insert(key, size_bytes)
        self._busy.update(chosen, (key,))
        return Reservation(key, length, size_bytes, victims, victim_bytes, shares)

    def undecided(self, key: bytes, length: int) -> bool:
        """Say whether a block that is not let in will be, unless others come, once what is being written is held."""
        chosen = self._choose(key, self._cost_bytes(length))
        return chosen is not None and not self._busy.isdisjoint(chosen)

    def hide(self, key: bytes) -> None:
        """No longer hold a victim, whose space is still charged."""
        self._lengths.pop(key, None)

    def settle(self, reservation: Reservation) -> None:
        """Give back what the victims, all of them off the medium, took beyond the newcomer."""
        surplus_bytes = max(0, reservation.victim_bytes - reservation.size_bytes)
        self._lower(surplus_bytes, max(0, len(reservation.victims) - 1))
        for share in reservation.shares:
            share.account.used_bytes -= max(0, share.victim_bytes - share.size_bytes)
        for key, _ in reservation.victims:
            self._accounts.pop(key, None)
        self._count_evicted(reservation.victims)
        self._busy.difference_update(key for key, _ in reservation.victims)

    def commit(self, reservation: Reservation) -> None:
        """Hold the written block."""
        # Known all the time: threads ask (`knows`).
        self._lengths[reservation.key] = reservation.length
        self._end(reservation)
        self._clear_remains(reservation.key)
        self.counters.insertions += 1
        self.counters.written_bytes += reservation.size_bytes

    def abandon(self, reservation: Reservation, *, left_behind: bool) -> None:
        """Give back the space of a settled reservation whose block was not written, unless a part of it lies there."""
        self._end(reservation)
        self._policy.remove(reservation.key)
        self._leave(reservation.key, reservation.length, removed=not left_behind)

    def give_up(self, reservation: Reservation, removed: Sequence[Entry]) -> None:
        """Undo a reservation of which only some victims could be removed; the others stay, held as before."""
        self._end(reservation)
        self._policy.remove(reservation.key)
        for key, length in reservation.victims:
            self._busy.discard(key)
            if key in self._lengths:
                self._policy.insert(key, self._cost_bytes(length))
            elif (key, length) not in removed:  # a reader found it to be wrong meanwhile
                self._leave(key, length, removed=False)
        unused_bytes = max(0, reservation.size_bytes - reservation.victim_bytes)
        for share in reservation.shares:
            share.account.used_bytes -= max(0, share.size_bytes - share.victim_bytes)
        self._accounts.pop(reservation.key, None)
        for key, length in removed:
            for account in self._accounts.pop(key, ()):
                account.used_bytes -= self._cost_bytes(length)
        self._lower(unused_bytes + self._total_bytes(removed), (not reservation.victims) + len(removed))
        self._count_evicted(removed)

    def squeeze(self) -> None:
        """There was no room for more than is charged now."""
        self._room_bytes = self.used_bytes

    @property
    def stretched(self) -> bool:
        """Whether more is charged than there was room for when it was last found full, or that is all it may hold."""
        return self.used_bytes > self._room_bytes or self._room_bytes >= self.capacity_bytes

    def detach(self, key: bytes) -> int | None:
        """No longer hold a block, which is to be removed; return its length.

        None: it is not here, or is leaving, and then its space is the reservation's affair. Else `end_removal` follows.
        """
        length = self.begin_eviction(key)
        self.hide(key)
        return length

    def end_removal(self, key: bytes, length: int, *, removed: bool) -> None:
        """Give back the space of a detached block that is off the medium."""
        self._busy.discard(key)
        self._leave(key, length, removed=removed)

    def forget(self) -> None:
        """Hold nothing any more: the medium is another one. What is on its way in or out ends as it would."""
        for key in self.keys():
            length = self.detach(key)
            if length is not None:
                self.end_removal(key, length, removed=True)
        for key in list(self._remains):
            self._clear_remains(key)

    def resize(self, capacity_bytes: int, capacity_blocks: int) -> None:
        """Set new limits. Below what is held they come into force step by step, as `surplus` is evicted."""
        self._target_bytes, self._target_blocks = capacity_bytes, capacity_blocks
        self.capacity_bytes = max(capacity_bytes, self.used_bytes)
        self.capacity_blocks = max(capacity_blocks, self.used_blocks)

    @property
    def resized(self) -> bool:
        """Whether the limits in force are those that were asked for."""
        return (self.capacity_bytes, self.capacity_blocks) == (self._target_bytes, self._target_blocks)

    def surplus(self) -> list[Entry]:
        """Return some of what is to leave under the new limits, first things first; empty where nothing can."""
        excess_bytes, excess_blocks = self.used_bytes - self._target_bytes, self.used_blocks - self._target_blocks
        found: list[Entry] = []
        for key in islice((key for key in self._policy.leaving() if key not in self._busy), _SURPLUS_BLOCKS):
            if excess_bytes <= 0 and excess_blocks <= 0:
                break
            found.append((key, self._lengths[key]))
            excess_bytes -= self._cost_bytes(self._lengths[key])
            excess_blocks -= 1
        return found

    def begin_eviction(self, key: bytes) -> int | None:
        """Single out a block to leave without a newcomer; return its length, and `end_eviction` follows.

        None: it is not here, or is leaving already.
        """
        length = self._lengths.get(key)
        if length is None or key in self._busy:
            return None
        self._policy.remove(key)
        self._busy.add(key)
        return length

    def end_eviction(self, key: bytes, length: int, *, removed: bool) -> None:
        """Hold the block no more, and give back its space if it is off the medium."""
        self.hide(key)
        self.end_removal(key, length, removed=removed)
        if removed:
            self._count_evicted([(key, length)])

    def take_over(self, blocks: Iterable[Entry], *, unwanted: set[bytes]) -> list[Entry]:
        """Hold those of the blocks on the medium that fit, as the policy likes; return those to remove."""
        surplus: list[Entry] = []
        for key, length in blocks:
            if self.knows(key):
                continue
            self._clear_remains(key)
            chosen = None if key in unwanted else self._admit(key, self._cost_bytes(length), self.capacity_bytes)
            # What is still being written, as when the medium went away and came back, cannot leave.
            if chosen is None or not self._busy.isdisjoint(chosen):
                surplus.append((key, length))
                continue
            for victim in chosen:
                victim_length = self._lengths.pop(victim)
                self._policy.remove(victim)
                self._leave(victim, victim_length, removed=True)
                surplus.append((victim, victim_length))
            self._charge(length)
            for share in self._shares(key, self._cost_bytes(length), ()):
                share.account.used_bytes += share.size_bytes
            self._lengths[key] = length
            self._policy.insert(key, self._cost_bytes(length))
        return surplus

    def cannot_remove(self, key: bytes, length: int) -> None:
        """Charge what `take_over` wanted to be removed, and which stays."""
        self._charge(length)
        self._remains.setdefault(key, []).append((length, ()))

    def _charge(self, length: int) -> None:
        """Count a block that lies on the medium; the limits give way where it was there first and cannot be removed."""
        self.used_bytes += self._cost_bytes(length)
        self.used_blocks += 1
        self.capacity_bytes = max(self.capacity_bytes, self.used_bytes)
        self.capacity_blocks = max(self.capacity_blocks, self.used_blocks)

    def _shares(self, key: bytes, size_bytes: int, victims: Sequence[Entry]) -> list[_Share]:
        """Return what a newcomer and its victims are to each account, and take note of the newcomer's."""
        accounts = self._accounts_of(key)
        if accounts:
            self._accounts[key] = accounts
        elif not self._accounts:
            return []
        shares = {account: _Share(account, size_bytes) for account in accounts}
        for victim, length in victims:
            for account in self._accounts.get(victim, ()):
                shares.setdefault(account, _Share(account)).victim_bytes += self._cost_bytes(length)
        return list(shares.values())

    def _leave(self, key: bytes, length: int, *, removed: bool) -> None:
        """Give back the space of what is held no more, unless it still lies there."""
        accounts = self._accounts.pop(key, ())
        if removed:
            self._release(length, accounts)
        else:
            self._remains.setdefault(key, []).append((length, accounts))

    def _clear_remains(self, key: bytes) -> None:
        """Give back the space of what has been replaced, or is counted anew."""
        for length, accounts in self._remains.pop(key, ()):
            self._release(length, accounts)

    def _release(self, length: int, accounts: Sequence[Account]) -> None:
        for account in accounts:
            account.used_bytes -= self._cost_bytes(length)
        self._lower(self._cost_bytes(length), 1)

    def _lower(self, size_bytes: int, blocks: int) -> None:
        self.used_bytes -= size_bytes
        self.used_blocks -= blocks
        # Limits that had to give way come down with what they gave way to.
        self.capacity_bytes = max(self._target_bytes, min(self.capacity_bytes, self.used_bytes))
        self.capacity_blocks = max(self._target_blocks, min(self.capacity_blocks, self.used_blocks))

    def _choose(self, key: bytes, size_bytes: int) -> list[bytes] | None:
        """Name the victims, which may still be being written."""
        # Above its limits a tier only shrinks: newcomers that each replaced another would keep it there.
        if self.admission == "closed" or not self.resized or key in self._lengths or key in self._busy:
            return None
        max_queued_bytes = 0 if self.admission == "one" else self._max_queued_bytes
        if self._queued_bytes and self._queued_bytes + size_bytes > max_queued_bytes:
            return None
        room_bytes = self._room_bytes if self.admission == "replacing" else self.capacity_bytes
        return self._admit(key, size_bytes, min(room_bytes, self.capacity_bytes))

    def _admit(self, key: bytes, size_bytes: int, limit_bytes: int) -> list[bytes] | None:
        return self._policy.admit(
            key,
            size_bytes,
            free_bytes=limit_bytes - self.used_bytes,
            free_blocks=self.capacity_blocks - self.used_blocks,
        )

    def _end(self, reservation: Reservation) -> None:
        self._queued_bytes -= reservation.size_bytes
        self._busy.discard(reservation.key)

    def _count_evicted(self, entries: Sequence[Entry]) -> None:
        self.counters.evictions += len(entries)
        self.counters.evicted_bytes += self._total_bytes(entries)

    def _total_bytes(self, entries: Iterable[Entry]) -> int:
        return sum(self._cost_bytes(length) for _, length in entries)
