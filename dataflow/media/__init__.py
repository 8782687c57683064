"""Encoded media: what a file is, told by its content, and decoding of sound and moving pictures."""

from dataflow.media.audio import EncodedAudio, open_audio
from dataflow.media.checking import decodes, insist_on_decoder
from dataflow.media.containers import insist_on_whole
from dataflow.media.sniffing import MEDIA_KINDS, SUFFIXES, Codec, sniff
from dataflow.media.video import EncodedVideo, open_video

__all__ = [
    "Codec",
    "EncodedAudio",
    "EncodedVideo",
    "MEDIA_KINDS",
    "SUFFIXES",
    "decodes",
    "insist_on_decoder",
    "insist_on_whole",
    "open_audio",
    "open_video",
    "sniff",
]
