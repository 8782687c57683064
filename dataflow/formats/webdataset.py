"""WebDataset: tar archives in which consecutive files of one base name are one sample.

`000/123.seg.png` belongs to the sample `000/123` and is its field `seg.png`, as the webdataset library has it; the
field `__key__` is the base name. What a field holds follows from its last suffix: images, sound, video, `cls`-like
integers (text where one of them is none), text and JSON as strings, anything else as bytes. A field that a sample lacks
is null.

A block is about 1 MiB of whole samples: a range of the archive that is a small archive itself. A compressed archive is
one block. Folders, symbolic links and what lies in `__meta__/` or the like are passed over; sparse members and hard
links, whose content lies in another member, are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, cast

import numpy as np
import pyarrow as pa

from connectors.errors import BadInputError, CorruptError
from dataflow.formats.fields import media_field
from dataflow.formats.place import CHUNK_BYTES
from dataflow.formats.ranges import RangeFile
from dataflow.formats.scan import BLOCK_BYTES
from dataflow.formats.scanned import open_scanned
from dataflow.formats.sidecar import FileScan
from dataflow.formats.tar import BLOCK_BYTES as BLOCK
from dataflow.formats.tar import Member, TarError, members
from dataflow.formats.unpacking import compression_of, unpack
from dataflow.media import SUFFIXES as MEDIA_SUFFIXES

if TYPE_CHECKING:
    from connectors.objects import ObjectMeta
    from dataflow.formats.place import Place
    from dataflow.index import Index

__all__ = ["WebdatasetFormat", "WebdatasetSource"]

KEY = "__key__"
SUFFIXES = (".tar", ".tar.bz2", ".tar.gz", ".tar.lz4", ".tar.zst", ".tgz")
# The library's own default decoders (webdataset.autodecode.basichandlers) decide what is a number and what is text.
INTEGER_NAMES = frozenset({"class", "cls", "cls2", "count", "id", "index", "inx"})
TEXT_NAMES = frozenset({"jsn", "json", "text", "transcript", "txt"})

# Of a member: key and field. `__meta__/a.json` is about the archive, to the library too.
MEMBER_NAME = re.compile(r"(?!__[^/]*__(?:/|\Z))((?:.*/|)[^.]+)\.([^/]*)")


@dataclass(slots=True)
class _Sample:
    """Where the files of one sample lie in their archive: by field, offset and size of the content."""

    key: str
    offset: int
    files: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class WebdatasetSource:
    """One set of archives, opened; see `dataflow.formats.protocol.Source`.

    Attributes:
        schema: `__key__` and a field for every suffix that occurs.
        index: Blocks of whole samples.
    """

    schema: pa.Schema
    index: Index
    format: str = field(default="webdataset", init=False)

    def decode(self, block: int, data: memoryview) -> pa.RecordBatch:
        """Find the samples of a block; file contents are copied once."""
        ref = self.index.block_ref(block)
        data = unpack(data, ref.uri)
        samples, _ = _samples(cast("IO[bytes]", pa.BufferReader(pa.py_buffer(data))), ref.uri, ref.offset)
        expected = self.index.blocks.num_samples_in(block)
        if len(samples) != expected:
            raise CorruptError(
                f"{ref.uri} has {len(samples)} samples at offset {ref.offset}, its scan found {expected}", uri=ref.uri
            )
        arrays = [pa.array([sample.key for sample in samples], pa.string())]
        for entry in self.schema.remove(0):
            spans = [sample.files.get(entry.name) for sample in samples]
            arrays.append(_array(entry, [span and data[span[0] : span[0] + span[1]] for span in spans], ref.uri))
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)


class WebdatasetFormat:
    """Tar archives of samples."""

    name = "webdataset"

    def open(self, place: Place) -> WebdatasetSource | None:
        """Scan the archives; None where there are none.

        Raises:
            CorruptError: An archive is damaged; names it and the offset.
            BadInputError: A sample has two files of one suffix, a member is a hard link, or an archive goes on behind
                its end.
        """
        return cast("WebdatasetSource | None", open_scanned(self, place))

    def files(self, place: Place) -> list[ObjectMeta]:
        """Return the archives."""
        return place.files_named(SUFFIXES)

    def scan_file(self, place: Place, meta: ObjectMeta) -> FileScan:
        """Walk one archive; what is learned are its fields."""
        names: dict[str, bool] = {}  # of every field, whether some value is no integer
        uri = place.uri(meta)
        archive: IO[bytes]
        if compression_of(uri):
            content = unpack(memoryview(b"".join(place.chunks(meta))), uri)
            archive = cast("IO[bytes]", pa.BufferReader(pa.py_buffer(content)))
        else:
            archive = cast("IO[bytes]", RangeFile(place, meta))
        samples, end = _samples(archive, uri, 0)
        archive.seek(end)
        if archive.read(BLOCK) != bytes(BLOCK):
            raise CorruptError(f"{uri} has no end mark at offset {end}: it is cut off; write it again", uri=uri)
        while rest := archive.read(CHUNK_BYTES):
            if rest.count(0) < len(rest):
                raise BadInputError(
                    f"{uri} goes on behind its end mark at offset {end}, where readers stop: archives are joined by "
                    "`tar --concatenate`, not by `cat`",
                    uri=uri,
                )
        for sample in samples:
            for name, (offset, size) in sample.files.items():
                if name.rpartition(".")[2] in INTEGER_NAMES and not names.get(name):
                    archive.seek(offset)
                    names[name] = not _is_integer(archive.read(size))
                names.setdefault(name, False)
        rows = list(_blocks([sample.offset for sample in samples], end))
        if samples and compression_of(uri):
            rows = [(0, meta.size_bytes, len(samples))]
        return FileScan(np.array(rows, np.int64).reshape(-1, 3), json.dumps(names, sort_keys=True))

    def merge(self, place: Place, learned: Sequence[tuple[ObjectMeta, str]]) -> tuple[pa.Schema, dict[str, str]]:
        """Return the fields of all archives."""
        names: dict[str, bool] = {}
        for _, text in learned:
            for name, other in json.loads(text).items():
                names[name] = names.get(name, False) or other
        key = pa.field(KEY, pa.string(), nullable=False)
        return pa.schema([key, *(_field(name, other) for name, other in sorted(names.items()))]), {}

    def source(self, index: Index, schema: pa.Schema, facts: dict[str, str]) -> WebdatasetSource:
        """Open the dataset with a known index."""
        return WebdatasetSource(schema, index)


def _blocks(offsets: Sequence[int], end: int) -> Iterator[tuple[int, int, int]]:
    """Yield offset, length and number of samples of each block; nothing where there are no samples."""
    first = 0
    for position, stop in enumerate([*offsets[1:], end][: len(offsets)], 1):
        if stop - offsets[first] >= BLOCK_BYTES or position == len(offsets):
            yield offsets[first], stop - offsets[first], position - first
            first = position


def _samples(archive: IO[bytes], uri: str, at: int) -> tuple[list[_Sample], int]:
    """Return the samples of an archive, or of a range of one that begins at `at`, and where the last one ends."""
    samples: list[_Sample] = []
    end = 0
    try:
        for member in members(archive):
            end = member.content + -(-member.size_bytes // BLOCK) * BLOCK
            match = MEMBER_NAME.fullmatch(member.name)
            if match and member.hard_link:
                raise BadInputError(
                    f"{uri} has a hard link, {member.name}, and a sample needs its own content: write the archive with "
                    "--hard-dereference",
                    uri=uri,
                )
            if match and member.regular:
                _add(samples, member, match, uri)
    except TarError as error:
        raise CorruptError(f"{uri}, from offset {at} on: {error}", uri=uri) from error
    return samples, end


def _add(samples: list[_Sample], member: Member, match: re.Match[str], uri: str) -> None:
    if not member.name.isascii():
        try:
            member.name.encode()
        except UnicodeEncodeError as error:
            raise BadInputError(
                f"{uri} has the name {member.name!r}, which is not UTF-8: rename it", uri=uri
            ) from error
    key, name = match.group(1), match.group(2).lower()
    if not samples or samples[-1].key != key:
        samples.append(_Sample(key, member.offset))
    files = samples[-1].files
    if name in files:
        raise BadInputError(
            f"{uri} has two files {key}.{name} in one sample; give every sample its own base name", uri=uri
        )
    files[name] = (member.content, member.size_bytes)


def _field(name: str, other: bool) -> pa.Field:
    last = name.rpartition(".")[2]
    if codec := MEDIA_SUFFIXES.get(f".{last}"):
        return media_field(name, codec.kind).with_nullable(True)
    if last in INTEGER_NAMES:
        return pa.field(name, pa.string() if other else pa.int64())
    return pa.field(name, pa.string() if last in TEXT_NAMES else pa.binary())


def _array(entry: pa.Field, values: list[memoryview | None], uri: str) -> pa.Array:
    try:
        if pa.types.is_binary(entry.type):
            return pa.array(values, pa.binary())
        texts = [None if value is None else str(value, "utf-8") for value in values]
        if pa.types.is_integer(entry.type):
            return pa.array([None if text is None else int(text) for text in texts], pa.int64())
        return pa.array(texts, pa.string())
    except (ValueError, OverflowError) as error:
        raise CorruptError(
            f"field {entry.name!r} of a sample in {uri} is not {entry.type}: {error}", uri=uri
        ) from error


def _is_integer(value: bytes) -> bool:
    try:
        return -(1 << 63) <= int(value) < 1 << 63
    except ValueError:
        return False
