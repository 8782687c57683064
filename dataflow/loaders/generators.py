"""The global random number generators of a process: random's, numpy's and torch's, taken and put back together."""

from __future__ import annotations

import contextlib
import ctypes
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from dataflow.loaders.torch_private import numpy_seed

__all__ = ["PATIENCE", "GeneratorStates", "GeneratorWatch", "generators_kept", "seed_worker"]

PATIENCE = 32


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
    """Says whether somebody has drawn since the last call.

    A look takes some microseconds. Where nobody has drawn for `PATIENCE` calls it is taken at every `PATIENCE`-th call
    only, until somebody does: a dataset that draws at all draws for nearly every batch.
    """

    def __init__(self) -> None:
        self._last: tuple[Any, ...] = ()
        self._has_stored = False
        self._calls_since_change = 0
        self._numpy_address = np.random.mtrand.get_bit_generator().ctypes.state_address

    def changed(self) -> GeneratorStates | None:
        """Return the states if they are not what they were."""
        self._calls_since_change += 1
        if self._calls_since_change > PATIENCE and self._calls_since_change % PATIENCE:
            return None
        # The raw state of numpy's MT19937, 624 words and a position, is a fiftieth of the price of get_state(). Of
        # Python's, each draw moves the position, and each 624th makes new words.
        _, words, gauss = random.getstate()
        raw = ctypes.string_at(self._numpy_address, 2500)
        now = (words[624], words[0], words[1], gauss, raw, torch.get_rng_state().numpy().tobytes())
        # Half of a pair of normal numbers that numpy has in store is no part of the raw state.
        if now == self._last and not self._has_stored:
            return None
        states = GeneratorStates.now()
        self._last, self._has_stored, self._calls_since_change = now, bool(states.numpy[3]), 0
        return states
