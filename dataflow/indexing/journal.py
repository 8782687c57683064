"""What a running build of an index has found so far: one file in the cache folder, appended to.

    frame: uint32 length | uint64 xxh3 of the body | body: msgpack of name, size, version, rows, learned

A frame is one write to the end of the file. Killed in the middle of one, the next run finds a frame that is cut off or
does not match its checksum, and believes what stands before it. Every entry carries the version token of its file, so
an old journal costs nothing but room. A journal that cannot be written is said so once and done without.
"""

from __future__ import annotations

import logging
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import xxhash

from connectors.objects import ObjectMeta
from dataflow.formats.sidecar import FileScan
from dataflow.index.kept import kept_folder

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Journal"]

logger = logging.getLogger(__name__)

_HEADER = struct.Struct("<IQ")


class _Entry(msgspec.Struct, array_like=True):
    name: str
    size_bytes: int
    version: str
    rows: bytes
    learned: str


class Journal:
    """One journal; a context manager for one thread.

    Args:
        name: Of the file in the cache folder.
        resume: Go on with what is there; otherwise it is removed.

    Attributes:
        found: What an earlier run found.
    """

    def __init__(self, name: str, *, resume: bool) -> None:
        self._path = kept_folder() / name
        self.found: dict[ObjectMeta, FileScan] = {}
        self._descriptor = -1
        end = 0
        if resume:
            self.found, end = _read(self._path)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            os.truncate(self._descriptor, end)
        except OSError as error:
            logger.warning("%s cannot be written: what breaks off cannot be resumed: %s", self._path, error)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file; it is removed unless something went wrong."""
        if self._descriptor < 0:
            return
        os.close(self._descriptor)
        if error is None:
            self._path.unlink(missing_ok=True)

    def add(self, meta: ObjectMeta, scan: FileScan) -> None:
        """Remember the scan of one file."""
        if self._descriptor < 0:
            return
        entry = _Entry(meta.key, meta.size_bytes, meta.version, scan.rows.tobytes(), scan.learned)
        body = msgspec.msgpack.encode(entry)
        frame = _HEADER.pack(len(body), xxhash.xxh3_64_intdigest(body)) + body
        try:
            written = os.write(self._descriptor, frame)
        except OSError as error:
            logger.debug("%s: %s", self._path, error)
            written = 0
        if written < len(frame):
            logger.warning("%s is full: what breaks off from here on is scanned again", self._path)
            os.close(self._descriptor)
            self._descriptor = -1


def _read(path: Path) -> tuple[dict[ObjectMeta, FileScan], int]:
    """Return the entries of a journal, and where the last whole one ends."""
    found: dict[ObjectMeta, FileScan] = {}
    end = 0
    try:
        with path.open("rb") as file:
            while len(header := file.read(_HEADER.size)) == _HEADER.size:
                length, checksum = _HEADER.unpack(header)
                body = file.read(length)
                if len(body) < length or xxhash.xxh3_64_intdigest(body) != checksum:
                    break
                entry = msgspec.msgpack.decode(body, type=_Entry)
                rows = np.frombuffer(entry.rows, np.int64).reshape(-1, 3)
                found[ObjectMeta(entry.name, entry.size_bytes, entry.version)] = FileScan(rows, entry.learned)
                end = file.tell()
    except FileNotFoundError:
        return {}, 0
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        logger.warning("%s is not used: %s", path, error)
    return found, end
