"""A batch as a message: payloads in slots, the rest pickled.

Whatever a collate function returns is pickled with protocol 5. Payloads of 4 KiB and more (tensors, numpy arrays and
everything else that offers a `PickleBuffer`) are taken out of the stream and placed in a slot; what collate has already
written to a slot stays where it is. A stream that is itself long (many strings, large `bytes`) also travels in a slot,
so that messages stay small.

Batches that were gathered together travel without a pickle each: their columns lie in a slot, and a batch is some rows.

Tensors keep dtype, strides, `requires_grad` and shared storage. A view of a much larger storage travels alone.
"""

from __future__ import annotations

import pickle
import threading
from itertools import pairwise
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.multiprocessing import reductions

from dataflow.dataset.rows import address_of
from dataflow.loaders.slots import Bytes, Leases, Placement, SlotPool
from dataflow.loaders.torch_private import has_names

__all__ = ["DIVERT_BYTES", "Parcel", "Piece", "pack", "pack_rows", "unpack"]

DIVERT_BYTES = 4096

# A storage is taken whole if a tensor uses one of so many of its bytes; else the tensor is copied out of it.
_WHOLE_STORAGE_RATIO = 2
# Types that numpy has too, by name and back.
_NAMED = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _NAMED}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Parcel(NamedTuple):
    """What stands in for a batch on its way.

    Attributes:
        stream: The pickle, or where it lies.
        buffers: Where the payloads lie that the pickle asks for, in that order; it names the places of others itself.
    """

    stream: bytes | Placement
    buffers: list[Placement]


# A column of several batches: its slot, where it begins there, the type of its values, and its shape.
_Placed: TypeAlias = tuple[int, int, str, tuple[int, ...]]


class Piece(NamedTuple):
    """What stands in for a batch that was gathered with others: some rows of the columns of all of them.

    Attributes:
        columns: By name. The same object in all pieces, so that it is pickled once.
        start: The first row.
        stop: Behind the last one.
    """

    columns: dict[str, _Placed]
    start: int
    stop: int


def pack(batch: Any, pool: SlotPool, slots: dict[int, int]) -> Parcel:
    """Turn a batch into a parcel over the pool's current slots.

    Args:
        batch: Whatever a collate function returns.
        pool: Where its payloads lie, or go.
        slots: How much of each slot, by its number, is needed by parcels that travel together; grows.

    Raises:
        Exception: Whatever pickling the batch raises.
    """
    chunks, placer = _Chunks(), _Placer(pool, slots)
    _Packer(chunks, placer).dump(batch)
    stream = placer.write(chunks) or b"".join(chunks)
    return Parcel(stream, placer.buffers)


def pack_rows(
    columns: dict[str, npt.NDArray[Any]], ends: list[int], pool: SlotPool, slots: dict[int, int]
) -> list[Piece] | None:
    """Turn batches that were gathered together into pieces over the pool's current slots, all at the price of one.

    Args:
        columns: Of all of them, by name: arrays of types that torch has.
        ends: Where each batch ends in the columns, after a 0.
        pool: Where the columns lie, or go.
        slots: As for `pack`.

    Returns:
        By batch; None where there is no slot for them.
    """
    placer, where = _Placer(pool, slots), {}
    for name, column in columns.items():
        place = placer.find_or_copy(column.reshape(-1).view(np.uint8))
        if place is None:
            return None
        where[name] = (place.slot, place.offset, column.dtype.str, column.shape)
    return [Piece(where, start, stop) for start, stop in pairwise(ends)]


def unpack(parcel: Parcel | Piece, leases: Leases) -> Any:
    """Rebuild the batch; its tensors and arrays lie over the slots, unless the caller holds too much already."""
    if isinstance(parcel, Piece):
        return {name: _rows(column, parcel.start, parcel.stop, leases) for name, column in parcel.columns.items()}
    whole = parcel.stream
    stream = leases[whole.slot].memory[whole.span].data if isinstance(whole, Placement) else whole
    _arrival.leases = leases
    try:
        return pickle.loads(stream, buffers=[leases[place.slot].view(place) for place in parcel.buffers])
    finally:
        del _arrival.leases


