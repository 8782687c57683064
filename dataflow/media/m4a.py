"""Sound in MP4 containers (AAC, ALAC), which libsndfile does not know: decoded whole, by FFmpeg's libraries in PyAV."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt

from connectors.errors import CorruptError
from dataflow.media.video import insist_on_av

__all__ = ["MAX_DECODED_BYTES", "DecodedFile"]

MAX_DECODED_BYTES = 1 << 30
"""A longer sound is refused: three quarters of an hour of stereo at 48 kHz."""


class DecodedFile:
    """A file that has been decoded, as `soundfile.SoundFile` shows one.

    What an encoder puts before the sound is left out, as the container says; what fills up the last packet, likewise.

    Args:
        data: The file.

    Raises:
        CorruptError: It has no sound, some that cannot be decoded, or too much of it.
        BadInputError: The package that decodes is not installed.
    """

    subtype = "M4A"

    def __init__(self, data: memoryview) -> None:
        av = insist_on_av()
        try:
            with av.open(io.BytesIO(data)) as container:
                if not container.streams.audio:
                    raise CorruptError("it has no sound")
                self.samplerate, self._samples = _decode(av, container, container.streams.audio[0])
        except (av.FFmpegError, ValueError) as error:
            raise CorruptError(str(error)) from error
        self.frames, self.channels = self._samples.shape
        self._place = 0

    def seek(self, frame: int) -> None:
        """Go on from a frame."""
        self._place = frame

    def tell(self) -> int:
        """Return the next frame."""
        return self._place

    def read(self, frames: int, **_options: Any) -> npt.NDArray[np.float32]:
        """Return frames as `(frames, channels)`."""
        found = self._samples[self._place : self._place + frames].copy()
        self._place += len(found)
        return found


def _decode(av: Any, container: Any, stream: Any) -> tuple[int, npt.NDArray[np.float32]]:
    """Return frames a second, and the frames as `(frames, channels)`."""
    resampler = av.AudioResampler(format="fltp")
    parts: list[npt.NDArray[np.float32]] = []
    rate_hz, first_pts, size_bytes = 0, 0, 0
    for decoded in container.decode(stream):
        if decoded.is_corrupt:
            raise CorruptError(f"the sound at {decoded.time} s is damaged")
        if not parts:
            rate_hz, first_pts = decoded.sample_rate, decoded.pts
        if decoded.sample_rate != rate_hz:
            raise CorruptError(f"its rate changes from {rate_hz} Hz to {decoded.sample_rate} Hz")
        found = [frame.to_ndarray().T for frame in resampler.resample(decoded)]
        parts += found
        size_bytes += sum(part.nbytes for part in found)
        if size_bytes > MAX_DECODED_BYTES:
            raise CorruptError(f"it has more than {MAX_DECODED_BYTES} bytes of samples, and is decoded whole: split it")
    if not parts:
        raise CorruptError("it has no sound")
    samples = np.concatenate(parts)
    if first_pts == 0 and stream.duration:
        samples = samples[: round(stream.duration * stream.time_base * rate_hz)]
    return rate_hz, samples
