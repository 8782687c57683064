"""What the names of block files cannot say, kept beside them: labels and pins, in one append-only file a directory.

    record = u32 length | u32 crc32c of the body | body: msgpack, `LabelRecord` or `PinRecord`

A block's label is appended before the block is published, so a kill leaves labels without blocks, never the other way
round. A record that a kill or a full disk left torn does not verify; reading goes on at the next one that does. Of two
labels for one block, and of two sets of pins, the later counts. Nothing is fsynced: after a power failure the youngest
blocks may be without a label, and what a rule needs to know of them is then found out by fetching them again.

The file is written anew, without the labels of blocks that are gone, when those are the greater part of it: beside the
old one, then renamed. It takes some 20 bytes a block then, and its URIs; these are not part of the tier's limit.

The calls block; several threads may append.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import msgspec
from crc32c import crc32c

from cache.keys import KEY_BYTES
from cache.labels import Label
from cache.pins import PinSet

__all__ = ["Journal", "LabelRecord", "PinRecord"]

_log = logging.getLogger(__name__)

_HEADER = struct.Struct("<II")
_MAX_BODY_BYTES = 4 * 1024 * 1024
_MAX_KEYS = 65536
# Labels of blocks that are gone, and pins of the past, which are put up with.
_SLACK_ENTRIES = 65536


class LabelRecord(msgspec.Struct, tag="label", frozen=True):
    """One label, and the keys of the blocks that have it, one behind the other."""

    uri: str
    job: str
    born_s: int
    keys: bytes


class PinRecord(msgspec.Struct, tag="pins", frozen=True):
    """All pins there are."""

    pins: PinSet


Record: TypeAlias = LabelRecord | PinRecord
_decoder: msgspec.msgpack.Decoder[Record] = msgspec.msgpack.Decoder(Record)


class Journal:
    """The file of one directory. Belongs to whoever has locked that.

    Args:
        path: The file; made by the first append.
        temporary: The folder for a new version, swept at each start.
        system: The module of system calls; tests give one that fails or dies.
    """

    def __init__(self, path: str, temporary: str, *, system: Any) -> None:
        self._path = path
        self._temporary = os.path.join(temporary, "journal")
        self._system = system
        self._guard = threading.Lock()
        self._entries = 0
        # Of the last set, which stays.
        self._pins = 0

    def load(self) -> tuple[dict[bytes, Label], PinSet]:
        """Return the labels of blocks by key, also of some that are gone, and the pins.

        Raises:
            OSError: The file cannot be read.
        """
        labels: dict[bytes, Label] = {}
        pins = PinSet()
        self._entries = self._pins = 0
        for record in _records(self._read()):
            self._count(record)
            if isinstance(record, PinRecord):
                pins = record.pins
                continue
            label = Label(record.uri, record.job, record.born_s)
            labels.update((key, label) for key in _keys(record))
        return labels, pins

    def append(self, record: Record) -> None:
        """Write a record at the end.

        Raises:
            OSError: It was not written, or not whole.
        """
        encoded = _encode(record)
        if len(encoded) > _HEADER.size + _MAX_BODY_BYTES:  # it would be taken for torn
            raise OSError(errno.EFBIG, f"a journal's record has {_MAX_BODY_BYTES} bytes at most", self._path)
        with self._guard:
            self._write(self._path, os.O_APPEND, [encoded])
            self._count(record)

    def overgrown(self, blocks: int) -> bool:
        """Say whether most of the file is about blocks that are gone, where so many are left, or pins of the past.

        It is not right after a rewrite, which would not help again.
        """
        return self._entries > 2 * (blocks + self._pins) + _SLACK_ENTRIES

    def rewrite(self, is_held: Callable[[bytes], bool]) -> None:
        """Write the file anew, without the labels of blocks that are not held. Whoever appends waits.

        Raises:
            OSError: The old file is still there, whole.
        """
        with self._guard:
            pins: PinRecord | None = None
            held: dict[bytes, Label] = {}
            for record in _records(self._read()):
                if isinstance(record, PinRecord):
                    pins = record
                    continue
                label = Label(record.uri, record.job, record.born_s)
                held.update((key, label) for key in _keys(record) if is_held(key))
            records: list[Record] = [] if pins is None else [pins]
            records += gather(held.items())
            self._entries = self._pins = 0
            for record in records:
                self._count(record)
            try:
                self._write(self._temporary, os.O_TRUNC, map(_encode, records))
                self._system.rename(self._temporary, self._path)
            except OSError:
                with contextlib.suppress(OSError):
                    self._system.unlink(self._temporary)
                raise

    def _count(self, record: Record) -> None:
        if isinstance(record, PinRecord):
            self._pins = len(record.pins.pins)
            self._entries += self._pins
        else:
            self._entries += len(record.keys) // KEY_BYTES

    def _read(self) -> memoryview:
        try:
            with open(self._path, "rb") as file:
                return memoryview(file.read())
        except FileNotFoundError:
            return memoryview(b"")

    def _write(self, path: str, flag: int, pieces: Iterable[bytes]) -> None:
        fd = self._system.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | flag, 0o600)
        try:
            for piece in pieces:
                with memoryview(piece) as view:
                    written = 0
                    while written < len(view):
                        written += self._system.write(fd, view[written:])
        finally:
            self._system.close(fd)


def gather(labels: Iterable[tuple[bytes, Label]]) -> Iterator[LabelRecord]:
    """Yield as few records as say which block has which label. Pure."""
    keys_of: dict[Label, list[bytes]] = {}
    for key, label in labels:
        keys_of.setdefault(label, []).append(key)
    for label, keys in keys_of.items():
        for begin in range(0, len(keys), _MAX_KEYS):
            yield LabelRecord(label.uri, label.job, label.born_s, b"".join(keys[begin : begin + _MAX_KEYS]))


def _keys(record: LabelRecord) -> Iterator[bytes]:
    return (record.keys[at : at + KEY_BYTES] for at in range(0, len(record.keys) - KEY_BYTES + 1, KEY_BYTES))


def _encode(record: Record) -> bytes:
    body = msgspec.msgpack.encode(record)
    return _HEADER.pack(len(body), crc32c(body)) + body


def _records(content: memoryview) -> Iterator[Record]:
    at, torn = 0, 0
    while at + _HEADER.size <= len(content):
        length, crc = _HEADER.unpack_from(content, at)
        body = content[at + _HEADER.size : at + _HEADER.size + length]
        if 0 < length <= _MAX_BODY_BYTES and len(body) == length and crc32c(body) == crc:
            with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
                yield _decoder.decode(body)
            at += _HEADER.size + length
        else:
            at += 1
            torn += 1
    if torn:
        _log.warning("%d bytes of a cache's journal were torn and are passed over", torn)
