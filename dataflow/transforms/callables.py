"""How a transform of one sample is called.

| it takes | it is called |
|---|---|
| `(sample, rng)`, or has a parameter `rng` | with the sample's own generator: the best way |
| `(sample)`, as torchvision's do | with the global generators of random, numpy and torch seeded for the sample |
| keywords only, as albumentations' do | with the fields as keywords, and its own generators seeded for the sample |

Seeding the global generators takes some tens of microseconds a sample. Afterwards they are put back to what they were.
Threads share them, and seed them for each other's samples; transforms with generators of their own are copied for each.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dataflow.transforms.draws import Draws

__all__ = ["OnField", "SampleStep", "generators_put_back", "wait_no_more_for"]


class OnField:
    """Applies a transform to one field of a sample, for transforms that know nothing of fields.

    Args:
        field: Which one.
        transform: Gets its value and gives the new one; with a generator if it takes one. A transform that takes
            keywords only gets the value as `image`, and its `image` is the new one.
    """

    def __init__(self, field: str, transform: Callable[..., Any]) -> None:
        self.field = field
        self.transform = transform
        self._style = _style(transform)

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Return the sample with the field transformed."""
        value = sample[self.field]
        if self._style == "keywords":
            return {**sample, self.field: self.transform(image=value)["image"]}
        return {**sample, self.field: _call(self.transform, self._style, value, rng)}


class SampleStep:
    """A transform of samples, called in its own way.

    Args:
        transform: The callable.

    Attributes:
        is_foreign: Whether it draws from generators that are not given to it, for all that we know.

    Raises:
        TypeError: It cannot be called.
    """

    def __init__(self, transform: Callable[..., Any]) -> None:
        if not callable(transform):
            raise TypeError(f"a transform must be callable, got {type(transform).__name__}")
        self._own = _OfThread(transform)
        self._style = _style(transform)
        self.is_foreign = _style(_inner(transform)) not in ("rng", "rng by name")

    def __call__(self, sample: Any, draws: Draws, place: int) -> Any:
        """Transform the sample at `place` of its batch. Leaves the global generators seeded where it is foreign."""
        rng, transform = draws[place], self._own.transform
        if self.is_foreign:
            seed = draws.seed_at(place)
            if threading.get_ident() not in _inside:
                raise SystemExit("nobody waits for this thread any more")
            _seed_globals(seed)
            if hasattr(inner := _inner(transform), "set_random_state"):
                inner.set_random_state(rng, random.Random(seed))
        return transform(**sample) if self._style == "keywords" else _call(transform, self._style, sample, rng)


def _call(transform: Callable[..., Any], style: str, value: Any, rng: np.random.Generator) -> Any:
    if style == "rng":
        return transform(value, rng)
    return transform(value, rng=rng) if style == "rng by name" else transform(value)


class _OfThread(threading.local):
    """A transform as a thread calls it: one with generators of its own has them once for each thread."""

    def __init__(self, transform: Callable[..., Any]) -> None:
        """Called by each thread, with the same transform."""
        has_generators = hasattr(_inner(transform), "set_random_state")
        is_main = threading.current_thread() is threading.main_thread()
        self.transform = copy.deepcopy(transform) if has_generators and not is_main else transform

    def __reduce__(self) -> Any:
        return _OfThread, (self.transform,)


def _inner(transform: Callable[..., Any]) -> Callable[..., Any]:
    return transform.transform if isinstance(transform, OnField) else transform


@contextlib.contextmanager
def generators_put_back() -> Iterator[None]:
    """Put the global generators back afterwards to what they were: where threads overlap, the last puts them back.

    Else one would put back what another has seeded, and the trainer's next epoch would have another order.
    """
    me = threading.get_ident()
    with _lock:
        is_inner = me in _inside
        found = _Generators() if is_inner or not _inside else next(iter(_inside.values()))
        _inside.setdefault(me, found)
    try:
        yield
    finally:
        with _lock:
            if not is_inner:
                _leave(me)
            elif me in _inside:
                found.put_back()


def wait_no_more_for(thread: int | None) -> None:
    """Put the global generators back without a thread that hangs, if it is the last that seeds them.

    Args:
        thread: Its `ident`. Where it goes on one day, it ends before it seeds them again.
    """
    with _lock:
        _leave(thread)


def _leave(thread: int | None) -> None:
    found = _inside.pop(thread, None)
    if found is not None and not _inside:
        found.put_back()


class _Generators:
    """Where the global generators are."""

    def __init__(self) -> None:
        self._python, self._numpy, self._torch = random.getstate(), np.random.get_state(), sys.modules.get("torch")
        self._state = None if self._torch is None else self._torch.default_generator.get_state()

    def put_back(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        if self._torch is not None:
            self._torch.default_generator.set_state(self._state)


# One thread may have it twice: a signal handler that forks.
_lock = threading.RLock()
# The threads that seed the global generators now, with what the first of them found.
_inside: dict[int | None, _Generators] = {}


def _leave_other_threads() -> None:
    """In a child, which has none of them."""
    for thread in _inside.keys() - {threading.get_ident()}:
        del _inside[thread]
    _lock.release()


os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_leave_other_threads)


def _seed_globals(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    if (torch := sys.modules.get("torch")) is not None:
        torch.default_generator.manual_seed(seed)


def _style(transform: Callable[..., Any]) -> str:
    """Say in which way a transform is called: "rng" (as the second argument, or by name), "keywords" or "sample"."""
    try:
        # The signature of a torch module, as torchvision's are, is that of its `forward`.
        parameters = list(inspect.signature(getattr(transform, "forward", transform)).parameters.values())
    except ValueError:  # some builtins do not tell
        return "sample"
    positional = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    required = [one for one in positional if one.default is one.empty]
    names = [one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    if positional and "rng" in names and "rng" not in [one.name for one in positional[:2]]:
        return "rng by name"
    if len(required) == 2 or (len(positional) > 1 and positional[1].name == "rng"):
        return "rng"
    kinds = {one.kind for one in parameters}
    takes_anything = kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    if not positional and inspect.Parameter.VAR_KEYWORD in kinds and not takes_anything:
        return "keywords"
    return "sample"
