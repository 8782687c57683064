"""What the order of an epoch depends on, taken down and put back, for any sampler.

The random number generators that it is drawn from, the epoch that its samplers were set to, and what samplers keep of
their own. From these a sampler draws the same order again.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import operator
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from connectors.errors import BadInputError
from dataflow.loaders.generator_state import decode_generator, encode_generator, own_generators, try_generator
from dataflow.loaders.generators import generators_kept
from dataflow.loaders.torch_private import DatasetKind, ExceptionWrapper, dataset_kind, index_sampler

if TYPE_CHECKING:
    from dataflow.loaders.dataloader import DataLoader

__all__ = [
    "check_generators",
    "check_order",
    "describe_other_order",
    "draws_undone",
    "drawn_or_again",
    "draws_unseen",
    "is_at",
    "is_elastic",
    "is_set_elsewhere",
    "is_stateful",
    "is_told",
    "keeps_state",
    "load_samplers",
    "raise_unknown",
    "restore_order",
    "sampler_epoch",
    "sampler_length",
    "sampler_parts",
    "snapshot_order",
    "take_rank",
]

# These draw nothing, or from a generator of their own that is seeded by the epoch.
_DETERMINISTIC = (BatchSampler, SequentialSampler, DistributedSampler, list, tuple, range)
_TORCH_RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


class _Loaded(int):
    """An epoch that a state set a sampler to. What the caller sets it to is a plain number."""


def is_elastic(sampler: Any) -> bool:
    """Whether a sampler can be asked for the state after any number of steps."""
    return hasattr(sampler, "state_at")


def is_stateful(thing: Any) -> bool:
    """Whether a dataset or sampler keeps its own state, and tells it without further questions."""
    tell = getattr(thing, "state_dict", None)
    if tell is None or not hasattr(thing, "load_state_dict"):
        return False
    return _needs_no_argument(getattr(tell, "__func__", tell), is_bound=hasattr(tell, "__func__"))


@lru_cache(maxsize=256)
def _needs_no_argument(function: Callable[..., Any], *, is_bound: bool) -> bool:
    try:
        inspect.signature(function).bind(*[None] * is_bound)
    except TypeError:
        return False
    except ValueError:
        pass  # written in C, and mute
    return True


def sampler_parts(sampler: Any) -> list[Any]:
    """Return a sampler and those that it wraps, from outside in."""
    parts: list[Any] = []
    while sampler is not None and all(sampler is not part for part in parts) and len(parts) < 8:
        parts.append(sampler)
        # A sampler may be an array, or have no length, so nobody asks whether it is true.
        inner = getattr(sampler, "sampler", None)
        sampler = getattr(sampler, "batch_sampler", None) if inner is None else inner
    return parts


def keeps_state(sampler: Any) -> bool:
    """Whether a sampler, or one that it wraps, keeps its own state."""
    return any(map(is_stateful, sampler_parts(sampler)))


def drawn_or_again(indices: Iterator[Any], sampler: Any) -> Iterator[Any]:
    """Yield what a sampler drew, or a new epoch of it where that is nothing: it was told of one that is over."""
    nothing = object()
    first = next(indices, nothing)
    yield from sampler if first is nothing else itertools.chain([first], indices)


def sampler_epoch(sampler: Any, default: int) -> int:
    """Return the epoch that a sampler, or one that it wraps, was set to by `set_epoch`, as torch's distributed one."""
    epochs = (getattr(part, "epoch", None) for part in sampler_parts(sampler) if hasattr(part, "set_epoch"))
    return next((int(epoch) for epoch in epochs if isinstance(epoch, int)), default)


def is_told(sampler: Any, epoch: int) -> bool:
    """Whether the caller has set a torch sampler, or one that another wraps, to an epoch since a state did."""
    for part in sampler_parts(sampler):
        if getattr(type(part), "set_epoch", None) is DistributedSampler.set_epoch:
            return bool(part.epoch == epoch and type(part.epoch) is not _Loaded)
    return False


def is_set_elsewhere(sampler: Any, epoch: int) -> bool:
    """Whether a sampler was set to another epoch since it was asked for this one."""
    if is_elastic(sampler):
        return bool(sampler.epoch != epoch and sampler.steps_drawn == 0)  # else another iterator walks that one
    draws_nothing = all(type(part) in _DETERMINISTIC for part in sampler_parts(sampler))
    return draws_nothing and sampler_epoch(sampler, epoch) != epoch


def sampler_length(sampler: Any) -> int | None:
    """Return the number of batches of an epoch, if the sampler knows it."""
    try:
        return len(sampler)
    except Exception:  # whatever it raises is allowed by torch, as long as nobody asks for the loader's length
        return None


