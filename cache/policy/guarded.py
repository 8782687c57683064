"""A policy behind pins and quotas: what may be a victim at all, and who has to make room first.

    pinned        known here only: the policy never hears of the block, so it cannot name it as a victim; to come in it
                  displaces whatever is not pinned, up to the limit for pins, above which it is a block like any other
    in a quota    the policy has a second instance for the blocks of each quota; a newcomer that does not fit under its
                  quotas displaces blocks of theirs first, as that instance likes, and only then anything else

Without pins and quotas every question goes straight to the policy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakValueDictionary

from cache.policy.protocol import Policy
from cache.policy.victims import first_enough

__all__ = ["Account", "Guarded"]


class Account:
    """What the blocks of one quota take in one place.

    Args:
        name: Of the quota.
        limit_bytes: Most bytes on the medium.
        policy: Chooses among its blocks.

    Attributes:
        used_bytes: What lies on the medium for it, or may come to it; kept by the ledger.
    """

    __slots__ = ("__weakref__", "limit_bytes", "name", "policy", "used_bytes")

    def __init__(self, name: str, limit_bytes: int, policy: Policy) -> None:
        self.name = name
        self.limit_bytes = limit_bytes
        self.policy = policy
        self.used_bytes = 0


class Guarded:
    """See the module, and `cache.policy.Policy`.

    Args:
        make_policy: Makes the policy, once for all blocks and once for each quota.
        is_pinned: Whether a block is pinned now; see `refresh`.
        quotas_of: Names and bytes of the quotas that a block falls under; asked when it is offered and comes in.
        max_pinned_bytes: Most bytes that pins protect.

    Attributes:
        pinned_bytes: What they protect now.
    """

    def __init__(
        self,
        make_policy: Callable[[], Policy],
        *,
        is_pinned: Callable[[bytes], bool],
        quotas_of: Callable[[bytes], Sequence[tuple[str, int]]],
        max_pinned_bytes: int,
    ) -> None:
        self.max_pinned_bytes = max_pinned_bytes
        self.pinned_bytes = 0
        self._make_policy = make_policy
        self._policy = make_policy()
        self._is_pinned = is_pinned
        self._quotas_of = quotas_of
        self._sizes: dict[bytes, int] = {}
        self._pinned: set[bytes] = set()
        self._accounts_of: dict[bytes, tuple[Account, ...]] = {}
        # A quota without blocks is nobody's, so that jobs may come and go.
        self._accounts: WeakValueDictionary[str, Account] = WeakValueDictionary()

    def accounts(self, key: bytes) -> tuple[Account, ...]:
        """Return the accounts of the quotas that a block is under, or would be."""
        held = self._accounts_of.get(key)
        if held is not None:
            return held
        return tuple(self._account(name, limit_bytes) for name, limit_bytes in self._quotas_of(key))

    def admit(self, key: bytes, size_bytes: int, *, free_bytes: int, free_blocks: int) -> list[bytes] | None:
        """Make room under each of the block's quotas, then in the whole place."""
        accounts, pinned = self.accounts(key), self._may_pin(key, size_bytes)
        if not accounts and not pinned:
            return self._policy.admit(key, size_bytes, free_bytes=free_bytes, free_blocks=free_blocks)
        victims: dict[bytes, None] = {}
        for account in accounts:
            own = [victim for victim in victims if account in self._accounts_of[victim]]
            free = account.limit_bytes - account.used_bytes
            if not self._displace(account.policy, key, size_bytes, free, sys.maxsize, pinned, own, victims):
                return None
        if not self._displace(self._policy, key, size_bytes, free_bytes, free_blocks, pinned, list(victims), victims):
            return None
        return list(victims)

    def insert(self, key: bytes, size_bytes: int) -> None:
        """See `Policy.insert`."""
        accounts = self.accounts(key)
        self._sizes[key] = size_bytes
        if accounts:
            self._accounts_of[key] = accounts
        if self._may_pin(key, size_bytes):
            self._pin(key, size_bytes)
        else:
            for policy in self._policies(key):
                policy.insert(key, size_bytes)

    def touch(self, key: bytes) -> None:
        """See `Policy.touch`."""
        if key not in self._pinned:
            for policy in self._policies(key):
                policy.touch(key)

    def remove(self, key: bytes) -> None:
        """See `Policy.remove`."""
        size_bytes = self._sizes.pop(key, None)
        if size_bytes is None:
            return
        if key in self._pinned:
            self._unpin(key, size_bytes)
        else:
            for policy in self._policies(key):
                policy.remove(key)
        self._accounts_of.pop(key, None)

    def leaving(self) -> Iterator[bytes]:
        """See `Policy.leaving`; what is pinned is not among them."""
        return self._policy.leaving()

    def refresh(self, keys: Iterable[bytes]) -> None:
        """Ask again whether these blocks are pinned; unknown keys are ignored."""
        for key in keys:
            size_bytes = self._sizes.get(key)
            if size_bytes is None:
                continue
            if key in self._pinned:
                if not self._is_pinned(key):
                    self._unpin(key, size_bytes)
                    for policy in self._policies(key):
                        policy.insert(key, size_bytes)
            elif self._may_pin(key, size_bytes):
                for policy in self._policies(key):
                    policy.remove(key)
                self._pin(key, size_bytes)

    def keys(self) -> list[bytes]:
        """Return the blocks that are here or coming in, and are not about to leave."""
        return list(self._sizes)

    def size_of(self, key: bytes) -> int | None:
        """Return what such a block takes on the medium; None for any other."""
        return self._sizes.get(key)

    def protects(self, key: bytes) -> bool:
        """Say whether a pin protects the block here."""
        return key in self._pinned

    def stats(self) -> dict[str, Any]:
        """Return what pins protect and what quotas take, as plain values."""
        quotas = [
            {"name": account.name, "limit_bytes": account.limit_bytes, "used_bytes": account.used_bytes}
            for account in sorted(self._accounts.values(), key=lambda account: account.name)
        ]
        return {"pinned_bytes": self.pinned_bytes, "max_pinned_bytes": self.max_pinned_bytes, "quotas": quotas}

    def _displace(
        self,
        policy: Policy,
        key: bytes,
        size_bytes: int,
        free_bytes: int,
        free_blocks: int,
        pinned: bool,
        chosen: Sequence[bytes],
        victims: dict[bytes, None],
    ) -> bool:
        """Add to `victims` what `policy` gives up beside those of its blocks that are `chosen` already."""
        free_bytes += sum(self._sizes[victim] for victim in chosen)
        free_blocks += len(chosen)
        if pinned:
            others = (victim for victim in policy.leaving() if victim not in victims)
            more = first_enough(others, self._sizes, size_bytes, free_bytes=free_bytes, free_blocks=free_blocks)
            if more is None:
                return False
            victims.update(dict.fromkeys(more))
            return True
        # What the policy names again makes room only once.
        left = set(chosen)
        while True:
            more = policy.admit(key, size_bytes, free_bytes=free_bytes, free_blocks=free_blocks)
            if more is None:
                return False
            again = left.intersection(more)
            if not again:
                victims.update(dict.fromkeys(more))
                return True
            left -= again
            free_bytes -= sum(self._sizes[victim] for victim in again)
            free_blocks -= len(again)

    def _account(self, name: str, limit_bytes: int) -> Account:
        account = self._accounts.get(name)
        if account is None:
            account = self._accounts[name] = Account(name, limit_bytes, self._make_policy())
        return account

    def _policies(self, key: bytes) -> list[Policy]:
        return [self._policy, *(account.policy for account in self._accounts_of.get(key, ()))]

    def _may_pin(self, key: bytes, size_bytes: int) -> bool:
        return self.pinned_bytes + size_bytes <= self.max_pinned_bytes and self._is_pinned(key)

    def _pin(self, key: bytes, size_bytes: int) -> None:
        self._pinned.add(key)
        self.pinned_bytes += size_bytes

    def _unpin(self, key: bytes, size_bytes: int) -> None:
        self._pinned.remove(key)
        self.pinned_bytes -= size_bytes
