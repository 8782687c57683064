"""A keyed random permutation that is computed, not stored.

Element `x` of `[0, n)` is mapped by a balanced Feistel network over the next even number of bits; a result outside
`[0, n)` is mapped again until it falls inside ("cycle walking", Black and Rogaway, "Ciphers with Arbitrary Finite
Domains", CT-RSA 2002). The domain is less than four times `n`, so that takes four turns at worst on average. Nothing is
kept but the round keys: any position of a permutation of 2^62 elements costs the same and can be asked for alone.

The key is blake2b of (seed, epoch, purpose); the round keys are the splitmix64 stream that starts there (Steele, Lea
and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014). The round function is multiply, xor-shift,
multiply with the constants of splitmix64, of which the upper half is used.

`ROUNDS` was measured (docs/design/0002-order.md): large domains look random from 5 rounds on, domains below 64 elements
need 10.
"""

from __future__ import annotations

import hashlib
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from connectors.errors import BadInputError

__all__ = ["MAX_ELEMENTS", "ROUNDS", "Permutation"]

MAX_ELEMENTS = 1 << 62
ROUNDS = 12

# The images of so many elements at once cost about as much as the turns of a few that walk on.
_LOOKED_UP = 1 << 14

_Elements: TypeAlias = "npt.NDArray[np.uint64]"
_U64 = np.uint64
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
# Arrays without a dimension: numpy takes 0.2 us more for each operation with a number of its own.
_MULTIPLY_1 = np.array(0xBF58476D1CE4E5B9, _U64)
_MULTIPLY_2 = np.array(0x94D049BB133111EB, _U64)
_HALF_WORD = np.array(32, _U64)
# Entry h is the number of elements in a domain whose two halves have h bits each.
_DOMAINS = np.array([1 << (2 * half_bits) for half_bits in range(32)], dtype=_U64)


class Permutation:
    """A family of permutations of `[0, n)`, one per (seed, epoch, purpose, variant).

    Immutable and small (`ROUNDS` keys); safe to share between threads and to pickle.

    Args:
        seed: Any integer.
        epoch: Any integer.
        purpose: What is being permuted; different purposes are independent of each other.
    """

    __slots__ = ("_keys",)

    def __init__(self, seed: int, epoch: int, purpose: str) -> None:
        digest = hashlib.blake2b(f"{seed}:{epoch}:{purpose}".encode(), digest_size=8).digest()
        start = int.from_bytes(digest, "little")
        stream = [(start + turn * _GOLDEN_GAMMA) % (1 << 64) for turn in range(1, ROUNDS + 1)]
        self._keys = _splitmix64(np.array(stream, dtype=_U64))

    def apply(
        self, elements: npt.NDArray[np.int64], n: int | npt.NDArray[np.int64], variant: int | npt.NDArray[np.int64] = 0
    ) -> npt.NDArray[np.int64]:
        """Map elements of `[0, n)` to their images.

        Args:
            elements: int64, any shape and order; each must lie in `[0, n)`, which is not checked.
            n: Size of the permuted set, up to `MAX_ELEMENTS`; an array, as long as the elements, gives each of them a
                set of its own.
            variant: Non-negative number of an independent permutation under the same key; may be an array too.

        Returns:
            A fresh int64 array of the shape of `elements`.
        """
        flat = np.ravel(elements).astype(_U64)
        sizes = np.asarray(n, dtype=_U64)
        if np.max(sizes, initial=0) > MAX_ELEMENTS:
            raise BadInputError(f"a permutation has at most 2**62 elements, got {np.max(sizes)}")
        half_bits = np.asarray(np.searchsorted(_DOMAINS, sizes), dtype=_U64)
        # Scrambled, so that the keys of neighbouring variants do not run into each other.
        tweak = _splitmix64(np.asarray(variant, dtype=_U64))
        if sizes.ndim == tweak.ndim == 0 and _DOMAINS[half_bits] <= max(_LOOKED_UP, flat.size):
            image = self._walk_by_table(flat, sizes, half_bits, tweak)
        else:
            image = self._walk(flat, sizes, half_bits, tweak)
        return image.astype(np.int64).reshape(np.shape(elements))

    def _walk(self, elements: _Elements, sizes: _Elements, half_bits: _Elements, tweak: _Elements) -> _Elements:
        image = self._rounds(elements, half_bits, tweak)
        outside = np.flatnonzero(image >= sizes)
        while outside.size:
            walked = self._rounds(image[outside], _pick(half_bits, outside), _pick(tweak, outside))
            image[outside] = walked
            outside = outside[walked >= _pick(sizes, outside)]
        return image

    def _walk_by_table(self, elements: _Elements, size: _Elements, half_bits: _Elements, tweak: _Elements) -> _Elements:
        """The same by the images of a whole small domain: a turn is a look-up instead of a hundred calls of numpy."""
        table = self._rounds(np.arange(int(_DOMAINS[half_bits]), dtype=_U64), half_bits, tweak)
        image = table[elements]
        while (outside := np.flatnonzero(image >= size)).size:
            image[outside] = table[image[outside]]
        return image

    def _rounds(self, elements: _Elements, half_bits: _Elements, tweak: _Elements) -> _Elements:
        mask = np.asarray((_U64(1) << half_bits) - _U64(1))
        left, right = elements >> half_bits, elements & mask
        for key in self._keys:
            mixed = right + np.asarray(key + tweak)
            mixed *= _MULTIPLY_1
            mixed ^= mixed >> _HALF_WORD
            mixed *= _MULTIPLY_2
            mixed >>= _HALF_WORD
            mixed &= mask
            mixed ^= left
            left, right = right, mixed
        return (left << half_bits) | right


def _pick(values: _Elements, places: npt.NDArray[np.int64]) -> _Elements:
    return values[places] if np.ndim(values) else values


def _splitmix64(state: _Elements) -> _Elements:
    """The output function of splitmix64."""
    with np.errstate(over="ignore"):
        mixed = (state ^ (state >> _U64(30))) * _MULTIPLY_1
        mixed = (mixed ^ (mixed >> _U64(27))) * _MULTIPLY_2
    return np.asarray(mixed ^ (mixed >> _U64(31)))
