"""From host memory to pinned memory and to a device, ahead of the step that needs it.

A batch that has arrived is pinned and copied by one background thread, on a stream of its own, while the model works on
the batch before it. `finish` makes the current stream wait for that copy, not the host, and tells the allocator that
the memory is used there. Devices are strings and all calls are torch's generic ones, so any backend that has registered
itself with torch works; one without streams is copied to all the same.
"""

from __future__ import annotations

import collections.abc
import contextlib
import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from dataflow.loaders.parallelism import parallelism_kept, use_one_thread
from dataflow.loaders.torch_private import accelerator, pin_memory
from dataflow.observe.stages import stage

__all__ = ["Staged", "Staging", "map_tensors"]


@dataclass(frozen=True, slots=True)
class Staged:
    """A batch on its way.

    Attributes:
        batch: Where the caller wants it.
        host: What it is copied from, alive until the copy is done.
        event: Marks the end of the copy; None where there is nothing to wait for.
    """

    batch: Any
    host: Any = None
    event: Any = None


class Staging:
    """Brings batches to where the caller wants them. Used by one thread; what is done ahead happens in another.

    Args:
        device: Where to; None for host memory.
        pins: Whether host memory is to be pinned.
        pin_device: The accelerator to pin for, where torch names one; by default the one that there is.
    """

    def __init__(self, device: torch.device | None, *, pins: bool, pin_device: str | None) -> None:
        self._device = device
        self._pins = pins
        self._pin_device = pin_device
        self._backend = _backend_of(device)
        has_streams = hasattr(self._backend, "Stream") and hasattr(self._backend, "current_stream")
        self._stream = self._backend.Stream(device) if has_streams else None
        self._thread: ThreadPoolExecutor | None = None

    @classmethod
    def for_loader(cls, device: str | torch.device | None, *, pins: bool, pin_device: str | None) -> Staging | None:
        """Return a staging if there is anything to do."""
        target = None if device is None or torch.device(device).type == "cpu" else torch.device(device)
        return cls(target, pins=pins, pin_device=pin_device) if pins or target is not None else None

    def bring(self, batch: Any) -> Any:
        """Bring a batch over now, on the current stream."""
        with stage("transfer"):
            if self._pins:
                batch = pin_memory(batch, self._pin_device)
            return batch if self._device is None else self._copy(batch)

    def begin(self, batch: Any) -> Future[Staged]:
        """Start to bring a batch over."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "dataflow-staging")
            with parallelism_kept():
                self._thread.submit(_prepare_thread, *self._current_device()).result()
        return self._thread.submit(self._stage, batch)

    def finish(self, staged: Future[Staged]) -> Any:
        """Return the batch, ready to be used on the current stream.

        Raises:
            Exception: Whatever pinning or copying raised.
        """
        with stage("transfer"):
            result = staged.result()
        if result.event is not None:
            stream = self._backend.current_stream(self._device)
            stream.wait_event(result.event)
            map_tensors(result.batch, lambda tensor: tensor.record_stream(stream))
        return result.batch

    def close(self) -> None:
        """End the thread; another one starts with the next batch, if there is any."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown(wait=True, cancel_futures=True)

    def _stage(self, batch: Any) -> Staged:
        if self._pins:
            batch = pin_memory(batch, self._pin_device)
        if self._device is None:
            return Staged(batch)
        with contextlib.nullcontext() if self._stream is None else self._backend.stream(self._stream):
            there = self._copy(batch)
        return Staged(there, batch, None if self._stream is None else self._stream.record_event())

    def _copy(self, batch: Any) -> Any:
        return map_tensors(batch, lambda tensor: tensor.to(self._device, non_blocking=True))

    def _current_device(self) -> tuple[Any, int | None]:
        """What the thread has to be told: accelerators have a current device for each thread."""
        backend = self._backend
        if backend is None and self._pins:
            backend = _backend_of(torch.device(self._pin_device) if self._pin_device else accelerator())
        return backend, backend.current_device() if hasattr(backend, "set_device") else None


def _backend_of(device: torch.device | None) -> Any:
    """Return the module that a device's backend has registered, or None."""
    if device is None:
        return None
    try:
        return torch.get_device_module(device)
    except RuntimeError:
        return None


def _prepare_thread(backend: Any, index: int | None) -> None:
    use_one_thread()
    if index is not None:
        backend.set_device(index)


def map_tensors(value: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """Rebuild nested mappings, tuples and lists with `function` applied to each tensor, keeping their types.

    Other objects with a `to` method of their own are left to the caller; everything else stays as it is.
    """
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, collections.abc.Mapping):
        mapped = {key: map_tensors(item, function) for key, item in value.items()}
        if not isinstance(value, collections.abc.MutableMapping):
            return type(value)(mapped)  # type: ignore[call-arg]
        clone = copy.copy(value)
        clone.update(mapped)
        return clone
    if isinstance(value, tuple):
        items = [map_tensors(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, list):
        return [map_tensors(item, function) for item in value]
    return value
