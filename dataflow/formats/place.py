"""A place that may hold a dataset: what lies there, listed once however many formats look.

Opened leniently, a place collects what cannot be read there instead of failing: scans leave such ranges between blocks.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import msgspec

from cache.keys import BlockRef
from connectors.bridge import run_sync
from connectors.errors import CorruptError, NotFoundError
from connectors.folders import list_folder
from connectors.objects import ObjectMeta, join_uri, split_uri
from connectors.registry import open_store
from dataflow.formats.destination import PART_SUFFIX
from dataflow.formats.unpacking import suffixed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cache.access import BlockReader
    from dataflow.formats.sidecar import Sidecar

__all__ = ["BadRange", "Place"]

T = TypeVar("T")

# What one request of a scan asks for, and what a scan holds of a file at once.
CHUNK_BYTES = 8 << 20
_STAR = re.compile(r"(\*\*/|\*\*|\*)")
_STARS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*"}


@dataclass(frozen=True, slots=True, order=True)
class BadRange:
    """Bytes of a file that no sample can be made of.

    Attributes:
        uri: The file.
        offset: First byte.
        length: Number of bytes; what follows a damaged header reaches to the end of the file.
        reason: What is wrong.
    """

    uri: str
    offset: int
    length: int
    reason: str


class Place:
    """A URL and how to read there. Lives while a dataset is being opened.

    Args:
        url: A folder or prefix, normalised; with `file://` also a single file. Or files whose names fit: `*` stands for
            any part of a name, `**` for any folders.
        reader: Answers.
        bad: Receives what scans pass over; without it, that is an error.
        revision: Which version of a native dataset is meant; None for the newest.

    Attributes:
        url: As given.
        reader: As given.
        bad: As given.
        revision: As given.
        outdated: A sidecar that was found beside the files and does not hold for all of them any more.
    """

    def __init__(
        self, url: str, reader: BlockReader, bad: list[BadRange] | None = None, revision: int | None = None
    ) -> None:
        self.url = url
        self.reader = reader
        self.bad = bad
        self.revision = revision
        self.outdated: Sidecar | None = None

    @property
    def lenient(self) -> bool:
        """Whether damaged records are passed over."""
        return self.bad is not None

    def pass_over(self, meta: ObjectMeta, offset: int, length: int, error: Exception) -> None:
        """Take note of a range that is left out, or raise what is wrong with it."""
        if self.bad is None:
            raise error
        self.bad.append(BadRange(self.uri(meta), offset, length, str(error)))

    @cached_property
    def _single(self) -> ObjectMeta | None:
        """The file that the URL itself names. Only asked of `file://`: elsewhere names cannot be told from prefixes."""
        if not self.url.startswith("file://"):
            return None
        root, key = split_uri(self.url)
        store = open_store(root)
        try:
            meta = run_sync(store.head(key))
            return replace(meta, key=key.rpartition("/")[2])
        except NotFoundError:
            return None
        finally:
            run_sync(store.close())

    @cached_property
    def _pattern(self) -> tuple[str, re.Pattern[str]] | None:
        """The folder above the first star of the URL, and the names below it that are meant; None without a star."""
        store, key = split_uri(self.url)
        if "*" not in key or self._single is not None:
            return None
        parts = key.split("/")
        above = next(place for place, part in enumerate(parts) if "*" in part)
        names = "".join(_STARS.get(part, re.escape(part)) for part in _STAR.split("/".join(parts[above:])))
        return join_uri(store, "/".join(parts[:above])), re.compile(names)

    @property
    def names_files(self) -> bool:
        """Whether the URL says which files are meant, and not only where."""
        return self._single is not None or self._pattern is not None

    @property
    def root(self) -> str:
        """The URL that `files` are relative to."""
        if self._single is not None:
            return self.url.rpartition("/")[0]
        return self.url if self._pattern is None else self._pattern[0]

    @cached_property
    def files(self) -> list[ObjectMeta]:
        """What lies there, sorted by key; only what is meant where the URL says that.

        Raises:
            CorruptError: A symbolic link leads nowhere, so that a file or a whole folder is missing.
        """
        if self._single:
            return [self._single]
        lost: list[str] = []
        found = self._walked(lost)
        if self._pattern is not None:
            fits = self._pattern[1].fullmatch
            found, lost = [meta for meta in found if fits(meta.key)], [link for link in lost if fits(link)]
        for link in lost:
            uri = join_uri(self.root, link)
            message = f"{uri} is a symbolic link to what does not exist; remove it, or bring its target back"
            self.pass_over(ObjectMeta(link, 0, ""), 0, 0, CorruptError(message, uri=uri))
        return found

    def _walked(self, lost: list[str]) -> list[ObjectMeta]:
        """List a folder here, in one walk, since only that tells what is `lost`; all else as the reader says."""
        if self.root.startswith("file://"):
            # Where this process may not read, or has another view of the disks, the cache's server may know.
            with suppress(OSError):
                if found := list_folder(split_uri(self.root)[1], lost=lost):
                    return found
        return self.reader.list_objects(self.root)

    @property
    def visible(self) -> list[ObjectMeta]:
        """The files that may be data: none that is hidden, or in a hidden folder, as `.git` and `._copy.png` are."""
        return self.files if self._single else [meta for meta in self.files if "/." not in f"/{meta.key}"]

    @cached_property
    def unfinished(self) -> bool:
        """Whether a conversion that broke off left its records here."""
        return any(meta.key.endswith(PART_SUFFIX) for meta in self.files)

    def files_named(self, suffixes: tuple[str, ...]) -> list[ObjectMeta]:
        """Return the visible files whose names end in one of `suffixes`, in any case, or in one and a number of many.

        Raises:
            CorruptError: One of them has no bytes.
        """
        files = [meta for meta in self.visible if suffixed(meta.key).endswith(suffixes)]
        for meta in files:
            if meta.size_bytes == 0:
                uri = self.uri(meta)
                self.pass_over(meta, 0, 0, CorruptError(f"{uri} is empty; remove it or write it again", uri=uri))
        return [meta for meta in files if meta.size_bytes]

    def description(self, key: str, kind: type[T]) -> tuple[str, T] | None:
        """Return URI and content of a JSON file that describes a dataset; None where none of that kind is there."""
        meta = next((meta for meta in self.files if meta.key == key), None)
        if meta is None:
            return None
        uri = self.uri(meta)
        try:
            return uri, msgspec.json.decode(self.reader.read_object(uri).data, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return None

    def expected(self, sizes: Iterable[tuple[str, int | None]], said_by: str) -> list[ObjectMeta]:
        """Return the files that a description names, each with its bytes, where those are told.

        Raises:
            CorruptError: One of them is missing or of another size.
        """
        found = {meta.key: meta for meta in self.files}
        files = []
        for key, size_bytes in sizes:
            meta = found.get(key)
            if meta is None or size_bytes not in (None, meta.size_bytes):
                what = "is missing" if meta is None else f"has {meta.size_bytes} bytes"
                told = "names it" if size_bytes is None else f"says {size_bytes} bytes"
                uri = join_uri(self.root, key)
                raise CorruptError(f"{uri} {what}, {said_by} {told}", uri=uri)
            files.append(meta)
        return files

    def uri(self, meta: ObjectMeta) -> str:
        """Name a file whole."""
        return join_uri(self.root, meta.key)

    def read(self, meta: ObjectMeta, offset: int, length: int) -> memoryview:
        """Return a range of a file, of exactly the version that was listed.

        Raises:
            CorruptError: The file ends before the range does.
        """
        if offset < 0 or length < 1 or offset + length > meta.size_bytes:
            uri = self.uri(meta)
            raise CorruptError(
                f"{uri} has {meta.size_bytes} bytes, too few for the {length} at offset {offset} that it promises",
                uri=uri,
            )
        return self.reader.read_blocks([BlockRef(self.uri(meta), meta.version, offset, length)])[0].view

    def chunks(self, meta: ObjectMeta) -> Iterator[memoryview]:
        """Yield a file's content from front to end."""
        for offset in range(0, meta.size_bytes, CHUNK_BYTES):
            yield self.read(meta, offset, min(CHUNK_BYTES, meta.size_bytes - offset))