def draws_unseen(sampler: Any) -> bool:
    """Whether nobody can tell how early a sampler is drawn from: it is ours, or torch's own."""
    known = (*_DETERMINISTIC, *_TORCH_RANDOM)
    return is_elastic(sampler) or all(type(part) in known for part in sampler_parts(sampler))


def snapshot_order(loader: DataLoader[Any], *, between_epochs: bool = False) -> dict[str, Any]:
    """Take down all that the order of an epoch depends on. Call it just before the sampler draws its first index.

    Between epochs the process's own generators are left out: who knows what the caller does with them until then.
    """
    parts = sampler_parts(index_sampler(loader))
    order: dict[str, Any] = {"parts": [_snapshot_part(part) for part in parts]}
    if loader.generator is not None:
        order["generator"] = encode_generator(loader.generator)
    if between_epochs:
        return order
    foreign = any(type(part) not in (*_DETERMINISTIC, *_TORCH_RANDOM) for part in parts)
    if dataset_kind(loader) == DatasetKind.Iterable:
        foreign = not loader.has_worker_processes
    if foreign or any(type(part) in _TORCH_RANDOM and part.generator is None for part in parts):
        order["torch"] = encode_generator(torch.default_generator)
    if foreign:
        order["python"], order["numpy"] = encode_generator(random), encode_generator(np.random)
    return order


def _snapshot_part(part: Any) -> dict[str, Any]:
    snapshot: dict[str, Any] = {}
    if (generator := _generator(part)) is not None:
        snapshot["generator"] = encode_generator(generator)
    if others := _other_generators(part):
        snapshot["generators"] = {name: encode_generator(other) for name, other in others.items()}
    if isinstance(epoch := getattr(part, "epoch", None), int) and hasattr(part, "set_epoch"):
        snapshot["epoch"] = int(epoch)
    if (dealt := _dealing(part)) is not None:
        snapshot["dealt"] = dealt
    if is_stateful(part):
        try:
            snapshot["state"] = copy.deepcopy(part.state_dict())
        except Exception:  # is raised where somebody asks for the loader's state
            snapshot["state"] = ExceptionWrapper(where="in a sampler")
    return snapshot


def is_at(order: Mapping[str, Any]) -> bool:
    """Whether the process's generators that an order is drawn from are where they were when it was taken down.

    Not where it is drawn from none of them.
    """
    own = {"torch": torch.default_generator, "python": random, "numpy": np.random}
    saved = order.keys() & own.keys()
    return bool(saved) and all(encode_generator(own[name]) == order[name] for name in saved)


def raise_unknown(states: Iterable[Any]) -> None:
    """Raise the exception that stands in the place of a state."""
    for state in states:
        if isinstance(state, ExceptionWrapper):
            state.reraise()


def check_order(loader: DataLoader[Any], order: Mapping[str, Any]) -> None:
    """Try on other generators what is put back into the loader's when an epoch goes on, so that damage is found now.

    Raises:
        Exception: There is damage.
    """
    for part, snapshot in zip(sampler_parts(index_sampler(loader)), order["parts"], strict=True):
        operator.index({"epoch": 0, **snapshot}["epoch"])
        if "epoch" in snapshot and not hasattr(part, "set_epoch"):
            raise ValueError("a sampler without epochs has one")
        for generator, saved in _saved_generators(part, snapshot):
            try_generator(generator, saved)
    if "generator" in order and loader.generator is not None:
        try_generator(loader.generator, order["generator"])
    _restore_generators(order, torch.Generator(), random.Random(), np.random.RandomState())


def check_generators(loader: DataLoader[Any], order: Mapping[str, Any]) -> None:
    """Refuse to go on in an epoch whose samplers had other generators than the loader's.

    Raises:
        BadInputError: One of them had a generator of its own and this loader's has none, or the other way round.
    """
    for part, snapshot in zip(sampler_parts(index_sampler(loader)), order["parts"], strict=True):
        if type(part) in _TORCH_RANDOM and ("generator" in snapshot) != (_generator(part) is not None):
            raise BadInputError(
                f"the loader state was saved in an epoch whose {type(part).__qualname__} "
                f"{'had' if 'generator' in snapshot else 'lacked'} a generator of its own, unlike this loader's: it "
                "would go on with other batches; build the loader as it was"
            )


