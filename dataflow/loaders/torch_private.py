"""The names of torch that have no public door, all in one place.

A drop-in DataLoader has to share torch's base class, seeds and fetchers to stay exact. These names exist since torch
2.4; a release that moves one is met here and nowhere else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, _utils, dataloader

__all__ = [
    "BaseIterator",
    "DatasetKind",
    "ExceptionWrapper",
    "JOIN_TIMEOUT_S",
    "accelerator",
    "collate_tensors",
    "collate_with",
    "create_fetcher",
    "dataset_kind",
    "default_collate_fn_map",
    "forget_worker_info",
    "has_names",
    "index_sampler",
    "interpreter_is_leaving",
    "name_thread",
    "numpy_seed",
    "pin_memory",
    "profiler_is_on",
    "set_worker_info",
    "set_worker_signal_handlers",
    "sharding_init_fn",
]

BaseIterator: Any = dataloader._BaseDataLoaderIter
DatasetKind: Any = dataloader._DatasetKind
# How long torch waits for a worker to leave before it uses force.
JOIN_TIMEOUT_S: float = _utils.MP_STATUS_CHECK_INTERVAL

create_fetcher: Callable[..., Any] = DatasetKind.create_fetcher
pin_memory: Callable[..., Any] = _utils.pin_memory.pin_memory
collate_with: Callable[..., Any] = _utils.collate.collate
collate_tensors: Callable[..., torch.Tensor] = _utils.collate.collate_tensor_fn
default_collate_fn_map: dict[Any, Callable[..., Any]] = _utils.collate.default_collate_fn_map
set_worker_signal_handlers: Callable[[], None] = _utils.signal_handling._set_worker_signal_handlers  # type: ignore[attr-defined]
# Newer releases of torch have it.
name_thread: Callable[[str], None] = getattr(torch.multiprocessing, "_set_thread_name", lambda _: None)
numpy_seed: Callable[[int, int], list[int]] = _utils.worker._generate_state
profiler_is_on: Callable[[], bool] = torch.autograd._profiler_enabled  # type: ignore[attr-defined]
_has_names: Callable[[torch.Tensor], bool] | None = getattr(torch.Tensor, "has_names", None)


def index_sampler(loader: DataLoader[Any]) -> Any:
    """Return what yields the indices of a batch: the batch sampler, or the sampler where batches are not made."""
    return loader._index_sampler


def dataset_kind(loader: DataLoader[Any]) -> int:
    """Return whether the dataset is map-style or iterable, as torch decided."""
    kind: int = loader._dataset_kind
    return kind


def has_names(tensor: torch.Tensor) -> bool:
    """Whether the dimensions of a tensor have names; newer releases of torch have no such tensors."""
    return _has_names is not None and _has_names(tensor)


def set_worker_info(worker_id: int, num_workers: int, seed: int, dataset: Any) -> None:
    """Say what `get_worker_info()` returns in this process."""
    _utils.worker._worker_info = _utils.worker.WorkerInfo(
        id=worker_id, num_workers=num_workers, seed=seed, dataset=dataset
    )


def forget_worker_info() -> None:
    """Let go of the dataset that `set_worker_info` has named."""
    _utils.worker._worker_info = None


def sharding_init_fn(init_fn: Callable[[int], None] | None, world_size: int, rank: int) -> Callable[[int], None]:
    """Return a worker_init_fn that also deals out a data pipe among ranks and workers."""
    return functools.partial(dataloader._sharding_worker_init_fn, init_fn, world_size, rank)


def accelerator() -> torch.device | None:
    """Return what memory is pinned for where a loader names no device; before torch 2.6 that is CUDA."""
    return torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else torch.device("cuda")


def interpreter_is_leaving() -> bool:
    """Whether it is too late to talk to processes: multiprocessing ends daemons itself."""
    return _utils is None or _utils.python_exit_status is not False
