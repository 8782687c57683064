"""Tables beside media files that say more of them: `metadata.csv` and its like, with a column of file names.

What is such a table, by its name and its columns:
- `metadata` with the suffix .csv, .tsv, .jsonl, .ndjson or .parquet, in the root or in folders below; several of them
  are one table, and what they name lies in their own folders. HuggingFace's `imagefolder` and `audiofolder` read these.
- Otherwise the only table of text in the root with a column of file names.
- The column is `file_name`; or the first of `filename`, `file`, `path`, `image`, `audio`, `video` whose first value is
  the name of a file that is there.

A table is read whole when the dataset is opened, and travels with it to worker processes.
"""

from __future__ import annotations

import posixpath
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import xxhash

from connectors.errors import BadInputError, CorruptError
from dataflow.formats.fields import decode_names, storable_schema
from dataflow.formats.json_records import insist_on_depth, read_json
from dataflow.formats.large_integers import with_large_integers

if TYPE_CHECKING:
    from connectors.objects import ObjectMeta
    from dataflow.formats.place import Place

__all__ = ["FileTable", "find_file_table"]

NAME = "metadata"
JSON_SUFFIXES = (".jsonl", ".ndjson")
TEXT_SUFFIXES = (".csv", *JSON_SUFFIXES, ".tsv")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
FILE_NAME = "file_name"
OTHER_NAMES = ("filename", "file", "path", "image", "audio", "video")
MAX_TABLE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, eq=False)
class FileTable:
    """The tables of one place, as one.

    Attributes:
        files: The file of every row.
        columns: All columns but that of the file names.
        digest: Names the content of the tables.
        uri: One of the tables, for errors.
    """

    files: list[ObjectMeta]
    columns: pa.Table
    digest: str
    uri: str


def find_file_table(place: Place, *, media: bool) -> FileTable | None:
    """Return the tables of a place; None where there are none.

    Args:
        place: Where to look.
        media: Whether there are media files. Without, only what is called `metadata` counts, and only if it names files
            that are there: it could as well be the dataset itself.

    Raises:
        BadInputError: Several tables could be meant, they disagree, or one has a row without a file.
        CorruptError: A table cannot be read, or names a file that is missing or empty.
    """
    tables = [meta for meta in place.visible if _is_called_metadata(meta.key)]
    if not tables and media:
        tables = [meta for meta in place.visible if "/" not in meta.key and meta.key.lower().endswith(TEXT_SUFFIXES)]
    if len(tables) in (0, len(place.files)):
        return None
    files = {unicodedata.normalize("NFC", meta.key): meta for meta in place.files}
    read = [one for one in (_read(place, meta, files, media=media) for meta in tables) if one is not None]
    if not read:
        return None
    if len(read) > 1 and not _is_called_metadata(tables[0].key):
        names = ", ".join(one.uri for one in read)
        raise BadInputError(f"several tables name files: {names}; call the right one metadata.csv", uri=read[0].uri)
    try:
        columns = pa.concat_tables([one.columns for one in read], promote_options="permissive")
    except pa.ArrowException as error:
        raise BadInputError(f"the tables in {place.root} disagree about a column: {error}", uri=read[0].uri) from error
    digest = xxhash.xxh3_128("".join(one.digest for one in read).encode()).hexdigest()
    return FileTable([meta for one in read for meta in one.files], columns.combine_chunks(), digest, read[0].uri)


def _is_called_metadata(key: str) -> bool:
    stem, suffix = posixpath.splitext(posixpath.basename(key).lower())
    return stem == NAME and suffix in SUFFIXES


