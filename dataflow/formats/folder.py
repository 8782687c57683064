"""Folders of media files, every file one sample: `root/class/name.png`, or any files that a table names.

What counts, without opening a file:
- A table such as `metadata.csv` (see `dataflow.formats.file_table`) says which files are samples, in the order of its
  rows; its other columns are fields. Files that it does not name are left out.
- Without a table, images, sound and video are samples, by their suffixes in any case, in the order of their paths.
  The first folder below the root is the class, whatever lies deeper: `root/cat/2024/1.png` is a cat. Labels number the
  class names in sorted order. Files beside class folders are an error: they would be samples without a label. Files and
  no folder at all is a dataset without labels.
- Hidden files, and those in hidden folders, do not count, unless a table names them.
- Text files count if a table names them, or as the format `text-folder`: whether a `.txt` is one sample or one a line
  cannot be told by looking.

A file is in the field of its kind: `image`, `audio`, `video`, `text`, or `file` for anything else that a table names.
Where there are several kinds, the fields of the others are null.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from connectors.errors import BadInputError, CorruptError
from connectors.objects import ObjectMeta, join_uri
from dataflow.formats.fields import label_field, media_field
from dataflow.formats.file_table import FileTable, find_file_table
from dataflow.formats.scan import listing_fingerprint, shard_table
from dataflow.index import Blocks, Index
from dataflow.media import MEDIA_KINDS, SUFFIXES

if TYPE_CHECKING:
    from dataflow.formats.place import Place

__all__ = ["FolderFormat", "FolderSource"]

# A folder of these is a dataset of another format, whatever pictures lie in it.
OTHER_SUFFIXES = (".parquet", ".tfrec", ".tfrecord", ".tfrecords")


@dataclass(frozen=True, slots=True, eq=False)
class FolderSource:
    """One folder of files, opened; see `dataflow.formats.protocol.Source`.

    Attributes:
        format: Name of the format.
        schema: A field for every kind of file, then `label` where there are classes, or the columns of the table.
        index: One block per sample, which is its file.
        kinds: Of every file, the number of its field.
        columns: What else is known of every sample; None for nothing.
    """

    format: str
    schema: pa.Schema
    index: Index
    kinds: npt.NDArray[np.int8]
    columns: pa.RecordBatch | None

    def decode(self, block: int, data: memoryview) -> pa.RecordBatch:
        """Return the one sample of a file; encoded media are a view of `data`.

        Raises:
            CorruptError: It should be text, and is not UTF-8.
        """
        known = [] if self.columns is None else self.columns.slice(block, 1).columns
        arrays = [pa.nulls(1, entry.type) for entry in list(self.schema)[: len(self.schema) - len(known)]]
        number = int(self.kinds[block])
        arrays[number] = _content(data, self.schema.field(number).type, self.index.block_ref(block).uri)
        return pa.RecordBatch.from_arrays([*arrays, *known], schema=self.schema)


@dataclass(frozen=True, slots=True)
class FolderFormat:
    """Files in folders.

    Attributes:
        name: `folder`, or `text-folder` for one text file a sample.
        kinds: Of the files that are samples where no table says so.
    """

    name: str = "folder"
    kinds: tuple[str, ...] = MEDIA_KINDS

    def open(self, place: Place) -> FolderSource | None:
        """List a place and index its files; None where there are none that count.

        Raises:
            BadInputError: Files lie beside class folders, one has 2 GiB or more, or a table cannot be understood.
            CorruptError: A file has no bytes, or a table names one that is missing.
        """
        if any(_is_of_other_format(meta.key) for meta in place.visible):
            return None
        files = place.files_named(tuple(suffix for suffix in (*SUFFIXES, ".txt") if _kind(suffix) in self.kinds))
        table = find_file_table(place, media=bool(files))
        if table is not None:
            files = table.files
        if not files:
            return None
        for meta in files:
            if meta.size_bytes >= 1 << 31:
                uri = place.uri(meta)
                raise BadInputError(
                    f"{uri} has {meta.size_bytes} bytes; files of 2 GiB and more are not supported", uri=uri
                )
        kinds = [_kind(meta.key) for meta in files]
        names = sorted(set(kinds))
        fields = [_field(name).with_nullable(len(names) > 1) for name in names]
        columns = _labels(place.root, files) if table is None else _checked(table, names)
        schema = pa.schema([*fields, *(columns.schema if columns is not None else ())])
        numbers = np.array([names.index(kind) for kind in kinds], np.int8)
        return FolderSource(self.name, schema, _index(place.root, files, schema, table), numbers, columns)


def _is_of_other_format(key: str) -> bool:
    return key.lower().endswith(OTHER_SUFFIXES) and posixpath.basename(key).lower() != "metadata.parquet"


def _kind(name: str) -> str:
    """Return the kind of a file, which is the name of its field."""
    suffix = posixpath.splitext("x" + name)[1].lower()
    return SUFFIXES[suffix].kind if suffix in SUFFIXES else "text" if suffix == ".txt" else "file"


def _field(kind: str) -> pa.Field:
    if kind in MEDIA_KINDS:
        return media_field(kind, kind)
    return pa.field(kind, pa.string() if kind == "text" else pa.binary(), nullable=False)


def _content(data: memoryview, kind: pa.DataType, uri: str) -> pa.Array:
    if pa.types.is_string(kind):
        try:
            return pa.array([str(data, "utf-8-sig")], kind)
        except UnicodeDecodeError as error:
            raise CorruptError(f"{uri} is no text in UTF-8: {error}", uri=uri) from error
    offsets = pa.py_buffer(np.array([0, len(data)], np.int32))
    return pa.Array.from_buffers(kind, 1, [None, offsets, pa.py_buffer(data)])


def _labels(url: str, files: Sequence[ObjectMeta]) -> pa.RecordBatch | None:
    """Return the labels that folders give; None for a flat folder."""
    loose = next((meta.key for meta in files if "/" not in meta.key), None)
    classes = sorted({meta.key.split("/", 1)[0] for meta in files if "/" in meta.key})
    if not classes:
        return None
    if loose is not None:
        raise BadInputError(
            f"{join_uri(url, loose)} lies beside class folders ({classes[0]}, ...), so it has no label; move it, or "
            "name files and labels in a metadata.csv",
            uri=url,
        )
    number = {name: label for label, name in enumerate(classes)}
    labels = pa.array([number[meta.key.split("/", 1)[0]] for meta in files], pa.int64())
    return pa.record_batch([labels], schema=pa.schema([label_field("label", classes)]))


def _checked(table: FileTable, names: Sequence[str]) -> pa.RecordBatch | None:
    """Return the columns of a table, none of which may have the name of a field of files."""
    for name in names:
        if name in table.columns.column_names:
            raise BadInputError(f"{table.uri} has a column {name!r}, as the field of its files is called: rename it")
    return table.columns.combine_chunks().to_batches()[0] if table.columns.num_columns else None


def _index(url: str, files: Sequence[ObjectMeta], schema: pa.Schema, table: FileTable | None) -> Index:
    """Build the index. The fingerprint covers schema, paths, sizes and tables; version tokens differ between copies."""
    count, shards = len(files), shard_table(files)
    first_sample = np.arange(count + 1, dtype=np.int64)
    blocks = Blocks(np.arange(count, dtype=np.int32), np.zeros(count, np.int64), shards.size_bytes, first_sample)
    fingerprint = listing_fingerprint(shards, blocks, schema)
    if table is not None:
        fingerprint = xxhash.xxh3_128(f"{fingerprint} {table.digest}".encode()).hexdigest()
    return Index(url, fingerprint, shards, blocks)
