"""Real labelled images that a small package ships: scikit-learn's 1,797 handwritten digits, as PNG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from connectors.errors import BadInputError

__all__ = ["IMAGE_SIDE", "write_digits"]

IMAGE_SIDE = 64
_EVERY_NTH_IS_TEST = 5


def write_digits(folder: Path) -> None:
    """Write `folder/train/CLASS/NUMBER.png` and `folder/test/...`: grey images of 64 x 64, every fifth one for testing.

    The 8 x 8 scans are enlarged so that a file has the few kilobytes of a real thumbnail.

    Raises:
        BadInputError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as exc:
        raise BadInputError("the demo needs scikit-learn: pip install 'tiered-dataflow[demo]'") from exc
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        part = "test" if number % _EVERY_NTH_IS_TEST == 0 else "train"
        path = folder / part / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((pixels * (255 / 16)).astype(np.uint8))
        grey.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC).save(path)
