"""Shared memory that batches travel in, used again and again.

A **slot** is an anonymous memory file that a worker and the trainer both map. The worker makes it, sends its descriptor
once, and both close theirs: what is left are two mappings, which end with their processes, so nothing can stay behind
whoever is killed. Fresh shared pages cost five times what memory already mapped does, hence slots are reused.

    worker (`SlotPool`)                                trainer (`SlotMap`)
    free -> allocate -> filled by collate or pack
         -> ship -------------------------------------> lease, one per batch
                                                         tensors and arrays over the lease
    free <------------------------------- returned <---- the last of them dies

Who may touch a slot: the worker from `allocate` to `ship`, the trainer until the lease has died and the worker has read
the notice of it. So a slot is never written while a tensor lives over it. Two more cases keep that true: a dataset or
collate function that holds on to a batch inside the worker (the worker looks at its own lease before it reuses a slot),
and a trainer that forks a child while it holds a batch (the child sees the same memory, so such a slot is *retired*:
forgotten on both sides instead of reused).

A caller who keeps batches keeps slots. Past `HELD_SLOTS` or `HELD_BYTES` per iterator a large batch takes its slot with
it for good, which is retired and replaced by a new one, and a batch that is small or shares its slot is copied out. So
a worker always finds a slot after at most `prefetch_factor + HELD_SLOTS` of them, and nobody ever waits for the caller
to let go.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from dataflow.loaders.channel import MAX_FDS

__all__ = [
    "GIVEN_SLOTS",
    "GIVE_BYTES",
    "HELD_BYTES",
    "HELD_SLOTS",
    "Bytes",
    "Holdings",
    "Lease",
    "Leases",
    "NewSlot",
    "Notices",
    "Placement",
    "SlotMap",
    "SlotPool",
    "Watch",
]

HELD_SLOTS = 64
HELD_BYTES = 1 << 30
# A new slot costs about as much as the copy of so many bytes. Each slot is a mapping, of which Linux allows 65,530.
GIVE_BYTES = 1 << 20
GIVEN_SLOTS = 1 << 14

# Enough for every vector instruction set, and for any dtype.
_ALIGNMENT = 64
_MIN_CAPACITY_BYTES = 1 << 16

Bytes: TypeAlias = npt.NDArray[np.uint8]


class Placement(NamedTuple):
    """Where something lies in a slot."""

    slot: int
    offset: int
    size_bytes: int

    @property
    def span(self) -> slice:
        """Where it lies in the slot's bytes."""
        return slice(self.offset, self.offset + self.size_bytes)


class NewSlot(NamedTuple):
    """A slot that the trainer does not know yet; its descriptor comes with the message."""

    number: int
    capacity_bytes: int


class Notices(NamedTuple):
    """What became of slots that the trainer had: free again, or never to be used again."""

    returned: list[int]
    retired: list[int]


def _map(fd: int, capacity_bytes: int) -> torch.Tensor:
    """Map a memory file as uint8. The mapping ends with the tensor's storage and holds no descriptor."""
    return torch.from_file(f"/proc/self/fd/{fd}", shared=True, size=capacity_bytes, dtype=torch.uint8)


@dataclass(eq=False, slots=True)
class _Slot:
    number: int
    memory: torch.Tensor
    address: int
    used_bytes: int = 0
    lease: weakref.ref[Bytes] | None = None

    @property
    def capacity_bytes(self) -> int:
        return self.memory.numel()

    @property
    def is_referenced(self) -> bool:
        return self.lease is not None and self.lease() is not None


