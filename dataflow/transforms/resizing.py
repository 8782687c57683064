"""Resizing, by torch's kernel for bytes: bilinear and antialiased, within one level of what Pillow makes.

It is the vectorised descendant of Pillow's own and takes under half of its time (docs/design/0003-image-road.md), which
is why this module, alone outside of the loaders, imports torch, when it is used.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["resize"]


def resize(pixels: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    """Return an image `(h, w, channels)`, best in C order, resized to `(height, width, channels)`."""
    if pixels.shape[:2] == (height, width):
        return pixels
    import torch

    if not pixels.flags.writeable:  # torch warns of arrays that it could write to and should not
        pixels = pixels.copy()
    # Seen as channels last, with the stride of a batch, the kernel works on the pixels as they lie: twice as fast.
    planes = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(planes, (height, width), mode="bilinear", antialias=True)
    made: npt.NDArray[np.uint8] = resized[0].permute(1, 2, 0).numpy()
    return made
