"""Parts of JPEG images, decoded by libjpeg-turbo through its TurboJPEG API.

What is skipped is the inverse transform, the upsampling and the colour conversion outside of the region; only the
entropy coding has to be walked from the top. A region keeps its pixels: it is decoded with a margin, which upsampling
looks at, so that each pixel is what a full decode gives it.

The library is that of the system (`libturbojpeg.so.0`, version 3 or later, which can crop), or the one that the package
`turbojpeg` on PyPI carries. Without either, `load_library` returns None and Pillow decodes whole images instead: the
same pixels, later.

Each file has a decompressor of its own, which costs a microsecond. One that is used again decodes a file that lacks
tables, as frames of Motion JPEG do, by those of the file before, and after a header that breaks off goes on inside of
it. ctypes lets go of the interpreter's lock while the library works.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import numpy as np
import numpy.typing as npt

from dataflow.transforms.crops import Region

__all__ = ["Header", "Turbo", "load_library", "turbo"]

_log = logging.getLogger(__name__)

# turbojpeg.h
_DECOMPRESS, _RGB = 1, 0
_SUBSAMPLING, _WIDTH, _HEIGHT, _PRECISION, _COLORSPACE, _LOSSLESS = 4, 5, 6, 7, 8, 15
_CS_RGB, _CS_YCBCR, _CS_GRAY = 0, 1, 2
# Width of a block of interleaved samples, by subsampling (444, 422, 420, gray, 440, 411, 441).
_MCU_WIDTH = (8, 16, 16, 8, 8, 32, 8)


class _Scale(ctypes.Structure):
    _fields_ = (("numerator", ctypes.c_int), ("denominator", ctypes.c_int))


class _CropRegion(ctypes.Structure):
    _fields_ = (("x", ctypes.c_int), ("y", ctypes.c_int), ("w", ctypes.c_int), ("h", ctypes.c_int))


class Header:
    """What a JPEG file says of itself: `width` and `height` in pixels, and how colours were subsampled."""

    __slots__ = ("height", "mcu_width", "width")

    def __init__(self, width: int, height: int, mcu_width: int) -> None:
        self.width = width
        self.height = height
        self.mcu_width = mcu_width


class Turbo:
    """A decompressor of one file. Used by one thread at a time.

    Args:
        library: As returned by `load_library`.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._handle = library.tj3Init(_DECOMPRESS)
        if not self._handle:
            raise MemoryError("libjpeg-turbo has no memory for a decompressor")

    def __del__(self) -> None:
        self._library.tj3Destroy(self._handle)  # nothing, where there is none

    def read_header(self, data: npt.NDArray[np.uint8]) -> Header | None:
        """Return what the file says, or None for one that is damaged or cannot be cut: no 8 bits, CMYK, lossless."""
        library, handle = self._library, self._handle
        if library.tj3DecompressHeader(handle, data.ctypes.data, data.size):
            return None
        subsampling = library.tj3Get(handle, _SUBSAMPLING)
        colorspace = library.tj3Get(handle, _COLORSPACE)
        if not 0 <= subsampling < len(_MCU_WIDTH) or colorspace not in (_CS_RGB, _CS_YCBCR, _CS_GRAY):
            return None
        if library.tj3Get(handle, _PRECISION) != 8 or library.tj3Get(handle, _LOSSLESS):
            return None
        width, height = library.tj3Get(handle, _WIDTH), library.tj3Get(handle, _HEIGHT)
        # Of a file that holds tables and no image the library says nothing.
        return Header(width, height, _MCU_WIDTH[subsampling]) if width > 0 and height > 0 else None

    def decode(
        self, data: npt.NDArray[np.uint8], header: Header, region: Region, scale: int
    ) -> npt.NDArray[np.uint8] | None:
        """Return a region of the image as RGB, in C order, or None where the file is damaged.

        Args:
            data: The file, whose header this object has read.
            header: That header.
            region: In the pixels of the scaled image.
            scale: 1, 2, 4 or 8: the image is decoded to one over `scale` of its size, rounded up.
        """
        library, handle = self._library, self._handle
        full_width, full_height = -(-header.width // scale), -(-header.height // scale)
        unit = -(-header.mcu_width // scale)
        # The library wants the left edge at a multiple of `unit`. Upsampling looks at the neighbours of a pixel, hence
        # a unit more on either side, and some rows.
        left = max(0, (region.left // unit - 1) * unit)
        right = min(full_width, region.left + region.width + unit)
        top = max(0, region.top - _MARGIN_ROWS)
        bottom = min(full_height, region.top + region.height + _MARGIN_ROWS)
        if library.tj3SetScalingFactor(handle, _Scale(1, scale)):
            return None
        if library.tj3SetCroppingRegion(handle, _CropRegion(left, top, right - left, bottom - top)):
            return None
        pixels = np.empty((bottom - top, right - left, 3), np.uint8)
        if library.tj3Decompress8(handle, data.ctypes.data, data.size, pixels.ctypes.data, 0, _RGB):
            return None
        row, column = region.top - top, region.left - left
        # Without its margin: resizing takes half as long for pixels that lie next to each other.
        return pixels[row : row + region.height, column : column + region.width].copy()


_MARGIN_ROWS = 2


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """Return libjpeg-turbo's TurboJPEG library, if there is one that can crop."""
    for name in _candidates():
        try:
            library = ctypes.CDLL(name)
            _declare(library)
        except (OSError, AttributeError):  # not there, or older than version 3
            continue
        _log.debug("decoding parts of JPEG images with %s", name)
        return library
    _log.info("no libturbojpeg of version 3 or later: JPEG images are decoded whole")
    return None


def turbo() -> Turbo | None:
    """Return a new decompressor, if there is a library for one."""
    library = load_library()
    return None if library is None else Turbo(library)


def _candidates() -> Iterator[str]:
    yield "libturbojpeg.so.0"
    try:
        files = metadata.files("turbojpeg") or ()
    except metadata.PackageNotFoundError:
        return
    yield from (str(file.locate()) for file in files if file.name.startswith("libturbojpeg"))


def _declare(library: Any) -> None:
    handle, size, address, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
    library.tj3Init.restype, library.tj3Init.argtypes = handle, [number]
    library.tj3Destroy.restype, library.tj3Destroy.argtypes = None, [handle]
    library.tj3Get.argtypes = [handle, number]
    library.tj3DecompressHeader.argtypes = [handle, address, size]
    library.tj3SetScalingFactor.argtypes = [handle, _Scale]
    library.tj3SetCroppingRegion.argtypes = [handle, _CropRegion]
    library.tj3Decompress8.argtypes = [handle, address, size, address, number, number]
