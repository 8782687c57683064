"""Sound and video on their way into a batch: which part of a file is decoded, and what it looks like then.

Datasets hand both out as the bytes of their files. These transforms decode the part that is wanted and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from connectors.errors import BadInputError, CorruptError
from dataflow.dataset.columns import Allocate
from dataflow.media import open_audio, open_video
from dataflow.transforms.columns import Columns, file_in, value_of
from dataflow.transforms.draws import Draws

__all__ = ["DecodeAudio", "DecodeVideo", "Start"]

Start: TypeAlias = Literal["random", "first", "middle"]

_STARTS = ("random", "first", "middle")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeAudio:
    """Turns the bytes of WAV, FLAC, Ogg, MP3 and M4A files into float32 `(channels, frames)`, between -1 and 1.

    A transform of samples and of batches; needs the extra `media`.

    Attributes:
        field: The field of the encoded sound, which the result takes the place of.
        frames: Length of the result; silence follows shorter sounds. None for all of each sound.
        start: Where in a longer sound the result begins: at a place drawn for the sample, at the first frame, or so
            that it is the middle of the sound.
        mono: Whether channels are averaged into one.
        rate_hz: Frames a second that every file must have; None for any. Nothing is resampled here.
        rate_field: A field to add with the frames a second of each file; None for none.

    Raises:
        BadInputError: A value is out of range.
    """

    field: str = "audio"
    frames: int | None = None
    start: Start = "random"
    mono: bool = False
    rate_hz: int | None = None
    rate_field: str | None = None

    def __post_init__(self) -> None:
        _insist_on_count("frames", self.frames)
        _insist_on_count("rate_hz", self.rate_hz)
        _insist_on_start(self.start)

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Return the sample with its sound decoded.

        Raises:
            BadInputError: The field is missing or not bytes, or the file has another rate than it must have.
            CorruptError: The file cannot be decoded.
        """
        rate_hz, sound = self._decode(value_of(sample, self.field), rng)
        rate = {} if self.rate_field is None else {self.rate_field: rate_hz}
        return {**sample, self.field: sound, **rate}

    def transform_columns(self, columns: Columns, draws: Draws, allocate: Allocate) -> Columns:
        """Do the same for a batch; sounds of one shape become one array, others a list.

        Raises:
            BadInputError: As for a sample; names it.
            CorruptError: As for a sample; names it.
        """
        decoded = _decode_all(self.field, columns, draws, self._decode)
        sounds = _joined(self.field, [sound for _, sound in decoded], allocate)
        if self.rate_field is None:
            return {**columns, self.field: sounds}
        rates = allocate(self.rate_field, (len(decoded),), np.dtype(np.int64))
        rates[:] = [rate_hz for rate_hz, _ in decoded]
        return {**columns, self.field: sounds, self.rate_field: rates}

    def _decode(self, file: Any, rng: np.random.Generator) -> tuple[int, npt.NDArray[np.float32]]:
        audio = open_audio(file_in(self.field, file))
        if self.rate_hz is not None and audio.rate_hz != self.rate_hz:
            raise BadInputError(
                f"it has {audio.rate_hz} frames a second instead of {self.rate_hz}: resample when converting"
            )
        wanted = audio.frames if self.frames is None else min(self.frames, audio.frames)
        sound = audio.decode(_first(self.start, audio.frames - wanted, rng), wanted)
        if self.mono:
            sound = sound.mean(0, keepdims=True)
        if self.frames is not None and wanted < self.frames:
            sound = np.pad(sound, ((0, 0), (0, self.frames - wanted)))
        return audio.rate_hz, sound


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeVideo:
    """Turns the bytes of video files into clips, uint8 RGB `(frames, height, width, 3)`.

    A transform of samples and of batches; needs the extra `media`.

    Attributes:
        frames: Frames of a clip. Videos that end sooner repeat their last one.
        field: The field of the encoded video, which the result takes the place of.
        step: Take every `step`-th frame.
        start: Where in a longer video the clip begins: at a place drawn for the sample, at the first frame, or so that
            it is the middle of the video.
        size: Height and width to scale to, bilinear; None for those of each video.

    Raises:
        BadInputError: A value is out of range.
    """

    frames: int
    field: str = "video"
    step: int = 1
    start: Start = "random"
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        _insist_on_count("frames", self.frames)
        _insist_on_count("step", self.step)
        _insist_on_start(self.start)
        for side in self.size or ():
            _insist_on_count("size", side)

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Return the sample with its clip decoded.

        Raises:
            BadInputError: The field is missing or not bytes.
            CorruptError: The file cannot be decoded.
        """
        return {**sample, self.field: self._decode(value_of(sample, self.field), rng)}

    def transform_columns(self, columns: Columns, draws: Draws, allocate: Allocate) -> Columns:
        """Do the same for a batch; clips of one shape become one array, others a list.

        Raises:
            BadInputError: As for a sample; names it.
            CorruptError: As for a sample; names it.
        """
        clips = _decode_all(self.field, columns, draws, self._decode)
        return {**columns, self.field: _joined(self.field, clips, allocate)}

    def _decode(self, file: Any, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
        video = open_video(file_in(self.field, file))
        start = _first(self.start, max(0, video.frames - (self.frames - 1) * self.step - 1), rng)
        return video.clip(start, self.frames, step=self.step, size=self.size)


def _decode_all(field: str, columns: Columns, draws: Draws, decode: Callable[..., Any]) -> list[Any]:
    files = value_of(columns, field)
    decoded = []
    for place, file in enumerate(files):
        try:
            decoded.append(decode(file, draws[place]))
        except (BadInputError, CorruptError) as error:
            raise type(error)(f"field {field!r} of {draws.name_of(place)}: {error}") from error
    return decoded


def _joined(field: str, arrays: Sequence[npt.NDArray[Any]], allocate: Allocate) -> Any:
    if len({array.shape for array in arrays}) != 1:
        return list(arrays)
    out = allocate(field, (len(arrays), *arrays[0].shape), arrays[0].dtype)
    np.stack(arrays, out=out)
    return out


def _first(start: Start, room: int, rng: np.random.Generator) -> int:
    """Return where a part begins that could begin at 0 to `room`."""
    if start == "random":
        return int(rng.integers(room + 1)) if room else 0
    return 0 if start == "first" else room // 2


def _insist_on_count(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise BadInputError(f"{name} must be at least 1, got {value}")


def _insist_on_start(start: str) -> None:
    if start not in _STARTS:
        raise BadInputError(f"start must be one of {', '.join(_STARTS)}, got {start!r}")
