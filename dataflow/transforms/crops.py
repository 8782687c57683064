"""Which part of an image is looked at, and how large it becomes. Pure: sizes and random numbers in, a region out.

`RandomResizedCrop` chooses as torchvision's transform of that name does (Szegedy et al., "Going Deeper with
Convolutions", CVPR 2015: area uniform, aspect ratio log-uniform, ten attempts, then the largest central part).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, SupportsIndex

import numpy as np

from connectors.errors import BadInputError

__all__ = ["CenterCrop", "Crop", "RandomResizedCrop", "Region", "WholeImage"]

_ATTEMPTS = 10


class Region(NamedTuple):
    """A rectangle of pixels."""

    left: int
    top: int
    width: int
    height: int


class Crop(Protocol):
    """Chooses a region of an image; it is then resized to a size that is the same for all images."""

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width after resizing, in pixels."""
        ...

    def choose(self, width: int, height: int, rng: np.random.Generator) -> Region:
        """Return a region that lies inside an image of this size."""
        ...


@dataclass(frozen=True, slots=True)
class RandomResizedCrop:
    """A random part of the image.

    Attributes:
        size: Of the result, in pixels: one number for a square, or height and width.
        scale: Least and largest share of the image's area.
        ratio: Least and largest width / height.
    """

    size: int | tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        for pixels in self.output_size:
            _check_size("size", pixels)
        for name, (low, high), limit in (("scale", self.scale, 1.0), ("ratio", self.ratio, math.inf)):
            if not (0 < low <= high <= limit and math.isfinite(high)):
                raise BadInputError(f"{name} must be two numbers in order, above 0 and up to {limit}, got {low, high}")

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width after resizing, in pixels."""
        if isinstance(self.size, Sequence) and len(self.size) == 2:
            return self.size[0], self.size[1]
        return self.size, self.size

    def choose(self, width: int, height: int, rng: np.random.Generator) -> Region:
        """Return a region that lies inside an image of this size."""
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for share, log_ratio in zip(
            rng.uniform(*self.scale, _ATTEMPTS), rng.uniform(low, high, _ATTEMPTS), strict=True
        ):
            area, ratio = width * height * share, math.exp(log_ratio)
            wide, high_px = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < wide <= width and 0 < high_px <= height:
                left, top = int(rng.integers(width - wide + 1)), int(rng.integers(height - high_px + 1))
                return Region(left, top, wide, high_px)
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        return _central(width, height, min(width, round(height * ratio)), min(height, round(width / ratio)))


@dataclass(frozen=True, slots=True)
class CenterCrop:
    """The middle of the image, as evaluation looks at it: the shorter side resized to `resize` pixels, then cut.

    Attributes:
        size: Height and width of the result, in pixels.
        resize: What the shorter side of the whole image would be resized to, in pixels; at least `size`.
    """

    size: int
    resize: int

    def __post_init__(self) -> None:
        _check_size("size", self.size)
        if self.resize < self.size:
            raise BadInputError(f"resize must be at least size, {self.size}, got {self.resize}")

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width after resizing, in pixels."""
        return self.size, self.size

    def choose(self, width: int, height: int, rng: np.random.Generator) -> Region:
        """Return the central square."""
        side = max(1, round(min(width, height) * self.size / self.resize))
        return _central(width, height, side, side)


@dataclass(frozen=True, slots=True)
class WholeImage:
    """All of the image, stretched to one size.

    Attributes:
        height: Of the result, in pixels.
        width: Of the result, in pixels.
    """

    height: int
    width: int

    def __post_init__(self) -> None:
        _check_size("height", self.height)
        _check_size("width", self.width)

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width after resizing, in pixels."""
        return self.height, self.width

    def choose(self, width: int, height: int, rng: np.random.Generator) -> Region:
        """Return all of it."""
        return Region(0, 0, width, height)


def _check_size(name: str, value: int) -> None:
    if not isinstance(value, SupportsIndex) or operator.index(value) < 1:
        raise BadInputError(f"{name} must be a whole number of pixels, at least 1, got {value!r}")


def _central(width: int, height: int, region_width: int, region_height: int) -> Region:
    wide, high = max(1, region_width), max(1, region_height)
    return Region((width - wide) // 2, (height - high) // 2, wide, high)
