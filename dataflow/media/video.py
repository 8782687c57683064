"""From the bytes of a video file to frames, by FFmpeg's libraries in PyAV: MP4, WebM, Matroska, AVI, GIF and others.

`open_video` walks the packets, which costs no decoding, and learns when frames are shown; `EncodedVideo.clip` seeks to
the last key frame before its start and decodes from there on. One thread each: loaders have workers of their own.

Frames that the decoder calls damaged, and files that end too soon, are errors. H.264 and its like have no checksums:
a damaged byte may also show as wrong pixels that no decoder can tell from a picture.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from connectors.errors import BadInputError, CorruptError
from dataflow.media.containers import insist_on_whole
from dataflow.media.sniffing import sniff

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["EncodedVideo", "insist_on_av", "open_video"]


@dataclass(frozen=True, slots=True)
class EncodedVideo:
    """A video file whose packets have been listed; for one thread.

    Attributes:
        width: Of a frame, in pixels.
        height: Of a frame, in pixels.
        times: int64 per frame: when it is shown, in units of the stream, ascending.
        seekable: Whether the container knows these times, each another one.
    """

    width: int
    height: int
    times: npt.NDArray[np.int64]
    seekable: bool
    _data: memoryview

    @property
    def frames(self) -> int:
        """How many frames there are."""
        return len(self.times)

    def clip(
        self, start: int, frames: int, *, step: int = 1, size: tuple[int, int] | None = None
    ) -> npt.NDArray[np.uint8]:
        """Return every `step`-th frame from number `start` on, RGB, `(frames, height, width, 3)`.

        After the end of the video its last frame is repeated.

        Args:
            start: Number of the first frame, below `frames`.
            frames: How many to return.
            step: Distance between them.
            size: Height and width to scale to, bilinear; by default that of the video.

        Raises:
            CorruptError: A frame cannot be decoded.
        """
        height, width = size or (self.height, self.width)
        clip = np.empty((frames, height, width, 3), np.uint8)
        place = 0
        for frame in itertools.islice(self._shown(start), 0, (frames - 1) * step + 1, step):
            clip[place] = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BILINEAR")
            place += 1
        if not place:
            raise CorruptError(f"not a readable video: it has no frame from number {start} on")
        clip[place:] = clip[place - 1]
        return clip

    def check(self) -> None:
        """Decode everything, a frame at a time.

        Raises:
            CorruptError: As `clip`.
        """
        if not sum(1 for _ in self._decoded(None)):
            raise CorruptError("not a readable video: no frame can be decoded")

    def _shown(self, start: int) -> Iterator[Any]:
        """Yield the frames from number `start` on.

        A container may take a seek to a place behind the frame that it is for. Only if that frame comes along is the
        seek trusted; otherwise everything is decoded from the front.
        """
        if start and self.seekable:
            time = int(self.times[start])
            frames = self._decoded(time)
            first = next((frame for frame in frames if frame.pts is None or frame.pts >= time), None)
            if first is not None and first.pts == time:
                yield first
                yield from frames
                return
        yield from itertools.islice(self._decoded(None), start, None)

    def _decoded(self, time: int | None) -> Iterator[Any]:
        """Yield frames from the last key frame before a time on; from the first one for None."""
        av = insist_on_av()
        try:
            with av.open(io.BytesIO(self._data)) as container:
                stream = _stream(container)
                if time is not None:
                    container.seek(time, stream=stream)
                for frame in container.decode(stream):
                    if frame.is_corrupt:
                        raise CorruptError(f"not a readable video: the frame at {frame.time} s is damaged")
                    yield frame
        except (av.FFmpegError, ValueError) as error:
            if isinstance(error, CorruptError):
                raise
            raise CorruptError(f"not a readable video: {error}") from error


def open_video(data: bytes | bytearray | memoryview) -> EncodedVideo:
    """List the packets of a video file.

    Raises:
        CorruptError: It is none, has no frames, or is cut off.
        BadInputError: The package that decodes is not installed.
    """
    av, view = insist_on_av(), memoryview(data)
    codec = sniff(view)
    if codec is not None and codec.kind != "video":  # FFmpeg shows an image, also the cover of a song, as one frame
        raise CorruptError(f"not a readable video: it looks like {codec.name}")
    try:
        insist_on_whole(view)
        with av.open(io.BytesIO(view)) as container:
            stream = _stream(container)
            width, height = stream.codec_context.width, stream.codec_context.height
            packets = [packet for packet in container.demux(stream) if packet.size]
    except (CorruptError, av.FFmpegError, ValueError) as error:
        raise CorruptError(f"not a readable video: {error}") from error
    if any(packet.is_corrupt for packet in packets):
        raise CorruptError("not a readable video: it has packets that are cut off")
    shown = [packet for packet in packets if not packet.is_discard]
    seekable = all(packet.pts is not None for packet in shown)  # AVI knows when to decode, not when to show
    stamps = (packet.pts if seekable else packet.dts for packet in shown)
    times = np.array(sorted(stamp for stamp in stamps if stamp is not None), np.int64)
    if not len(times):
        raise CorruptError("not a readable video: it has no frames")
    return EncodedVideo(width, height, times, seekable and bool((np.diff(times) > 0).all()), view)


def _stream(container: Any) -> Any:
    if not container.streams.video:
        raise CorruptError("it has no pictures")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise CorruptError("its codec is unknown")
    stream.thread_type = "NONE"
    stream.thread_count = 1
    return stream


def insist_on_av() -> ModuleType:
    """Return the package that decodes video.

    Raises:
        BadInputError: It is not installed; names the extra.
    """
    try:
        import av
    except ImportError as missing:
        raise BadInputError(
            f"video and M4A are decoded by PyAV: pip install 'tiered-dataflow[media]' ({missing})"
        ) from missing
    return av
