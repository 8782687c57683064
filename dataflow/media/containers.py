"""Whether a media file is whole, as far as its container says: decoders take many cut-off files for shorter ones. Pure.

| container | what is looked at |
|---|---|
| RIFF (wav, avi, webp) | the length of every chunk, and of all |
| Ogg | every page, and that the last one is marked as the last |
| MP4, M4A, QuickTime | the length of every outer box |
| Matroska, WebM | the length of the segment |
| GIF | every block, and the end mark |

FLAC and images are left to their decoders, which notice. An MP3 file has a length only if its encoder wrote one, and a
live recording in WAV or Matroska has none.
"""

from __future__ import annotations

from collections.abc import Callable

from connectors.errors import CorruptError
from dataflow.media.sniffing import sniff

__all__ = ["insist_on_whole"]

_UNKNOWN = (0, 0xFFFFFFFF)  # what a recorder writes that never came back to fill in the length


def insist_on_whole(data: memoryview) -> None:
    """Check that a file does not end before its container says.

    Raises:
        CorruptError: It is cut off; says at which offset something reaches past the end.
    """
    codec = sniff(data)
    check = None if codec is None else _CHECKS.get(codec.name)
    if check is not None:
        check(data)


def _cut_off(what: str, offset: int, data: memoryview) -> CorruptError:
    return CorruptError(f"it is cut off: the {what} at offset {offset} reaches past its {len(data)} bytes")


def _riff(data: memoryview) -> None:
    whole, offset, is_long = int.from_bytes(data[4:8], "little"), 12, bytes(data[:4]) == b"RF64"
    if is_long:  # the same with lengths of 64 bits, which stand in the first chunk
        whole = int.from_bytes(data[20:28], "little")
    if whole not in _UNKNOWN and 8 + whole > len(data) + 1:  # some writers forget the padding of the last chunk
        raise _cut_off("whole", 0, data)
    while offset + 8 <= len(data):
        length = int.from_bytes(data[offset + 4 : offset + 8], "little")
        if is_long and bytes(data[offset : offset + 4]) == b"data":
            length = int.from_bytes(data[28:36], "little")
        if length in _UNKNOWN:
            return
        if offset + 8 + length > len(data):
            raise _cut_off("chunk", offset, data)
        offset += 8 + length + length % 2


def _ogg(data: memoryview) -> None:
    offset, last = 0, False
    while offset < len(data):
        header = offset + 27
        if bytes(data[offset : offset + 4]) != b"OggS" or header > len(data):
            raise CorruptError(f"it is damaged or cut off: there is no Ogg page at offset {offset}")
        body = header + data[header - 1]
        end = body + sum(data[header:body])
        if end > len(data):
            raise _cut_off("page", offset, data)
        last = bool(data[offset + 5] & 4)
        offset = end
    if not last:
        raise CorruptError(f"it is cut off: its last page, before offset {offset}, is not marked as the last")


def _boxes(data: memoryview) -> None:
    offset = 0
    while offset < len(data):
        length, start = int.from_bytes(data[offset : offset + 4], "big"), 8
        if length == 1:
            length, start = int.from_bytes(data[offset + 8 : offset + 16], "big"), 16
        if length == 0:
            return  # up to the end, whatever that is
        if length < start or offset + length > len(data):
            raise _cut_off("box", offset, data)
        offset += length


def _segment(data: memoryview) -> None:
    """Step over the EBML header to the segment, whose identifier is 0x18538067."""
    length, offset = _vint(data, 4)
    offset += length
    if bytes(data[offset : offset + 4]) != b"\x18\x53\x80\x67":
        raise CorruptError(f"it is damaged or cut off: there is no segment at offset {offset}")
    first = data[offset + 4] if offset + 4 < len(data) else 0
    length, content = _vint(data, offset + 4)
    unknown = length == (1 << 7 * (content - offset - 4)) - 1
    if not first or (not unknown and content + length > len(data)):
        raise _cut_off("segment", offset, data)


def _vint(data: memoryview, offset: int) -> tuple[int, int]:
    """Return a number of EBML, whose leading zeros say how many bytes it has, and where it ends."""
    first = data[offset] if offset < len(data) else 0
    size = 9 - first.bit_length()
    value = int.from_bytes(data[offset : offset + size], "big") & (1 << 7 * size) - 1
    return value, offset + size


def _gif(data: memoryview) -> None:
    """Step over header, colours, and blocks: extensions and images, each followed by sub-blocks up to an empty one."""
    offset = 13 + _gif_colours(data, 10)
    while offset < len(data) and data[offset] != 0x3B:
        begin = offset
        if data[offset] == 0x2C:
            offset += 11 + _gif_colours(data, offset + 9)
        else:
            offset += 2
        while offset < len(data) and data[offset]:
            offset += 1 + data[offset]
        offset += 1
        if offset > len(data):
            raise _cut_off("block", begin, data)
    if offset >= len(data):
        raise CorruptError(f"it is cut off: its {len(data)} bytes have no end mark")


def _gif_colours(data: memoryview, offset: int) -> int:
    """Return the bytes of the table of colours that the flags at an offset announce."""
    flags = data[offset] if offset < len(data) else 0
    return 3 * (2 << (flags & 7)) if flags & 0x80 else 0


_CHECKS: dict[str, Callable[[memoryview], None]] = {
    "avi": _riff,
    "gif": _gif,
    "m4a": _boxes,
    "mkv": _segment,
    "mov": _boxes,
    "mp4": _boxes,
    "ogg": _ogg,
    "wav": _riff,
    "webm": _segment,
    "webp": _riff,
}