def take_rank(loader: DataLoader[Any], order: Mapping[str, Any]) -> bool:
    """Make the order of the rank that saved it this rank's, and say whether that was another one.

    Samplers as torch's distributed one deal an epoch out to ranks, and often one rank saves the state for all.

    Raises:
        BadInputError: It was dealt to another number of ranks.
    """
    is_other = False
    for part, snapshot in zip(sampler_parts(index_sampler(loader)), order["parts"], strict=True):
        own, saved = _dealing(part), snapshot.get("dealt")
        if own is None or saved is None:
            continue
        if own["ranks"] != saved["ranks"]:
            raise BadInputError(
                f"the loader state was saved in an epoch that {type(part).__qualname__} dealt to {saved['ranks']} ranks"
                f" and this loader's deals it to {own['ranks']}: going on would repeat samples and leave others out; "
                "begin without the state, or let ElasticBatchSampler deal, which goes on with any number of ranks"
            )
        is_other = is_other or own != saved
        snapshot["dealt"] = own
    return is_other


def _dealing(part: Any) -> dict[str, int] | None:
    """Return which part of an epoch a sampler deals out, of how many, where it names them as torch's or others do."""
    rank = getattr(part, "rank", None)
    ranks = getattr(part, "num_replicas", getattr(part, "world_size", None))
    return {"rank": rank, "ranks": ranks} if isinstance(rank, int) and isinstance(ranks, int) else None


def load_samplers(loader: DataLoader[Any], order: Mapping[str, Any], *, generators: bool) -> None:
    """Give samplers back their epochs and what they keep of their own, and with `generators` those, too."""
    for part, snapshot in zip(sampler_parts(index_sampler(loader)), order["parts"], strict=True):
        if "epoch" in snapshot:
            part.set_epoch(_Loaded(snapshot["epoch"]))
        if "state" in snapshot:
            part.load_state_dict(copy.deepcopy(snapshot["state"]))
    if generators:
        _load_generators(loader, order)


@contextlib.contextmanager
def draws_undone(loader: DataLoader[Any]) -> Iterator[None]:
    """Put back afterwards all generators that an order may be drawn from."""
    order = snapshot_order(loader, between_epochs=True)
    with generators_kept():
        yield
    _load_generators(loader, order)


def _load_generators(loader: DataLoader[Any], order: Mapping[str, Any]) -> None:
    for part, snapshot in zip(sampler_parts(index_sampler(loader)), order["parts"], strict=True):
        for generator, saved in _saved_generators(part, snapshot):
            decode_generator(generator, saved)
    if "generator" in order and loader.generator is not None:
        decode_generator(loader.generator, order["generator"])


def describe_other_order(sampler: Any, order: Mapping[str, Any]) -> str:
    """Say why a sampler does not go on in an epoch of `order`, and what to do: it draws other batches in it."""
    parts = sampler_parts(sampler)
    foreign = [part for part in parts if type(part) not in (*_DETERMINISTIC, *_TORCH_RANDOM)]
    name = type((foreign or parts)[-1]).__qualname__
    what = (
        f"{name} draws other batches now than in the epoch that the loader state stands in: going on with them would "
        "repeat samples and leave others out"
    )
    for part, snapshot in zip(parts, order["parts"], strict=True):
        epoch = getattr(part, "epoch", None)
        if "epoch" in snapshot and epoch != snapshot["epoch"]:
            return (
                f"{what}. It was saved in epoch {snapshot['epoch']} and {type(part).__qualname__} is at epoch {epoch} "
                f"now: after load_state_dict, call set_epoch({snapshot['epoch']}) or leave the call out"
            )
    return (
        f"{what}. Its order depends on more than the state holds: give it state_dict() and load_state_dict(), or set "
        "it to what it was (arguments, seed, epoch) before you iterate; or begin the epoch anew, without the state"
    )


def restore_order(loader: DataLoader[Any], order: Mapping[str, Any]) -> None:
    """Put all generators back to where they were when `order` was taken down: what is drawn next is drawn again."""
    _load_generators(loader, order)
    _restore_generators(order, torch.default_generator, random, np.random)


def _restore_generators(order: Mapping[str, Any], torchs: torch.Generator, pythons: Any, numpys: Any) -> None:
    for name, generator in (("torch", torchs), ("python", pythons), ("numpy", numpys)):
        if name in order:
            decode_generator(generator, order[name])


def _generator(part: Any) -> torch.Generator | None:
    generator = getattr(part, "generator", None)
    return generator if isinstance(generator, torch.Generator) else None


def _other_generators(part: Any) -> dict[str, Any]:
    """Return those that go by other names, or are no generators of torch."""
    return {name: other for name, other in own_generators(part).items() if other is not _generator(part)}


def _saved_generators(part: Any, snapshot: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield the generators that a sampler has and had, with what was saved of them."""
    if "generator" in snapshot and (generator := _generator(part)) is not None:
        yield generator, snapshot["generator"]
    others, saved = _other_generators(part), snapshot.get("generators", {})
    for name in others.keys() & saved.keys():  # a sampler may make one only when it is iterated
        yield others[name], saved[name]
