"""From indices to a batch, the same in the trainer and in a worker.

`Fetch` does it with torch's own fetchers with the user's collate function, or, where the dataset is native
(`get_batch`) and the collate function is torch's default, by gathering columns straight into the batch.

In a worker, `collate_into_slots` lets torch's default collate write into a slot, also where a user's collate function
calls it.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate, chain, islice, pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import default_collate

from dataflow.dataset.columns import Allocate
from dataflow.loaders.bad_samples import BadSamples, Sieve
from dataflow.loaders.blobs import Blobs
from dataflow.loaders.packing import DIVERT_BYTES
from dataflow.loaders.recycling import RECYCLE_BYTES
from dataflow.loaders.slots import Bytes, SlotPool
from dataflow.loaders.torch_private import (
    DatasetKind,
    collate_tensors,
    collate_with,
    create_fetcher,
    default_collate_fn_map,
)
from dataflow.observe.stages import stage
from dataflow.transforms.epoch import reading_epoch
from dataflow.transforms.ragged import RaggedColumn

__all__ = ["Fetch", "Gathered", "Memory", "collate_into", "collate_into_slots", "is_gathered", "size_bytes_of"]

# A user may teach torch's default collate new types; then only torch's own code knows what comes out.
_COLLATE_AS_SHIPPED = dict(default_collate_fn_map)
_MIN_BLOB_BYTES = 2048
_NUMBERS = {int: torch.int64, float: torch.float64}
_SCALARS_OF_NUMPY = (np.bool_, np.number, np.object_)  # one kind, as torch has it


class Gathered(NamedTuple):
    """Several batches that were gathered at once.

    Attributes:
        columns: Of all of them, by name.
        ends: Where each batch ends in the columns, after a 0.
    """

    columns: dict[str, Any]
    ends: list[int]

    @property
    def are_rows(self) -> bool:
        """Whether each batch is, as tensors, some rows of these columns."""
        return all(map(_becomes_tensor, self.columns.values()))

    def batches(self) -> list[dict[str, Any]]:
        """Return each as it would have been made alone.

        Raises:
            Exception: At least one of them cannot be collated.
        """
        with stage("collate"):
            return [
                {name: _as_collated(column[start:stop]) for name, column in self.columns.items()}
                for start, stop in pairwise(self.ends)
            ]


class Fetch:
    """Makes batches from what the sampler yields.

    Args:
        kind: torch's dataset kind (map or iterable).
        dataset: The dataset, as this process has it.
        auto_collation: Whether a sampler's item is a list of indices.
        collate_fn: The collate function, or torch's default one.
        drop_last: For iterable datasets: whether a short last batch is left out.
        memory: Where large batches are made.
        epoch: What random transforms depend on beside the sample.
        bad_samples: What to do about samples that cannot be read; None raises.
        may_join: Whether several batches may be made at once, and so be late together.

    Attributes:
        sieve: Knows the bad samples, where there is a policy.
        joins: Whether `together` may be called.
        retries: What to do before an iterable dataset that has nothing at first is iterated again, each time.
        is_new: Whether it has made nothing yet.
        then: Is called when it has made the first.
    """

    retries: Sequence[Callable[[], None]] = ()
    is_new = True
    then: Callable[[], None] | None = None

    def __init__(
        self,
        kind: int,
        dataset: Any,
        *,
        auto_collation: bool,
        collate_fn: Callable[[Any], Any],
        drop_last: bool,
        memory: Memory,
        epoch: int,
        bad_samples: BadSamples | None,
        may_join: bool,
    ) -> None:
        self._dataset = dataset
        self._epoch = epoch
        self._memory = memory
        # Nothing here refers to this object, so it ends with its last user, and the dataset with it.
        collate = partial(_collate, collate_into(memory) if collate_fn is default_collate else collate_fn)
        self._torch = create_fetcher(kind, dataset, auto_collation, collate, drop_last)
        is_native = is_gathered(kind, dataset, auto_collation, collate_fn)
        self.sieve: Sieve | None = None
        self._make: Callable[[Any], Any] = self._torch.fetch
        if is_native:
            self._make = partial(_gather, dataset, _allocator(memory))
        self.joins = may_join and is_native and bad_samples is None and getattr(dataset, "is_rowwise", False)
        if bad_samples is not None:
            probe = partial(_probe, dataset, is_native)
            num_samples = len(dataset) if bad_samples.action == "substitute" else 0
            self.sieve = Sieve(bad_samples, make=self._make, probe=probe, num_samples=num_samples)
            self._make = self.sieve.make_batch if auto_collation else self.sieve.make_sample

    def __call__(self, index: Any) -> Any:
        """Return the batch.

        Raises:
            StopIteration: An iterable dataset has no more.
        """
        with stage("fetch"), reading_epoch(self._epoch):
            return self._make_first(index) if self.is_new else self._make(index)

    def _make_first(self, index: Any) -> Any:
        self.is_new = False
        try:
            for retry in self.retries:
                with contextlib.suppress(StopIteration):
                    return self._make(index)
                retry()
                self._torch.dataset_iter, self._torch.ended = iter(self._dataset), False
            return self._make(index)
        finally:
            if self.then is not None:
                self.then()

    def together(self, indices: Sequence[Sequence[int] | npt.NDArray[np.int64]]) -> Gathered:
        """Gather several batches at once.

        Raises:
            Exception: At least one of them cannot be had; made one by one, the others can.
        """
        ends = [0, *accumulate(map(len, indices))]
        with stage("fetch"), reading_epoch(self._epoch):
            samples = np.concatenate(indices) if isinstance(indices[0], np.ndarray) else [*chain(*indices)]
            return Gathered(self._dataset.get_batch(samples, _allocator(self._memory, batches=len(indices))), ends)

    @property
    def iterator(self) -> Any:
        """What `iter()` of an iterable dataset returned; None of a map-style one."""
        return getattr(self._torch, "dataset_iter", None)

    @property
    def has_ended(self) -> bool:
        """Whether an iterable dataset has said, behind the samples of a short batch, that there are no more."""
        return getattr(self._torch, "ended", False)

    def end(self) -> None:
        """Ask an iterable dataset for no more."""
        self._torch.ended = True

    def skip(self, samples: int) -> None:
        """Read and drop samples of an iterable dataset (batches, where it yields those)."""
        if samples:
            with reading_epoch(self._epoch):
                deque(islice(self.iterator, samples), maxlen=0)


def _probe(dataset: Any, is_native: bool, item: Any) -> None:
    """Read one sample, as it is read in a batch."""
    if is_native:
        dataset.get_batch([item])
    elif getattr(dataset, "__getitems__", None):
        dataset.__getitems__([item])
    else:
        dataset[item]


def _collate(collate_fn: Callable[[Any], Any], samples: Any) -> Any:
    with stage("collate"):
        return collate_fn(samples)


def _gather(dataset: Any, allocate: Allocate, indices: Sequence[int]) -> dict[str, Any]:
    columns = dataset.get_batch(indices, allocate)
    with stage("collate"):
        return {name: _as_collated(column) for name, column in columns.items()}


class Memory(Protocol):
    """Where large batches are made: a worker's slots, or memory of this process that is used again."""

    def allocate(self, size_bytes: int) -> Bytes | None:
        """Return memory, or None where there is none to be had."""
        ...


