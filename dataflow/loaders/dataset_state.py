"""Where a dataset is, asked of it and told to it by the process that reads it.

A dataset may say that by `state_dict`, and so may what `iter()` of a stream returns; both are asked. The dataset is
told before it is iterated, the iterator as soon as it is there. A stream that is its own iterator is told as an
iterator, since its `__iter__` may begin anew. torchdata's `StatefulDataLoader`, for which many such datasets are
written, does it in this order.

A dataset that goes on from epoch to epoch keeps something behind their ends, too: how many there were, or a generator.
It is told that before it is iterated. If a stream then has nothing, it was told where it had ended: it is iterated once
more, as it was in the process that went on. If it has nothing even then, it begins every epoch where it was told last,
and is told its beginning.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from dataflow.loaders.order_state import is_stateful
from dataflow.loaders.torch_private import ExceptionWrapper

if TYPE_CHECKING:
    from dataflow.loaders.collate import Fetch

__all__ = ["is_state", "keep_state", "open_at", "take_state"]


def take_state(dataset: Any, fetch: Fetch) -> dict[str, Any] | None:
    """Return where a dataset is, None where nobody says.

    Args:
        dataset: The dataset.
        fetch: What reads it.
    """
    iterator = fetch.iterator
    parts = {"dataset": None if iterator is dataset else dataset, "iterator": iterator}
    state = {name: part.state_dict() for name, part in parts.items() if is_stateful(part)}
    if state and fetch.has_ended:  # its own state may be where it begins anew
        state["ended"] = True
    return state or None


def keep_state(dataset: Any) -> dict[str, Any] | None:
    """Return what a dataset keeps behind the end of an epoch, None where nobody says."""
    if not is_stateful(dataset) or _is_of_huggingface(dataset):
        return None
    return {"dataset": dataset.state_dict(), "over": True}


def _is_of_huggingface(dataset: Any) -> bool:
    """Whether it is a stream that begins every epoch where it was told once, and keeps nothing but its place."""
    names = ((kind.__module__, kind.__qualname__) for kind in type(dataset).__mro__)
    return ("datasets.iterable_dataset", "IterableDataset") in names


def is_state(state: Any) -> bool:
    """Whether `take_state` or `keep_state` may have returned this."""
    if not isinstance(state, Mapping):
        return state is None
    parts = state.keys() & {"dataset", "iterator"}
    return bool(parts) and state.keys() - parts <= {"ended", "over"}


def open_at(state: Any, dataset: Any, make_fetch: Callable[[], Fetch], *, skip: int) -> Fetch:
    """Make what reads a dataset, and let it go on where it was.

    Args:
        state: What `take_state` or `keep_state` returned, or what stands for it where it could not be had.
        dataset: The dataset.
        make_fetch: Makes it, and with it the iterator of a stream.
        skip: Samples to read and drop where there is no state.
    """
    if state is None or isinstance(state, ExceptionWrapper):
        fetch = make_fetch()
        fetch.skip(skip)
        return fetch
    retries: list[Callable[[], None]] = []
    if "over" in state:
        retries.append(lambda: None)
        with contextlib.suppress(Exception):  # it may have nothing to say before it is read
            retries.append(partial(dataset.load_state_dict, copy.deepcopy(dataset.state_dict())))
    if "dataset" in state:
        dataset.load_state_dict(state["dataset"])
    fetch = make_fetch()
    if "iterator" in state:
        fetch.iterator.load_state_dict(state["iterator"])
    if "ended" in state:
        fetch.end()
    if "dataset" in state and _is_of_huggingface(dataset):
        fetch.then = partial(dataset.load_state_dict, {})  # for the next epoch; this one has begun by then
    if fetch.iterator is not None:
        fetch.retries = retries
    return fetch
