"""From host memory to pinned memory and to a device, ahead of the step that needs it.

A batch that has arrived is pinned and copied by one background thread, on a stream of its own, while the model works on
the batch before it. `finish` makes the current stream wait for that copy, not the host, and tells the allocator that the
memory is used there. Devices are strings and all calls are torch's generic ones, so any backend that registers itself
with torch works; a device without streams is copied to in place.
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
from torch.utils.data import _utils

__all__ = ["Staging", "map_tensors"]


@dataclass(slots=True)
class _Staged:
    host: Any  # alive until the copy is done
    batch: Any
    event: Any


class Staging:
    """Brings batches to where the caller wants them. Used by one thread; copies happen in another.

    Args:
        device: Where to; None for host memory.
        pin_device: Type of the accelerator to pin for; None leaves batches in pageable memory.
    """

    def __init__(self, device: torch.device | None, pin_device: str | None) -> None:
        self._device = None if device is None or device.type == "cpu" else device
        self._pin_device = pin_device
        self._module = _device_module(self._device)
        self._stream = None if self._module is None else self._module.Stream(self._device)
        # Accelerators have a current device per thread: the copies go where the caller's thread is.
        accelerator = None if pin_device is None else torch.get_device_module(pin_device)
        index = accelerator.current_device() if accelerator is not None else None
        self._thread = ThreadPoolExecutor(
            1,
            "dataflow-staging",
            initializer=_prepare_thread,
            initargs=(accelerator, index),
        )

    @property
    def is_needed(self) -> bool:
        """Whether there is anything to do at all."""
        return self._device is not None or self._pin_device is not None

    def begin(self, batch: Any) -> Future[_Staged]:
        """Start to bring a batch over."""
        return self._thread.submit(self._stage, batch)

    def finish(self, staged: Future[_Staged]) -> Any:
        """Return the batch, ready to be used on the current stream.

        Raises:
            Exception: Whatever pinning or copying raised.
        """
        result = staged.result()
        if result.event is not None:
            stream = self._module.current_stream(self._device)
            stream.wait_event(result.event)
            map_tensors(result.batch, lambda tensor: tensor.record_stream(stream))
        return result.batch

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _stage(self, batch: Any) -> _Staged:
        if self._pin_device is not None:
            batch = _utils.pin_memory.pin_memory(batch, self._pin_device)
        if self._device is None:
            return _Staged(None, batch, None)
        on_stream = contextlib.nullcontext() if self._stream is None else self._module.stream(self._stream)
        with on_stream:
            there = map_tensors(batch, lambda tensor: tensor.to(self._device, non_blocking=True))
            event = None if self._stream is None else self._stream.record_event()
        return _Staged(batch, there, event)


def _device_module(device: torch.device | None) -> Any:
    """Return the backend's module if it has streams."""
    if device is None:
        return None
    try:
        module = torch.get_device_module(device)
    except RuntimeError:
        return None
    return module if hasattr(module, "Stream") and hasattr(module, "stream") else None


def _prepare_thread(accelerator: Any, index: int | None) -> None:
    torch.set_num_threads(1)
    if accelerator is not None:
        accelerator.set_device(index)


def map_tensors(value: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """Rebuild nested containers with `function` applied to each tensor, as torch's pin_memory walks them.

    Objects of other types with a `to` method are tensors, too, for that purpose only if they are `torch.Tensor`s; all else
    is left as it is.
    """
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (str, bytes)):
        return value
    if isinstance(value, collections.abc.Mapping):
        mapped = {key: map_tensors(item, function) for key, item in value.items()}
        if isinstance(value, collections.abc.MutableMapping):
            clone = copy.copy(value)
            clone.update(mapped)
            return clone
        return mapped
    if isinstance(value, tuple):
        items = [map_tensors(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, list):
        return [map_tensors(item, function) for item in value]
    return value
