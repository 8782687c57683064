"""From the bytes of an image file to the pixels that are wanted of it.

`open_image` looks at the header only; `EncodedImage.decode` then decodes as little as the region needs.

Exactness: at scale 1 a region of a JPEG has exactly the pixels that decoding the whole file gives it, whichever library
decodes. At scale 2, 4 and 8 it has exactly the pixels of the whole image decoded at that scale, which libjpeg computes
from the low frequencies alone: close to, and not the same as, averaging the pixels of a full decode. Other formats are
decoded whole and then cut. Orientation tags are not applied, transparency is dropped.
"""

from __future__ import annotations

import io
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from connectors.errors import CorruptError
from dataflow.media.pictures import UNDECODABLE
from dataflow.transforms.crops import Region
from dataflow.transforms.turbojpeg import Header, Turbo, turbo

__all__ = ["EncodedImage", "open_image"]

# Those for which libjpeg-turbo has vector code.
_JPEG_SCALES: tuple[int, ...] = (8, 4, 2, 1)

_Data: TypeAlias = bytes | bytearray | memoryview | npt.NDArray[np.uint8]

_EIGHT_BIT_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV"}


class EncodedImage(Protocol):
    """An image file whose header has been read. Used by one thread at a time."""

    width: int
    height: int
    scales: tuple[int, ...]
    """What `decode` can be asked for: so many times smaller, large to small. All but 1 are for lossy JPEG alone."""

    def decode(self, region: Region, scale: int = 1) -> npt.NDArray[np.uint8]:
        """Return a region as RGB, `(height, width, 3)`.

        Args:
            region: In the pixels of the image at that scale; inside it.
            scale: One of `scales`, not above either side; the sides of the smaller image are rounded up.

        Raises:
            CorruptError: The file cannot be decoded.
        """
        ...


def open_image(data: _Data) -> EncodedImage:
    """Read the header of a JPEG, PNG or WebP file, or any other that Pillow knows.

    Raises:
        CorruptError: It is no image.
    """
    raw = np.frombuffer(data, np.uint8)
    decompressor = turbo() if raw[:2].tobytes() == b"\xff\xd8" else None
    header = None if decompressor is None else decompressor.read_header(raw)
    if decompressor is None or header is None or header.width * header.height > (Image.MAX_IMAGE_PIXELS or 1 << 62):
        return _PillowImage(raw)
    return _TurboImage(decompressor, header, raw)


class _TurboImage:
    scales: tuple[int, ...] = _JPEG_SCALES

    def __init__(self, decompressor: Turbo, header: Header, raw: npt.NDArray[np.uint8]) -> None:
        self.width = header.width
        self.height = header.height
        self._decompressor = decompressor
        self._header = header
        self._raw = raw

    def decode(self, region: Region, scale: int = 1) -> npt.NDArray[np.uint8]:
        pixels = self._decompressor.decode(self._raw, self._header, region, scale)
        # The library calls some files damaged that can be read; Pillow has the last word on them.
        return _PillowImage(self._raw).decode(region, scale) if pixels is None else pixels


class _PillowImage:
    def __init__(self, raw: npt.NDArray[np.uint8]) -> None:
        try:
            self._image = Image.open(io.BytesIO(raw.data))
        except UnidentifiedImageError as error:  # its text is about the object that holds the bytes
            raise CorruptError("not a readable image: Pillow does not know what it is") from error
        except UNDECODABLE as error:
            raise CorruptError(f"not a readable image: {error}") from error
        self.width, self.height = self._image.size
        # Those of a JPEG that is not lossless, alone or before other pictures (MPO, as phones and cameras write).
        self.scales: tuple[int, ...] = _JPEG_SCALES if getattr(self._image, "quantization", None) else (1,)

    def decode(self, region: Region, scale: int = 1) -> npt.NDArray[np.uint8]:
        image = self._image
        if image.mode not in _EIGHT_BIT_MODES:
            raise CorruptError(f"an image of mode {image.mode}, more than 8 bits a channel; store it as a tensor")
        try:
            if scale > 1:
                image.draft(None, (self.width // scale, self.height // scale))
            left, top = region.left, region.top
            part = image.crop((left, top, left + region.width, top + region.height))
            part.info.pop("transparency", None)  # that of a palette; Pillow warns that it is dropped
            return np.asarray(part if part.mode == "RGB" else part.convert("RGB"))
        except UNDECODABLE as error:
            raise CorruptError(f"not a readable image: {error}") from error
