"""The global random number generators of a process: random's, numpy's and torch's, taken and put back together."""

from __future__ import annotations

import contextlib
import ctypes
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from dataflow.loaders.torch_private import numpy_seed

__all__ = ["GeneratorStates", "GeneratorWatch", "generators_kept", "seed_worker"]

# The state of the generator that Python and numpy have in common: 624 words of four bytes, and a position in them.
_MT19937_BYTES = 2500


class GeneratorStates(NamedTuple):
    """Where the three of them are. Travels by pickle."""

    python: Any
    numpy: Any
    torch: bytes

    @classmethod
    def now(cls) -> GeneratorStates:
        """Take them down."""
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state().numpy().tobytes())

    def restore(self) -> None:
        """Put them back, so that what is drawn next is drawn again."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(torch.frombuffer(bytearray(self.torch), dtype=torch.uint8))


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Put the generators back afterwards to what the caller made of them."""
    before = GeneratorStates.now()
    try:
        yield
    finally:
        before.restore()


def seed_worker(base_seed: int, worker_id: int) -> None:
    """Seed a worker's generators as torch does."""
    random.seed(base_seed + worker_id)
    torch.manual_seed(base_seed + worker_id)
    np.random.seed(numpy_seed(base_seed, worker_id))


class GeneratorWatch:
    """Says whether somebody has drawn since the last call, in some microseconds."""

    def __init__(self) -> None:
        self._last: tuple[Any, ...] = ()
        self._has_stored = False
        numpy_address = np.random.mtrand.get_bit_generator().ctypes.state_address
        self._look_at_numpy = partial(ctypes.string_at, numpy_address, _MT19937_BYTES)
        self._python = random.getstate.__self__  # type: ignore[attr-defined]
        self._look_at_python = _quick_look(self._python) or random.getstate

    def changed(self) -> GeneratorStates | None:
        """Return the states if they are not what they were."""
        torch_state = torch.get_rng_state().numpy().tobytes()
        now = (self._look_at_python(), self._python.gauss_next, self._look_at_numpy(), torch_state)
        # Half of a pair of normal numbers that numpy has in store is no part of the raw state.
        if now == self._last and not self._has_stored:
            return None
        states = GeneratorStates.now()
        self._last, self._has_stored = now, bool(states.numpy[3])
        return states


def _quick_look(generator: random.Random) -> Callable[[], bytes] | None:
    """Return what reads the words where CPython keeps them, at a fraction of getstate()'s price; None elsewhere."""
    look = partial(ctypes.string_at, id(generator) + object.__basicsize__, _MT19937_BYTES)
    *words, position = generator.getstate()[1]
    return look if look() == np.array([position, *words], np.uint32).tobytes() else None
