"""Reading checkpoints of torch without running what is in them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import serialization

__all__ = ["read_checkpoint"]


class _Unknown:
    """Stands for an object of a class that torch does not vouch for: it takes what is there for that, and drops it."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_checkpoint(file: Path) -> Any:
    """Return the content of a checkpoint, tensors in host memory.

    Objects of other classes, such as the arguments that a framework keeps beside the weights, come without their
    content; before torch 2.6 they are refused.

    Raises:
        RuntimeError, ValueError, pickle.UnpicklingError: Not a checkpoint, or one that cannot be read like this.
    """
    unknown: list[str] = []
    with suppress(AttributeError, ValueError):  # torch before 2.6, and files that torch before 1.6 wrote
        unknown = serialization.get_unsafe_globals_in_checkpoint(file)
    if not unknown:
        return torch.load(file, map_location="cpu", weights_only=True)
    with serialization.safe_globals([(_Unknown, name) for name in unknown]):
        return torch.load(file, map_location="cpu", weights_only=True)
