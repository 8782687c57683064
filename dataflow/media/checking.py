"""Whether a media file can be decoded to its end."""

from __future__ import annotations

import io

from PIL import Image

from connectors.errors import BadInputError, CorruptError
from dataflow.media.audio import insist_on_soundfile, open_audio
from dataflow.media.pictures import UNDECODABLE
from dataflow.media.sniffing import MEDIA_KINDS
from dataflow.media.video import insist_on_av, open_video

__all__ = ["decodes", "insist_on_decoder"]


def insist_on_decoder(kind: str) -> None:
    """Check that files of this kind can be decoded here at all.

    Raises:
        BadInputError: There is no such kind, or its decoder is not installed; names the extra.
    """
    if kind not in MEDIA_KINDS:
        raise BadInputError(f"media are of the kinds {', '.join(MEDIA_KINDS)}, got {kind!r}")
    if kind == "audio":
        insist_on_soundfile()
    elif kind == "video":
        insist_on_av()


def decodes(kind: str, data: bytes | memoryview) -> bool:
    """Decode a file, a part at a time where its kind allows it, and return whether that went well to the end."""
    try:
        if kind == "audio":
            open_audio(data).check()
        elif kind == "video":
            open_video(data).check()
        else:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
    except (CorruptError, *UNDECODABLE):
        return False
    return True