class _Arrival(threading.local):
    """The leases of the batch that this thread is unpacking."""

    leases: Leases


_arrival = _Arrival()


class _Chunks(list[bytes | memoryview]):
    """A file that keeps what is written to it: pickle hands over large `bytes`, and buffers in band, as they are."""

    def write(self, chunk: bytes | pickle.PickleBuffer) -> int:
        kept = chunk.raw() if isinstance(chunk, pickle.PickleBuffer) else chunk
        self.append(kept)
        return len(kept)


class _Placer:
    """Finds or makes a place in a slot for each payload.

    An object of its own: a pickler that referred to itself would keep the batch until the next garbage collection.
    """

    def __init__(self, pool: SlotPool, slots: dict[int, int]) -> None:
        self.buffers: list[Placement] = []
        self._slots = slots
        self._pool = pool
        # What was copied, by address and size, with its owner, so that the address means the same until all is packed.
        self._copied: dict[tuple[int, int], tuple[Placement, Any]] = {}

    def place(self, buffer: pickle.PickleBuffer) -> bool:
        """Take a payload out of the stream and say False, or say True if it is small or there is no slot."""
        raw = np.frombuffer(buffer.raw(), np.uint8)
        placement = self.find_or_copy(raw) if raw.size >= DIVERT_BYTES else None
        if placement is None:
            return True
        self.buffers.append(placement)
        return False

    def find(self, address: int, size_bytes: int) -> Placement | None:
        """Say where memory lies in a slot, where collate or an earlier payload has put it there."""
        known = self._copied.get((address, size_bytes))
        placement = self._pool.locate(address, size_bytes) if known is None else known[0]
        if placement is not None:
            end = placement.offset + size_bytes
            self._slots[placement.slot] = max(end, self._slots.get(placement.slot, 0))
        return placement

    def find_or_copy(self, raw: Bytes) -> Placement | None:
        """Say where bytes lie in a slot, after copying them there if need be; None if there is no slot."""
        address = address_of(raw)
        placement = self.find(address, raw.size)
        if placement is not None:
            return placement
        memory = self._pool.allocate(raw.size)
        if memory is None:
            return None
        np.copyto(memory, raw)
        placement = self.find(address_of(memory), raw.size)
        assert placement is not None
        self._copied[address, raw.size] = placement, raw
        return placement

    def write(self, chunks: _Chunks) -> Placement | None:
        """Put a long stream into a slot, if there is one."""
        size_bytes = sum(map(len, chunks))
        memory = self._pool.allocate(size_bytes) if size_bytes >= DIVERT_BYTES else None
        if memory is None:
            return None
        view, start = memory.data, 0
        for chunk in chunks:
            view[start : start + len(chunk)] = chunk
            start += len(chunk)
        return self.find(address_of(memory), size_bytes)


# Connections, sockets and whatever else is registered; torch's own reductions of CPU tensors are overridden below.
_REGISTERED = ForkingPickler(_Chunks()).dispatch_table


class _Packer(pickle.Pickler):
    def __init__(self, chunks: _Chunks, placer: _Placer) -> None:
        super().__init__(chunks, protocol=5, buffer_callback=placer.place)
        self.dispatch_table = _REGISTERED
        self._placer = placer

    def reducer_override(self, value: Any) -> Any:
        """Say how tensors, storages and read-only arrays are pickled; all else goes its usual way."""
        if isinstance(value, torch.Tensor):
            return _reduce_tensor(value, self._placer)
        if isinstance(value, torch.UntypedStorage) and value.device.type == "cpu":
            return _rebuild_storage, (_buffer_of_storage(value),)
        if type(value) is np.ndarray and not value.flags.writeable:
            return value.copy().__reduce_ex__(5)  # a batch may be written to, as it may in torch
        return NotImplemented


