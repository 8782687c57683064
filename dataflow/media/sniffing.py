"""What an encoded file is: an image, sound or moving pictures, and how it is encoded. Pure.

The content decides where there is content to look at; suffixes are for listings, which show only names. An animated GIF
counts as moving pictures, as any GIF does: its header does not say how many frames follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

__all__ = ["HEAD_BYTES", "MEDIA_KINDS", "SUFFIXES", "Codec", "sniff"]

MEDIA_KINDS = ("audio", "image", "video")
# What `sniff` looks at.
HEAD_BYTES = 512


class Codec(NamedTuple):
    """How a file is encoded; of a container (ogg, mp4, webm) what it is called.

    Attributes:
        kind: One of `MEDIA_KINDS`.
        name: Also the usual suffix, without its dot.
    """

    kind: str
    name: str


_CODECS = {
    Codec("audio", "flac"): (".flac",),
    Codec("audio", "m4a"): (".m4a",),
    Codec("audio", "mp3"): (".mp3",),
    Codec("audio", "ogg"): (".oga", ".ogg", ".opus"),
    Codec("audio", "wav"): (".wav",),
    Codec("image", "bmp"): (".bmp",),
    Codec("image", "jpg"): (".jpeg", ".jpg"),
    Codec("image", "png"): (".png",),
    Codec("image", "webp"): (".webp",),
    Codec("video", "avi"): (".avi",),
    Codec("video", "gif"): (".gif",),
    Codec("video", "mkv"): (".mkv",),
    Codec("video", "mov"): (".mov",),
    Codec("video", "mp4"): (".m4v", ".mp4"),
    Codec("video", "webm"): (".webm",),
}
# By suffix, with its dot and in lower case.
SUFFIXES: Mapping[str, Codec] = MappingProxyType(
    {suffix: codec for codec, suffixes in _CODECS.items() for suffix in suffixes}
)

_SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": Codec("image", "png"),
    b"\xff\xd8\xff": Codec("image", "jpg"),
    b"GIF87a": Codec("video", "gif"),
    b"GIF89a": Codec("video", "gif"),
    b"fLaC": Codec("audio", "flac"),
    b"ID3": Codec("audio", "mp3"),
    b"BM": Codec("image", "bmp"),
}
_RIFF = {b"WAVE": Codec("audio", "wav"), b"WEBP": Codec("image", "webp"), b"AVI ": Codec("video", "avi")}


def sniff(data: bytes | bytearray | memoryview) -> Codec | None:
    """Return how a file is encoded, from its first `HEAD_BYTES`; None where that is none of the codecs known."""
    head = bytes(data[:HEAD_BYTES])
    for signature, codec in _SIGNATURES.items():
        if head.startswith(signature):
            return codec
    if head[:4] in (b"RIFF", b"RF64"):
        return _RIFF.get(head[8:12])
    if head[:4] == b"OggS":
        return None if b"\x80theora" in head else Codec("audio", "ogg")
    if head[:4] == b"\x1aE\xdf\xa3":
        return Codec("video", "webm" if b"webm" in head[:64] else "mkv")
    if head[4:8] == b"ftyp":
        if head[8:11] in (b"M4A", b"M4B"):
            return Codec("audio", "m4a")
        return Codec("video", "mov" if head[8:12] == b"qt  " else "mp4")
    return Codec("audio", "mp3") if _is_mpeg_audio(head) else None


def _is_mpeg_audio(head: bytes) -> bool:
    """Return whether the first frame header is one of layer III: 11 bits of sync, then version, layer, rates."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return False
    version, layer = head[1] >> 3 & 3, head[1] >> 1 & 3
    bit_rate, sample_rate = head[2] >> 4, head[2] >> 2 & 3
    return version != 1 and layer == 1 and bit_rate != 15 and sample_rate != 3