class _Allocator:
    """Gives such memory, or fresh one for small fields and where there is none to be had: an `Allocate`.

    Who keeps the small fields of batches, such as labels, does not keep the memory of the large ones.

    Args:
        memory: Gives it.
        batches: How many are made at once.
    """

    def __init__(self, memory: Memory, batches: int = 1) -> None:
        self._memory = memory
        self._least_bytes = DIVERT_BYTES * batches

    def __call__(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        size_bytes = math.prod(shape) * dtype.itemsize
        block = self._memory.allocate(size_bytes) if size_bytes >= self._least_bytes else None
        return np.empty(shape, dtype) if block is None else block.view(dtype).reshape(shape)


class _JoiningAllocator(_Allocator):
    """Where a batch is to be pickled: one that also joins `bytes`."""

    def join(self, parts: list[memoryview | None]) -> Blobs | None:
        """See `Joins`; parts that are small on average are pickled faster than they are joined and split."""
        size_bytes = sum(len(part) for part in parts if part is not None)
        is_worth_while = size_bytes >= max(self._least_bytes, _MIN_BLOB_BYTES * len(parts))
        memory = self._memory.allocate(size_bytes) if is_worth_while else None
        return None if memory is None else Blobs.join(parts, memory)


def _allocator(memory: Memory, batches: int = 1) -> _Allocator:
    return (_JoiningAllocator if isinstance(memory, SlotPool) else _Allocator)(memory, batches)


def collate_into(memory: Memory) -> Callable[[Any], Any]:
    """Return torch's default collate, with large tensors stacked in `memory`, and numbers taken the quick way."""
    ways = _ways_into(memory, shares=isinstance(memory, SlotPool))

    def collate(samples: Any) -> Any:
        return collate_with(samples, collate_fn_map=_unless_taught(ways))

    return collate


def collate_into_slots(pool: SlotPool) -> None:
    """From now on let torch's default collate of this process stack tensors in slots."""
    default_collate_fn_map.update(_unless_taught(_ways_into(pool, shares=True)))


def _ways_into(memory: Memory, *, shares: bool) -> dict[Any, Callable[..., Any]]:
    stack = _StackInto(memory, shares=shares)
    numbers: dict[Any, Callable[..., Any]] = {int: _tensor_of_numbers, float: _tensor_of_numbers}
    return {torch.Tensor: stack, **numbers, _SCALARS_OF_NUMPY: _tensor_of_scalars}


def _unless_taught(ways: dict[Any, Callable[..., Any]]) -> dict[Any, Callable[..., Any]]:
    """Return torch's ways of collating, and ours where nobody has taught it otherwise."""
    return {
        kind: ways[kind] if kind in ways and way is _COLLATE_AS_SHIPPED[kind] else way
        for kind, way in default_collate_fn_map.items()
    }


def _tensor_of_numbers(batch: Sequence[Any], *, collate_fn_map: Any = None) -> torch.Tensor:  # noqa: ARG001
    """Make torch's tensor of Python numbers, such as labels, at a third of its cost."""
    kind = type(batch[0])
    dtype = _NUMBERS.get(kind)
    if dtype is not None and set(map(type, batch)) == {kind}:
        tensor = torch.empty(len(batch), dtype=dtype)
        if _is_plain(tensor):  # else the caller has set another device for what torch makes
            try:
                return tensor.copy_(torch.from_numpy(np.fromiter(batch, kind, len(batch))))
            except OverflowError:
                pass  # torch has words of its own for it
    as_shipped: torch.Tensor = _COLLATE_AS_SHIPPED[int if isinstance(batch[0], int) else float](batch)
    return as_shipped


def _tensor_of_scalars(batch: Sequence[Any], *, collate_fn_map: Any = None) -> torch.Tensor:  # noqa: ARG001
    """Make torch's tensor of numbers of numpy; torch 2.7 refuses a list of booleans of numpy 2.3, but no array."""
    if type(batch[0]) is np.bool_ and set(map(type, batch)) == {np.bool_}:
        return torch.tensor(np.array(batch))
    as_shipped: torch.Tensor = _COLLATE_AS_SHIPPED[_SCALARS_OF_NUMPY](batch)
    return as_shipped


class _StackInto:
    """What torch's default collate does with tensors, in memory that is used again.

    Args:
        memory: The place for large ones.
        shares: Whether torch's own would make a segment of shared memory for each tensor, as it does in workers.
    """

    def __init__(self, memory: Memory, *, shares: bool) -> None:
        self._memory = memory
        self._shares = shares

    def __call__(self, batch: Any, *, collate_fn_map: Any = None) -> torch.Tensor:
        first = batch[0]
        if not _is_plain(first):
            return collate_tensors(batch, collate_fn_map=collate_fn_map)
        size_bytes = first.nbytes * len(batch)
        # In a worker torch's own stacks into memory of the first tensor's type, whatever the others are.
        if not self._shares and (size_bytes < RECYCLE_BYTES or _needs_torch(batch)):
            return torch.stack(batch, 0)
        memory = self._memory.allocate(size_bytes) if size_bytes >= DIVERT_BYTES else None
        shape = (len(batch), *first.shape)
        if memory is not None:
            return torch.stack(batch, 0, out=torch.frombuffer(memory, dtype=first.dtype).view(shape))
        return torch.stack(batch, 0, out=first.new_empty(shape)) if self._shares else torch.stack(batch, 0)


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) is torch.Tensor
        and tensor.layout is torch.strided
        and tensor.is_cpu
        and not (tensor.is_nested or tensor.is_quantized)
    )


