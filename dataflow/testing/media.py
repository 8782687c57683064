"""Small media files, made on the spot: the same bytes each time."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

__all__ = ["encode_audio", "encode_image", "encode_video", "frames", "picture", "sound"]

_VIDEO = {"avi": "mpeg4", "gif": "gif", "matroska": "mpeg4", "mov": "mpeg4", "mp4": "mpeg4", "webm": "libvpx"}


def picture(number: int, height: int = 6, width: int = 8) -> npt.NDArray[np.uint8]:
    """Return the pixels of an image, `(height, width, 3)`."""
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)


def encode_image(number: int, codec: str = "png") -> bytes:
    """Return `picture(number)` as a file that Pillow writes."""
    file = io.BytesIO()
    Image.fromarray(picture(number)).save(file, codec)
    return file.getvalue()


def sound(number: int, frames: int = 200, channels: int = 2) -> npt.NDArray[np.float32]:
    """Return noise as 16 bits hold it, `(channels, frames)`."""
    levels = np.random.default_rng(number).integers(-8000, 8000, (channels, frames))
    return (levels / 32768).astype(np.float32)


def encode_audio(samples: npt.NDArray[np.float32], codec: str = "flac", rate_hz: int = 16000) -> bytes:
    """Return `(channels, frames)` as a file: flac, m4a, mp3, ogg, opus, rf64 or wav."""
    import soundfile

    file = io.BytesIO()
    if codec == "m4a":
        _encode_aac(file, samples, rate_hz)
        return file.getvalue()
    container, subtype = ("ogg", "opus") if codec == "opus" else (codec, None)
    soundfile.write(file, samples.T, rate_hz, format=container, subtype=subtype)
    return file.getvalue()


def _encode_aac(file: io.BytesIO, samples: npt.NDArray[np.float32], rate_hz: int) -> None:
    import av

    with av.open(file, "w", format="ipod") as output:
        layout = "mono" if len(samples) == 1 else "stereo"
        stream: Any = output.add_stream("aac", rate=rate_hz, layout=layout)
        whole: Any = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
        whole.sample_rate, whole.pts = rate_hz, 0
        output.mux(stream.encode(whole))
        output.mux(stream.encode(None))


def frames(count: int, height: int = 16, width: int = 32) -> npt.NDArray[np.uint8]:
    """Return frames of one grey each, `(count, height, width, 3)`, frame `n` of level `8 * n`."""
    levels = np.arange(count, dtype=np.uint8) * 8
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def encode_video(pictures: npt.NDArray[np.uint8], container: str = "mp4", *, b_frames: int = 0) -> bytes:
    """Return frames as a file with a key frame at every tenth: avi, gif, matroska, mov, mp4 or webm.

    With `b_frames` in a row, frames are stored in another order than they are shown in.
    """
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream: Any = output.add_stream(_VIDEO[container], rate=10)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "rgb8" if container == "gif" else "yuv420p"
        stream.gop_size = 10
        stream.codec_context.options = {"bf": str(b_frames)} if b_frames else {}
        for pixels in pictures:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode())
    return file.getvalue()