def _reduce_tensor(tensor: torch.Tensor, placer: _Placer) -> Any:
    size_bytes = tensor.numel() * tensor.element_size() if _is_strided(tensor) else 0
    if size_bytes and tensor.is_contiguous() and _travels_alone(tensor.untyped_storage().nbytes(), size_bytes):
        dtype = _NAMES.get(tensor.dtype)
        if dtype is not None and not tensor.requires_grad:  # nearly all that a collate function makes
            place = placer.find(tensor.data_ptr(), size_bytes) if size_bytes >= DIVERT_BYTES else None
            if place is not None:
                return _rebuild_placed, (place.slot, place.offset, dtype, tuple(tensor.shape))
            return _rebuild_whole, (_buffer(tensor), dtype, tuple(tensor.shape))
    return _reduce_any_tensor(tensor)


def _travels_alone(storage_bytes: int, size_bytes: int) -> bool:
    return storage_bytes == size_bytes or storage_bytes > _WHOLE_STORAGE_RATIO * size_bytes


def _is_strided(tensor: torch.Tensor) -> bool:
    """Whether a tensor is plain: dtype, shape, strides and bytes in this process are all there is to it."""
    return (
        type(tensor) is torch.Tensor
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not (tensor.is_quantized or tensor.is_nested or tensor.is_conj() or tensor.is_neg() or tensor.__dict__)
        and not has_names(tensor)
    )


def _reduce_any_tensor(tensor: torch.Tensor) -> Any:
    if tensor.requires_grad and not tensor.is_leaf:
        raise RuntimeError(
            "Cowardly refusing to serialize non-leaf tensor which requires_grad, since autograd does not support "
            "crossing process boundaries.  If you just want to transfer the data, call detach() on the tensor before "
            "serializing (e.g., putting it on the queue)."
        )
    if not tensor.is_cpu:
        return reductions.reduce_tensor(tensor)
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        return tensor.__reduce_ex__(5)
    storage = tensor.untyped_storage()
    size_bytes = tensor.numel() * tensor.element_size()
    if storage.nbytes() != size_bytes and _travels_alone(storage.nbytes(), size_bytes):
        # A clone also keeps the memory format, where the tensor fills what it spans.
        tensor = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        storage = tensor.untyped_storage()
    is_parameter = type(tensor) is torch.nn.Parameter
    if not is_parameter and not _is_strided(tensor):
        return tensor.__reduce_ex__(5)
    layout = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
    buffer = _buffer_of_storage(storage)
    return _rebuild_tensor, (buffer, _dtype_name(tensor.dtype), layout, tensor.requires_grad, is_parameter)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _buffer_of_storage(storage: torch.UntypedStorage) -> pickle.PickleBuffer:
    return _buffer(torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage))


def _buffer(tensor: torch.Tensor) -> pickle.PickleBuffer:
    array: Any = tensor.numpy()  # a buffer, which its type does not say
    return pickle.PickleBuffer(array)


def _rebuild_placed(slot: int, offset: int, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    lease = _arrival.leases[slot]
    # By way of numpy, whose calls are the cheaper ones; what it makes refers to the lease.
    array: npt.NDArray[Any] = np.ndarray(shape, dtype, lease.memory, offset)
    return torch.from_numpy(array if lease.keep else array.copy())


def _rows(column: _Placed, start: int, stop: int, leases: Leases) -> torch.Tensor:
    """Return some rows: over the slot, but for few of them a copy, which does not keep all of it."""
    slot, offset, dtype, shape = column
    lease = leases[slot]
    rows: npt.NDArray[Any] = np.ndarray(shape, dtype, lease.memory, offset)[start:stop]
    return torch.from_numpy(rows if lease.keep and rows.nbytes >= DIVERT_BYTES else rows.copy())


def _rebuild_whole(buffer: Any, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.frombuffer(buffer, dtype=_DTYPES[dtype]).view(shape)


def _rebuild_tensor(
    buffer: Any,
    dtype: str,
    layout: tuple[int, tuple[int, ...], tuple[int, ...]],
    requires_grad: bool,
    is_parameter: bool,
) -> torch.Tensor:
    tensor = torch.empty(0, dtype=getattr(torch, dtype), device="cpu").set_(_rebuild_storage(buffer), *layout)
    return torch.nn.Parameter(tensor, requires_grad) if is_parameter else tensor.requires_grad_(requires_grad)


def _rebuild_storage(buffer: Any) -> torch.UntypedStorage:
    if not len(buffer):
        return torch.UntypedStorage(0)
    return torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()