def _needs_torch(batch: Any) -> bool:
    """Whether stacking gives another type than the first tensor's, or a node of a graph."""
    dtype = batch[0].dtype
    return any(one.requires_grad or one.dtype != dtype for one in batch)


def _as_collated(column: npt.NDArray[Any] | list[Any] | RaggedColumn | Blobs) -> Any:
    """Return what torch's default collate makes of the samples of one column; of a ragged one its parts."""
    if isinstance(column, Blobs):
        return column
    if isinstance(column, RaggedColumn):
        return {"values": _as_collated(column.values), "offsets": _as_collated(column.offsets)}
    if _becomes_tensor(column):
        return torch.from_numpy(column)
    values = list(column)
    return default_collate(values) if values else values


def _becomes_tensor(column: Any) -> bool:
    return isinstance(column, np.ndarray) and column.dtype.kind in "biufc"


def is_gathered(kind: int, dataset: Any, auto_collation: bool, collate_fn: Callable[[Any], Any]) -> bool:
    """Whether batches are the columns of a native dataset, which takes the numbers of samples as an array too."""
    if kind != DatasetKind.Map or not auto_collation:
        return False
    return _gathers_columns(dataset) and _is_default_collate(collate_fn)


def size_bytes_of(batch: Mapping[str, Any]) -> int:
    """Return the size of the arrays of a batch of a native dataset."""
    return sum(getattr(column, "nbytes", 0) for column in batch.values())


def _gathers_columns(dataset: Any) -> bool:
    """Whether a dataset has the `get_batch(numbers, allocate)` of native ones, and not some method of that name."""
    method = getattr(dataset, "get_batch", None)
    return callable(method) and "allocate" in inspect.signature(method).parameters


def _is_default_collate(collate_fn: Callable[[Any], Any]) -> bool:
    return collate_fn is default_collate and all(
        (way := default_collate_fn_map.get(kind)) in (function, _tensor_of_numbers, _tensor_of_scalars)
        or type(way) is _StackInto
        for kind, function in _COLLATE_AS_SHIPPED.items()
    )
