"""The image road: an encoded file becomes one row of a batch, in one go.

header -> crop chosen -> only that decoded, no larger than needed -> resized -> flipped -> normalised and cast
                                                                                   into the batch
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from connectors.errors import BadInputError, CorruptError
from dataflow.dataset.columns import Allocate
from dataflow.transforms.columns import Columns, file_in, value_of
from dataflow.transforms.crops import Crop, Region
from dataflow.transforms.decoding import EncodedImage, open_image
from dataflow.transforms.draws import Draws
from dataflow.transforms.resizing import resize

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "ImageTransform"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_DTYPES = ("uint8", "float16", "float32")


@dataclass(frozen=True, slots=True)
class ImageTransform:
    """Turns the bytes of JPEG, PNG and WebP files into training images. A transform of samples and of batches.

    Attributes:
        crop: Which part of the image to use, and the size of the result.
        field: The field of the encoded image; the result replaces it.
        flip: Probability that the image is mirrored left to right.
        mean: To subtract from each channel, as a fraction of 255. None for no normalisation: levels stay as they are,
            from 0 to 255.
        std: To divide each channel by; given together with `mean`.
        layout: "CHW", as torch's convolutions take it, or "HWC".
        dtype: "float32", "float16", or, without normalisation, "uint8", which leaves the cast to the accelerator at a
            quarter of the bytes.
        scaled: Whether a JPEG of which the crop has at least two times the pixels of the result, along both sides, may
            be decoded at a half, a quarter or an eighth of its size. The crop's edges then move by up to one, two or
            four pixels.

    Raises:
        BadInputError: A value is out of range, or they do not fit together.
    """

    crop: Crop
    field: str = "image"
    flip: float = 0.0
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    layout: Literal["CHW", "HWC"] = "CHW"
    dtype: str = "float32"
    scaled: bool = True

    def __post_init__(self) -> None:
        if not hasattr(self.crop, "choose"):
            raise BadInputError(f"crop must be one such as RandomResizedCrop(224), got {self.crop!r}")
        if not 0 <= self.flip <= 1:
            raise BadInputError(f"flip is a probability, from 0 to 1, got {self.flip}")
        if (self.mean is None) != (self.std is None):
            raise BadInputError("mean and std are given together, or neither")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and np.shape(values) != (3,):
                raise BadInputError(f"{name} must be three numbers, one of each channel, got {values}")
        if self.std is not None and not all(0 < value < math.inf for value in self.std):
            raise BadInputError(f"std must be finite and above 0, got {self.std}")
        if self.layout not in ("CHW", "HWC"):
            raise BadInputError(f'layout must be "CHW" or "HWC", got {self.layout!r}')
        if self.dtype not in _DTYPES:
            raise BadInputError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        if self.dtype == "uint8" and self.mean is not None:
            raise BadInputError("normalised images are no bytes: use float32 or float16, or leave mean and std out")

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Return the sample with its image ready.

        Raises:
            BadInputError: The field is missing or not bytes, or the crop chose what does not lie inside of the image.
            CorruptError: The file cannot be decoded.
        """
        out = np.empty(self._shape, self.dtype)
        self._transform(value_of(sample, self.field), rng, out)
        return {**sample, self.field: out}

    def transform_columns(self, columns: Columns, draws: Draws, allocate: Allocate) -> Columns:
        """Do the same for a batch; the images become one array.

        Raises:
            BadInputError: As for a sample; names it.
            CorruptError: As for a sample; names it.
        """
        files = value_of(columns, self.field)
        out = allocate(self.field, (len(files), *self._shape), np.dtype(self.dtype))
        for place, file in enumerate(files):
            try:
                self._transform(file, draws[place], out[place])
            except (BadInputError, CorruptError) as error:
                raise type(error)(f"{draws.name_of(place)}: {error}") from error
        return {**columns, self.field: out}

    @property
    def _shape(self) -> tuple[int, int, int]:
        height, width = self.crop.output_size
        return (3, height, width) if self.layout == "CHW" else (height, width, 3)

    def _transform(self, file: Any, rng: np.random.Generator, out: npt.NDArray[Any]) -> None:
        hint = f"; open the dataset with encoded=[{self.field!r}] where its images are decoded otherwise"
        data = file_in(self.field, file, hint=hint)
        try:
            image = open_image(data)
            pixels = self._decode(image, self.crop.choose(image.width, image.height, rng))
        except CorruptError as error:
            raise CorruptError(f"field {self.field!r} is {error}") from error
        if self.flip and rng.random() < self.flip:
            pixels = pixels[:, ::-1]
        planes = out if self.layout == "CHW" else out.transpose(2, 0, 1)
        for channel, plane in enumerate(planes):
            self._finish(pixels[:, :, channel], channel, plane)

    def _finish(self, levels: npt.NDArray[np.uint8], channel: int, out: npt.NDArray[Any]) -> None:
        """Write one channel where the batch is, which is the only time that its memory is touched."""
        if self.mean is None or self.std is None:
            out[...] = levels
            return
        # (level / 255 - mean) / std, as one product and one sum, in float32.
        scale = 1 / (255 * np.float32(self.std[channel]))
        offset = -np.float32(self.mean[channel]) / np.float32(self.std[channel])
        product = np.multiply(levels, scale, out=out if out.dtype == np.float32 else None, dtype=np.float32)
        np.add(product, offset, out=out)

    def _decode(self, image: EncodedImage, region: Region) -> npt.NDArray[np.uint8]:
        if not (
            0 <= region.left < region.left + region.width <= image.width
            and 0 <= region.top < region.top + region.height <= image.height
        ):
            raise BadInputError(f"the crop chose {region} of an image of {image.width} x {image.height} pixels")
        height, width = self.crop.output_size
        scales = image.scales if self.scaled else (1,)
        scale = next((one for one in scales if region.width // one >= width and region.height // one >= height), 1)
        return resize(image.decode(_shrunk(region, image, scale), scale), height, width)


def _shrunk(region: Region, image: EncodedImage, scale: int) -> Region:
    """Return the region in the pixels of the scaled image: the nearest one, at least one pixel large."""
    left, width = _shrunk_side(region.left, region.width, image.width, scale)
    top, height = _shrunk_side(region.top, region.height, image.height, scale)
    return Region(left, top, width, height)


def _shrunk_side(first: int, length: int, limit: int, scale: int) -> tuple[int, int]:
    full = -(-limit // scale)
    start = min(round(first / scale), full - 1)
    return start, max(1, min(round((first + length) / scale), full) - start)
