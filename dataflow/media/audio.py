"""From the bytes of a sound file to samples, by libsndfile: WAV, FLAC, Ogg (Vorbis, Opus) and MP3. M4A goes to FFmpeg.

`open_audio` reads the header; `EncodedAudio.decode` then seeks to what is wanted and decodes that alone (Vorbis is
decoded from its front on). A file that is shorter than it says is an error, never a shorter sound; damage inside is
noticed as far as the codec has checksums (FLAC and Ogg have, WAV and most of MP3 have none).
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from connectors.errors import BadInputError, CorruptError
from dataflow.media.containers import insist_on_whole
from dataflow.media.m4a import DecodedFile
from dataflow.media.sniffing import sniff

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["EncodedAudio", "insist_on_soundfile", "open_audio"]

_STEP_FRAMES = 1 << 16


@dataclass(frozen=True, slots=True)
class EncodedAudio:
    """A sound file whose header has been read; for one thread.

    Attributes:
        rate_hz: Frames a second.
        channels: Values of a frame.
        frames: Length.
    """

    rate_hz: int
    channels: int
    frames: int
    _file: Any

    def decode(self, start: int, frames: int) -> npt.NDArray[np.float32]:
        """Return frames `[start, start + frames)` as `(channels, frames)`, between -1 and 1; within the file.

        Raises:
            CorruptError: They cannot be decoded, or fewer are there than the header says.
        """
        try:
            self._go_to(start)
            read = self._file.read(frames, dtype="float32", always_2d=True)
        except (RuntimeError, ValueError) as error:  # what soundfile raises derives from RuntimeError
            raise CorruptError(f"not readable audio: {error}") from error
        if len(read) != frames:
            raise CorruptError(f"not readable audio: it is cut off at frame {start + len(read)} of {self.frames}")
        samples: npt.NDArray[np.float32] = read.T
        return samples

    def _go_to(self, start: int) -> None:
        file = self._file
        if file.subtype != "VORBIS":
            file.seek(start)
            return
        # libsndfile 1.2 misses a place in the last page by some frames; from the front, it counts right.
        if start < file.tell():
            file.seek(0)
        while (left := start - file.tell()) and len(file.read(min(left, _STEP_FRAMES), always_2d=True)):
            pass

    def check(self) -> None:
        """Decode everything, in steps.

        Raises:
            CorruptError: As `decode`.
        """
        for start in range(0, self.frames, _STEP_FRAMES):
            self.decode(start, min(_STEP_FRAMES, self.frames - start))


def open_audio(data: bytes | bytearray | memoryview) -> EncodedAudio:
    """Read the header of a sound file.

    Raises:
        CorruptError: It is none, cut off, or (M4A, which is decoded whole) too long.
        BadInputError: The package that decodes is not installed.
    """
    soundfile, view = insist_on_soundfile(), memoryview(data)
    codec = sniff(view)
    if codec is not None and codec.kind != "audio":
        raise CorruptError(f"not readable audio: it looks like {codec.name}")
    try:
        insist_on_whole(view)
        is_m4a = codec is not None and codec.name == "m4a"
        file = DecodedFile(view) if is_m4a else soundfile.SoundFile(io.BytesIO(view))
    except (CorruptError, RuntimeError, ValueError) as error:
        if isinstance(error, BadInputError):  # the package for this one is missing
            raise
        # soundfile also names the object that holds the bytes, by its address.
        raise CorruptError(f"not readable audio: {getattr(error, 'error_string', error)}") from error
    return EncodedAudio(file.samplerate, file.channels, file.frames, file)


def insist_on_soundfile() -> ModuleType:
    """Return the package that decodes sound.

    Raises:
        BadInputError: It is not installed; names the extra.
    """
    try:
        import soundfile
    except (ImportError, OSError) as missing:  # OSError: it is there, and its shared library is not
        raise BadInputError(
            f"sound is decoded by soundfile: pip install 'tiered-dataflow[media]' ({missing})"
        ) from missing
    return soundfile  # type: ignore[no-any-return]
