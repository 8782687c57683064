"""Random numbers that belong to a sample, not to whoever happens to read it.

What is drawn for a sample is a function of (seed, epoch, sample): the same in any worker, on any rank, in any batch and
after any restart. The generator is Philox (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011),
which is keyed rather than seeded: blake2b of seed and epoch is one half of its key, and with the sample's number the
other, so no two samples share a stream.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from dataflow.index import Index

__all__ = ["Draws"]


class Draws(Sequence[np.random.Generator]):
    """The random generators of some samples, in their order. Immutable; each access makes a fresh generator.

    Args:
        seed: Any integer.
        epoch: Any integer.
        samples: int64, the samples' numbers in their dataset; not negative.
        index: Where they lie, for messages; None where that is not known.

    Attributes:
        samples: As given.
    """

    __slots__ = ("_index", "_key", "samples")

    def __init__(self, seed: int, epoch: int, samples: npt.NDArray[np.int64], index: Index | None = None) -> None:
        self._key = _epoch_key(seed, epoch)
        self._index = index
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, place: int) -> np.random.Generator: ...
    @overload
    def __getitem__(self, place: slice) -> Draws: ...
    def __getitem__(self, place: int | slice) -> np.random.Generator | Draws:
        if isinstance(place, slice):
            part = object.__new__(Draws)
            part._key, part._index, part.samples = self._key, self._index, self.samples[place]
            return part
        # numpy takes any ISeedSequence, its annotations only one of them.
        return np.random.Generator(np.random.Philox(_Key(self._sample_key(place))))  # type: ignore[arg-type]

    def seed_at(self, place: int) -> int:
        """Return 64 bits for seeding foreign generators; other ones than the sample's generator draws."""
        return int.from_bytes(hashlib.blake2b(self._sample_key(place).tobytes(), digest_size=8).digest(), "little")

    def name_of(self, place: int) -> str:
        """Name a sample for a message: `sample 7 in s3://pets/cat/7.jpg`, or `sample 7` where that is not known."""
        sample = int(self.samples[place])
        return f"sample {sample}" if self._index is None else f"sample {sample} in {self._index.uri_of(sample)}"

    def _sample_key(self, place: int) -> npt.NDArray[Any]:
        key = self._key.copy()
        key[0] ^= np.uint64(self.samples[place])
        return key


class _Key(np.random.bit_generator.ISeedSequence):
    """Gives Philox its key as it is. `Philox(key=...)` does so too, after it has asked the system for entropy."""

    __slots__ = ("_words",)

    def __init__(self, words: npt.NDArray[np.uint64]) -> None:
        self._words = words

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> npt.NDArray[Any]:
        return self._words


@functools.lru_cache(maxsize=64)
def _epoch_key(seed: int, epoch: int) -> npt.NDArray[np.uint64]:
    """Return what the keys of all samples of an epoch have in common, read-only; a batch asks for it each time."""
    return np.frombuffer(hashlib.blake2b(f"{seed}:{epoch}:transforms".encode(), digest_size=16).digest(), np.uint64)