def _read(place: Place, meta: ObjectMeta, files: dict[str, ObjectMeta], *, media: bool) -> FileTable | None:
    """Read one table; None for a table without a column of file names."""
    uri, folder = place.uri(meta), posixpath.dirname(meta.key)
    if meta.size_bytes > MAX_TABLE_BYTES:
        raise BadInputError(f"{uri} has {meta.size_bytes} bytes, too many for a table that is kept in memory", uri=uri)
    data = place.reader.read_object(uri).data
    try:
        table = _parse(data, posixpath.splitext(meta.key)[1].lower(), uri)
        decode_names(table.schema)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CorruptError(f"{uri} cannot be read as a table: {error}", uri=uri) from error
    names = [name for name in table.column_names if name.lower().endswith("_" + FILE_NAME)]
    if names:
        raise BadInputError(
            f"{uri} names several files a row ({', '.join(names)}), and a sample has one: choose one and call it "
            f"{FILE_NAME}, or put them together in archives or Parquet",
            uri=uri,
        )
    column = _file_column(table, folder, files, media=media)
    if column is None and media and _is_called_metadata(meta.key):
        if not table.num_rows:
            raise BadInputError(f"{uri} has no rows: remove it, or name the files that are samples", uri=uri)
        raise BadInputError(
            f"{uri} has no column {FILE_NAME} that says which files its rows are about, only {table.column_names}",
            uri=uri,
        )
    if column is None:
        return None
    rows = [_find(name, folder, files) for name in table.column(column).to_pylist()]
    for row, (file, name) in enumerate(zip(rows, table.column(column).to_pylist(), strict=True)):
        if file is None or not file.size_bytes:
            what = "which is not there" if file is None else "which is empty"
            raise CorruptError(f"row {row} of {uri} names {name!r}, {what}", uri=uri)
    columns = table.drop_columns([column])
    if columns.num_columns:
        columns = columns.cast(storable_schema(columns.schema.remove_metadata()))
    return FileTable([file for file in rows if file is not None], columns, xxhash.xxh3_128(data).hexdigest(), uri)


def _file_column(table: pa.Table, folder: str, files: dict[str, ObjectMeta], *, media: bool) -> str | None:
    texts: dict[str, str] = {entry.name.lower(): entry.name for entry in table.schema if _is_text(entry.type)}
    if media and FILE_NAME in texts:
        return texts[FILE_NAME]
    for name in (FILE_NAME, *OTHER_NAMES):
        if name in texts and len(table) and _find(table.column(texts[name])[0].as_py(), folder, files):
            return texts[name]
    return None


def _find(name: str | None, folder: str, files: dict[str, ObjectMeta]) -> ObjectMeta | None:
    """Return the file that a table in `folder` means; names are compared in their composed form (NFC)."""
    if not name:
        return None
    return files.get(unicodedata.normalize("NFC", posixpath.normpath(posixpath.join(folder, name))))


def _parse(data: bytes, suffix: str, uri: str) -> pa.Table:
    if suffix == ".parquet":
        table = pq.read_table(pa.BufferReader(data))
        table.validate(full=True)  # the reader takes strings that are no UTF-8
        return table
    if suffix in JSON_SUFFIXES:
        insist_on_depth(memoryview(data), uri=uri, offset=0)
    table = _parse_text(data, suffix, {})
    # What looks like a date is text, as everywhere.
    temporal = {field.name: pa.string() for field in table.schema if pa.types.is_temporal(field.type)}
    table = _parse_text(data, suffix, temporal) if temporal else table

    def parse(schema: pa.Schema) -> pa.Table:
        return _parse_text(data, suffix, dict(zip(schema.names, schema.types, strict=True)))

    exact = with_large_integers(table, parse, data if suffix in JSON_SUFFIXES else None, uri=uri)
    return table if exact.equals(table.schema) else parse(exact)


def _parse_text(data: bytes, suffix: str, types: dict[str, Any]) -> pa.Table:
    if suffix in JSON_SUFFIXES:
        return read_json(data, pa.schema(types.items()) if types else None, unexpected="infer", use_threads=True)
    return pyarrow.csv.read_csv(
        pa.BufferReader(data),
        pyarrow.csv.ReadOptions(block_size=len(data) + 1),
        pyarrow.csv.ParseOptions(delimiter="\t" if suffix == ".tsv" else ",", newlines_in_values=True),
        pyarrow.csv.ConvertOptions(column_types=types),
    )


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
