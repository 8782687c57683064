"""A batch as a message: payloads in slots, the rest pickled.

Whatever a collate function returns is pickled with protocol 5. Payloads of 4 KiB and more (tensors, numpy arrays and
everything else that offers a `PickleBuffer`) are taken out of the stream and placed in a slot; what collate has already
written to a slot stays where it is. A stream that is itself long (many strings, large `bytes`) also travels in a slot,
so that messages stay small.

Tensors keep dtype, strides, `requires_grad` and shared storage. A view of a much larger storage travels alone.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.multiprocessing import reductions

from dataflow.loaders.slots import Placement, SlotMap, SlotPool

__all__ = ["DIVERT_BYTES", "Parcel", "pack", "unpack"]

DIVERT_BYTES = 4096

# A storage is taken whole if this tensor uses at least one of so many of its bytes; else the tensor is copied out of it.
_WHOLE_STORAGE_RATIO = 2
_IN_NUMPY = frozenset({"bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"})


class Parcel(NamedTuple):
    """What stands in for a batch on its way.

    Attributes:
        stream: The pickle, or where it lies.
        buffers: Where the payloads lie, in the order in which the pickle asks for them.
    """

    stream: bytes | Placement
    buffers: list[Placement]

    def slots(self) -> set[int]:
        """Return the numbers of the slots that it needs."""
        placed = self.buffers if isinstance(self.stream, bytes) else [*self.buffers, self.stream]
        return {placement.slot for placement in placed}


def pack(batch: Any, pool: SlotPool) -> Parcel:
    """Turn a batch into a parcel over the pool's current slots.

    Raises:
        Exception: Whatever pickling the batch raises.
    """
    chunks = _Chunks()
    packer = _Packer(chunks, pool)
    packer.dump(batch)
    size_bytes = sum(map(len, chunks))
    if size_bytes >= DIVERT_BYTES:
        memory = pool.allocate(size_bytes)
        if memory is not None:
            _fill(memory, chunks)
            placement = pool.locate(address_of(memory), size_bytes)
            assert placement is not None
            return Parcel(placement, packer.buffers)
    return Parcel(b"".join(chunks), packer.buffers)


def unpack(parcel: Parcel, slots: SlotMap) -> Any:
    """Rebuild the batch. Its tensors and arrays lie over the slots, or own their memory if the caller holds too much."""
    leases = {}
    capacity = {number: 0 for number in parcel.slots()}
    for number in capacity:
        size_bytes = max(
            place.offset + place.size_bytes for place in (*parcel.buffers, parcel.stream) if _is_in(place, number)
        )
        leases[number] = slots.lease(number, size_bytes)

    def view(place: Placement) -> npt.NDArray[np.uint8]:
        lease, keep = leases[place.slot]
        part = lease[place.offset : place.offset + place.size_bytes]
        return part if keep else part.copy()

    stream = parcel.stream
    if isinstance(stream, Placement):
        lease, _ = leases[stream.slot]
        stream = lease[stream.offset : stream.offset + stream.size_bytes].data
    return pickle.loads(stream, buffers=[view(place) for place in parcel.buffers])


def _is_in(place: bytes | Placement, number: int) -> bool:
    return isinstance(place, Placement) and place.slot == number


class _Chunks(list[bytes]):
    """A file that keeps what is written to it: pickle hands large `bytes` over as they are."""

    def write(self, chunk: bytes) -> int:
        self.append(chunk)
        return len(chunk)


def _fill(memory: npt.NDArray[np.uint8], chunks: list[bytes]) -> None:
    view, start = memory.data, 0
    for chunk in chunks:
        view[start : start + len(chunk)] = chunk
        start += len(chunk)


class _Packer(pickle.Pickler):
    def __init__(self, chunks: _Chunks, pool: SlotPool) -> None:
        super().__init__(chunks, protocol=5, buffer_callback=self._place)
        # Connections, sockets and whatever else is registered; torch's reductions of CPU tensors are overridden below.
        self.dispatch_table = ForkingPickler(chunks).dispatch_table
        self.buffers: list[Placement] = []
        self._pool = pool
        # By address and size, with the buffer, which keeps the address from being used for something else meanwhile.
        self._placed: dict[tuple[int, int], tuple[Placement, pickle.PickleBuffer]] = {}

    def reducer_override(self, value: Any) -> Any:
        """Say how tensors, storages and read-only arrays are pickled; all else goes its usual way."""
        if isinstance(value, torch.Tensor):
            return _reduce_tensor(value)
        if isinstance(value, torch.UntypedStorage) and value.device.type == "cpu":
            return _rebuild_storage, (_buffer_of_storage(value),)
        if isinstance(value, torch.storage.TypedStorage) and value.device.type == "cpu":
            return _rebuild_typed_storage, (value.untyped(), value.dtype)
        if type(value) is np.ndarray and value.nbytes < DIVERT_BYTES and not value.flags.writeable:
            return value.copy().__reduce_ex__(5)  # inside the stream read-only memory would stay read-only
        return NotImplemented

    def _place(self, buffer: pickle.PickleBuffer) -> bool:
        """Take a payload out of the stream and say False, or say True if it is small or there is no slot."""
        raw = np.frombuffer(buffer.raw(), np.uint8)
        if raw.size < DIVERT_BYTES:
            return True
        key = (address_of(raw), raw.size)
        if key in self._placed:
            placement, _ = self._placed[key]
        else:
            found = self._pool.locate(*key)
            if found is None:
                memory = self._pool.allocate(raw.size)
                if memory is None:
                    return True
                np.copyto(memory, raw)
                found = self._pool.locate(address_of(memory), raw.size)
            assert found is not None
            self._placed[key] = (found, buffer)
            placement = found
        self.buffers.append(placement)
        return False


def address_of(array: npt.NDArray[Any]) -> int:
    """Return where the array's memory begins."""
    address: int = array.__array_interface__["data"][0]
    return address