class SlotPool:
    """The worker's side: makes slots, fills them, and takes them back. Used by one thread.

    Args:
        max_slots: Limit on the slots that exist at a time.
        max_free: Free slots kept; what comes back beyond them gives its memory back to the system.
        free_bytes: Free slots of so many bytes together are kept, however many they are.
    """

    def __init__(self, *, max_slots: int, max_free: int, free_bytes: int) -> None:
        self._max_slots = max_slots
        self._max_free = max_free
        self._free_bytes = free_bytes
        self._free: list[_Slot] = []  # the last one is the one most likely still in the processor's cache
        self._filling: list[tuple[_Slot, Bytes]] = []
        self._lent: dict[int, _Slot] = {}
        self._new: list[tuple[NewSlot, int]] = []
        self._dropped: list[int] = []
        self._next_number = 0
        self._typical_bytes = 0
        self._thread = threading.get_ident()

    def allocate(self, size_bytes: int) -> Bytes | None:
        """Return memory in a slot of the batch that is being made, or None where there is none to be had.

        It stays valid as long as it is referenced, but what is written to it after `ship` may reach the trainer.
        """
        if threading.get_ident() != self._thread:
            return None
        for filling, lease in self._filling:
            offset = -(-filling.used_bytes // _ALIGNMENT) * _ALIGNMENT
            if offset + size_bytes <= filling.capacity_bytes:
                filling.used_bytes = offset + size_bytes
                return lease[offset : offset + size_bytes]
        slot = self._take_free(size_bytes) or self._make(max(size_bytes, self._typical_bytes))
        if slot is None:
            return None
        lease = slot.memory.numpy()
        slot.lease = weakref.ref(lease)
        slot.used_bytes = size_bytes
        self._filling.append((slot, lease))
        return lease[:size_bytes]

    def locate(self, address: int, size_bytes: int) -> Placement | None:
        """Say where in the current batch's slots the memory at `address` lies, if it does."""
        for slot, _ in self._filling:
            offset = address - slot.address
            if offset >= 0 and offset + size_bytes <= slot.used_bytes:
                return Placement(slot.number, offset, size_bytes)
        return None

    def ship(self, used: Collection[int]) -> tuple[list[NewSlot], list[int], list[int]]:
        """End the batch: the slots numbered `used` now belong to the trainer, the others are free again.

        Returns:
            Slots new to the trainer, numbers of slots to forget, and the descriptors of the new ones, to be sent with
            the batch and then closed with `close_fds`.
        """
        self._typical_bytes = max(self._typical_bytes, sum(slot.used_bytes for slot, _ in self._filling))
        for slot, _ in self._filling:
            if slot.number in used:
                self._lent[slot.number] = slot
            else:
                self._free.append(slot)
        self._filling.clear()
        new, dropped = self._new, self._dropped
        self._new, self._dropped = [], []
        return [slot for slot, _ in new], dropped, [fd for _, fd in new]

    def take_back(self, notices: Notices) -> None:
        """Learn what the trainer let go of."""
        for number in notices.retired:
            del self._lent[number]
        for number in notices.returned:
            self._free.append(self._lent.pop(number))
        while len(self._free) > self._max_free and self._has_more_free_than(self._free_bytes):
            self._drop(self._free[0])

    def _has_more_free_than(self, size_bytes: int) -> bool:
        return sum(slot.capacity_bytes for slot in self._free) > size_bytes

    def _take_free(self, size_bytes: int) -> _Slot | None:
        """Return a free slot that is large enough. One that is too small, or kept by the user's code, gives way."""
        for slot in reversed(self._free):
            if slot.capacity_bytes >= size_bytes and not slot.is_referenced:
                self._free.remove(slot)
                return slot
        if self._free:
            self._drop(self._free[0])
        return None

    def _drop(self, slot: _Slot) -> None:
        # A slot that is still referenced here only loses its place in the ring; its memory lives with the reference.
        self._free.remove(slot)
        self._dropped.append(slot.number)

    def _make(self, size_bytes: int) -> _Slot | None:
        if len(self._lent) + len(self._filling) + len(self._free) >= self._max_slots or len(self._new) >= MAX_FDS:
            return None  # the batch, or what is left of it, travels without a slot
        # Pages are only used when they are written to, so a generous capacity costs nothing.
        capacity_bytes = max(_MIN_CAPACITY_BYTES, 1 << (size_bytes - 1).bit_length())
        try:
            fd = os.memfd_create("dataflow-slot")
        except OSError:  # out of descriptors
            return None
        try:
            os.ftruncate(fd, capacity_bytes)
            memory = _map(fd, capacity_bytes)
        except (OSError, RuntimeError):
            os.close(fd)
            return None
        slot = _Slot(self._next_number, memory, memory.data_ptr())
        self._next_number += 1
        self._new.append((NewSlot(slot.number, capacity_bytes), fd))
        return slot


class Watch(weakref.ref[Any]):
    """A weak reference to an array, which has no hash, that can be a key."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


@dataclass(slots=True)
class Holdings:
    """What the caller of a loader holds of all workers of an iterator.

    Attributes:
        ring: Bytes of the batches over slots that come back.
        given: Batches over slots that do not come back.
    """

    ring: dict[Watch, int] = field(default_factory=dict)
    given: set[Watch] = field(default_factory=set)

    def has_room(self, size_bytes: int) -> bool:
        """Whether another slot may wait for its return."""
        return len(self.ring) < HELD_SLOTS and sum(list(self.ring.values())) + size_bytes <= HELD_BYTES


class Lease(NamedTuple):
    """A batch's hold on a slot.

    Attributes:
        memory: All of the slot.
        keep: Whether views of it may be kept.
    """

    memory: Bytes
    keep: bool

    def view(self, place: Placement) -> Bytes:
        """Return what lies there: the slot's own memory, or a copy where that may not be kept."""
        part = self.memory[place.span]
        return part if self.keep else part.copy()


class SlotMap:
    """The trainer's side of one worker's slots.

    Args:
        holdings: What the caller of the loader holds, shared by all workers of an iterator.
    """

    def __init__(self, holdings: Holdings) -> None:
        self._memory: dict[int, memoryview] = {}
        self._live: dict[int, Watch] = {}
        # Leases die in any thread and at any moment; a deque takes notices without a lock.
        self._returned: deque[int] = deque()
        self._retired: deque[int] = deque()
        self._holdings = holdings
        _maps.add(self)

    def adopt(self, slot: NewSlot, fd: int) -> None:
        """Map a new slot and close its descriptor."""
        try:
            self._memory[slot.number] = _map(fd, slot.capacity_bytes).numpy().data
        finally:
            os.close(fd)

    def forget(self, numbers: Iterable[int]) -> None:
        """Unmap slots that the worker gave up."""
        for number in numbers:
            self._memory.pop(number, None)

    def lease(self, number: int, size_bytes: int, *, shared: bool) -> Lease:
        """Lend the slot's memory to a batch, or to several that share it.

        When the memory of the lease and everything that was made from it have died, the worker gets the slot back.
        """
        # A new array over the mapping, which does not lead back to another array: numpy makes what is sliced from it
        # refer to it, so its death is the death of all of them.
        memory: Bytes = np.frombuffer(self._memory[number], np.uint8)
        holdings = self._holdings
        keep = holdings.has_room(size_bytes)
        if not keep and not shared and size_bytes >= GIVE_BYTES and len(holdings.given) < GIVEN_SLOTS:
            holdings.given.add(Watch(memory, holdings.given.discard))
            self._retire(number)
            return Lease(memory, keep=True)
        live, ring, returned = self._live, holdings.ring, self._returned

        # It does not refer to the map: a tensor that outlives its loader keeps its own slot, not the whole ring.
        def end(watch: Watch) -> None:
            del ring[watch]
            if live.get(number) is watch:  # else the slot was retired
                del live[number]
                returned.append(number)

        watch = Watch(memory, end)
        live[number] = watch
        ring[watch] = size_bytes if keep else 0
        return Lease(memory, keep)

    def give_back(self, number: int) -> None:
        """Return a slot that was never leased."""
        self._returned.append(number)

    def notices(self) -> Notices:
        """Take what is to be told to the worker."""
        return Notices(_take_all(self._returned), _take_all(self._retired))

    def retire_live(self) -> None:
        """Never reuse the slots that are held now: a forked child sees them too."""
        for number in list(self._live):
            if self._live.pop(number, None) is not None:
                self._retire(number)

    def _retire(self, number: int) -> None:
        # What lives over the slot keeps its memory; neither side will look at it again.
        self._memory.pop(number, None)
        self._retired.append(number)


class Leases:
    """The slots of parcels that came together. Each is lent when the first of them needs it.

    Those that were not lent until nobody refers to the leases any more go back unused.

    Args:
        slots: The trainer's side of the worker's slots.
        used_bytes: By number of slot.
        shared: Whether there are several parcels: who keeps one of them would keep the memory of all.
    """

    def __init__(self, slots: SlotMap, used_bytes: dict[int, int], *, shared: bool) -> None:
        self._slots = slots
        self._shared = shared
        self._waiting = used_bytes
        self._lent: dict[int, Lease] = {}

    def __getitem__(self, number: int) -> Lease:
        lease = self._lent.get(number)
        if lease is None:
            lease = self._slots.lease(number, self._waiting.pop(number), shared=self._shared)
            self._lent[number] = lease
        return lease

    def __del__(self) -> None:
        for number in self.__dict__.get("_waiting", ()):  # an interrupt may have come before there were any
            self._slots.give_back(number)


def _take_all(queue: deque[int]) -> list[int]:
    taken = []
    while queue:
        taken.append(queue.popleft())
    return taken


_maps: weakref.WeakSet[SlotMap] = weakref.WeakSet()


def _retire_before_fork() -> None:
    for slot_map in list(_maps):
        slot_map.retire_live()


os.register_at_fork(before=_retire_before_fork)
