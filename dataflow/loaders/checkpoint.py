"""Reading checkpoints of torch without running what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

__all__ = ["read_checkpoint"]


def read_checkpoint(file: Path) -> Any:
    """Return the content of a checkpoint, tensors in host memory.

    Raises:
        RuntimeError, pickle.UnpicklingError: Not a checkpoint, or one with more than tensors and plain values in it.
    """
    return torch.load(file, map_location="cpu", weights_only=True)