def _reduce_tensor(tensor: torch.Tensor) -> Any:
    if tensor.requires_grad and not tensor.is_leaf:
        raise RuntimeError(
            "Cowardly refusing to serialize non-leaf tensor which requires_grad, since autograd does not support "
            "crossing process boundaries.  If you just want to transfer the data, call detach() on the tensor before "
            "serializing (e.g., putting it on the queue)."
        )
    if tensor.device.type != "cpu":
        return reductions.reduce_tensor(tensor)
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        return tensor.__reduce_ex__(5)
    size_bytes = tensor.numel() * tensor.element_size()
    storage = tensor.untyped_storage()
    if storage.nbytes() > _WHOLE_STORAGE_RATIO * size_bytes:
        # A clone also keeps the memory format, where the tensor fills what it spans.
        tensor = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        storage = tensor.untyped_storage()
    kind = type(tensor)
    if (
        (kind is not torch.Tensor and kind is not torch.nn.Parameter)
        or tensor.__dict__
        or tensor.is_conj()
        or tensor.is_neg()
    ):
        return tensor.__reduce_ex__(5)
    dtype = str(tensor.dtype)[6:]
    whole = storage.nbytes() == size_bytes > 0 and tensor.is_contiguous()
    if whole and kind is torch.Tensor and dtype in _IN_NUMPY and not tensor.requires_grad:
        return _rebuild_whole, (pickle.PickleBuffer(tensor.numpy()), dtype, tuple(tensor.shape))
    layout = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
    return _rebuild_tensor, (
        _buffer_of_storage(storage),
        dtype,
        layout,
        tensor.requires_grad,
        kind is torch.nn.Parameter,
    )


def _buffer_of_storage(storage: torch.UntypedStorage) -> pickle.PickleBuffer:
    return pickle.PickleBuffer(_bytes_over(storage).numpy())


def _bytes_over(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload, no-any-return]


def _rebuild_whole(buffer: Any, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.frombuffer(buffer, dtype=getattr(torch, dtype)).view(shape)


def _rebuild_tensor(
    buffer: Any,
    dtype: str,
    layout: tuple[int, tuple[int, ...], tuple[int, ...]],
    requires_grad: bool,
    is_parameter: bool,
) -> torch.Tensor:
    tensor = torch.empty(0, dtype=getattr(torch, dtype)).set_(_rebuild_storage(buffer), *layout)  # type: ignore[call-overload]
    return torch.nn.Parameter(tensor, requires_grad) if is_parameter else tensor.requires_grad_(requires_grad)


def _rebuild_storage(buffer: Any) -> torch.UntypedStorage:
    if not len(buffer):
        return torch.UntypedStorage(0)
    return torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()


def _rebuild_typed_storage(storage: torch.UntypedStorage, dtype: torch.dtype) -> torch.storage.TypedStorage:
    return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)
