"""Pictures as Pillow has them, and as samples do: 8 bits a channel."""

from __future__ import annotations

import struct

from PIL import Image

__all__ = ["CHANNELS", "UNDECODABLE", "target_mode"]

CHANNELS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}
# What Pillow raises for files that are not images, or are damaged (RuntimeError: AVIF) or too large.
UNDECODABLE = (OSError, SyntaxError, ValueError, RuntimeError, struct.error, Image.DecompressionBombError)


def target_mode(image: Image.Image) -> str:
    """Return the mode, one of `CHANNELS`, that an image is handed out in. Orientation tags are not applied.

    Raises:
        ValueError: It has more than 8 bits a channel.
    """
    if image.mode in CHANNELS:
        return image.mode
    if image.mode == "1":
        return "L"
    if image.mode in {"P", "PA"}:
        return "RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB"
    if image.mode in {"CMYK", "YCbCr", "LAB", "HSV", "RGBX", "RGBa"}:
        return "RGB"
    raise ValueError(f"it has mode {image.mode}, more than 8 bits a channel; store it as a tensor")
