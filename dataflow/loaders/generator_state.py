"""Where a generator of random numbers is, as JSON: torch's, Python's and numpy's, global ones and those of objects."""

from __future__ import annotations

import base64
import copy
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["decode_generator", "encode_generator", "own_generators", "try_generator"]

_KINDS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)

# How far numpy's generators may be in what they have in store. They take any number, and draw from memory that is not
# theirs: numpy 2.4 checks no position, and 1.26 no length either.
_LAST_POSITIONS = {"pos": 624, "buffer_pos": 4}


def own_generators(owner: Any) -> dict[str, Any]:
    """Return the generators that an object has as attributes, by their names, without those that all share."""
    shared = {id(torch.default_generator), id(np.random.mtrand._rand)}
    attributes = getattr(owner, "__dict__", {})
    return {name: value for name, value in attributes.items() if type(value) in _KINDS and id(value) not in shared}


def encode_generator(generator: Any) -> Any:
    """Take down where a generator is.

    Args:
        generator: One of torch, Python or numpy, or one of the modules `random` and `numpy.random`.
    """
    if isinstance(generator, torch.Generator):
        return _encode(generator.get_state())
    if hasattr(generator, "getstate"):
        version, internal, gauss = generator.getstate()
        return [version, _encode(np.array(internal, np.uint32)), gauss]
    if hasattr(generator, "get_state"):
        _, keys, *rest = generator.get_state()
        return [_encode(keys), *rest]
    return _encode_arrays(generator.bit_generator.state)


def decode_generator(generator: Any, saved: Any) -> None:
    """Put a generator back to where it was when `encode_generator` returned `saved`.

    Raises:
        Exception: It was another kind of generator, or there is damage.
    """
    if isinstance(generator, torch.Generator):
        generator.set_state(torch.from_numpy(_decode(saved, np.uint8).copy()))
    elif hasattr(generator, "setstate"):
        version, internal, gauss = saved
        generator.setstate((version, tuple(_decode(internal, np.uint32).tolist()), gauss))
    elif hasattr(generator, "set_state"):
        keys, position, has_gauss, cached = saved  # with one less numpy 1.26.0 ends the process
        keys = _decode_like(keys, generator.get_state()[1])
        generator.set_state(("MT19937", keys, _checked("pos", position), has_gauss, cached))
    else:
        generator.bit_generator.state = _decode_arrays(saved, generator.bit_generator.state)


def try_generator(generator: Any, saved: Any) -> None:
    """Try on a twin of the generator whether it can be put back.

    Raises:
        Exception: It cannot.
    """
    twin = torch.Generator(generator.device) if isinstance(generator, torch.Generator) else copy.deepcopy(generator)
    decode_generator(twin, saved)


def _encode_arrays(state: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the state of a bit generator of numpy, a tree of numbers and arrays, to JSON."""
    return {
        name: _encode_arrays(value)
        if isinstance(value, Mapping)
        else _encode(value)
        if isinstance(value, np.ndarray)
        else value
        for name, value in state.items()
    }


def _decode_arrays(saved: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Turn it back; `like` has arrays where it had them."""
    return {
        name: _decode_arrays(saved[name], value)
        if isinstance(value, Mapping)
        else _decode_like(saved[name], value)
        if isinstance(value, np.ndarray)
        else _checked(name, saved[name])
        for name, value in like.items()
    }


def _checked(name: str, number: Any) -> Any:
    last = _LAST_POSITIONS.get(name)
    if last is not None and not 0 <= number <= last:
        raise ValueError(f"{name} of a generator is {number}, and lies in [0, {last}]")
    return number


def _decode_like(text: str, like: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return _decode(text, like.dtype).reshape(like.shape)


def _encode(values: Any) -> str:
    return base64.b64encode(np.asarray(values).tobytes()).decode()


def _decode(text: str, dtype: Any) -> np.ndarray[Any, Any]:
    return np.frombuffer(base64.b64decode(text), dtype)
