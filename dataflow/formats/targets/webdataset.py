"""WebDataset archives as the target of a conversion."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from connectors.errors import BadInputError
from dataflow.formats.fields import field_kind, is_bytes, numpy_dtype, storable_schema, tensor_values
from dataflow.formats.targets.files import FileTarget, refuse
from dataflow.formats.webdataset import INTEGER_NAMES, KEY, MEMBER_NAME, TEXT_NAMES
from dataflow.media import SUFFIXES, sniff

if TYPE_CHECKING:
    from connectors.protocols import Buffer
    from dataflow.formats.protocol import Part

__all__ = ["WebdatasetTarget"]

_NAME_BYTES = 100
_MAX_OCTAL = 1 << 33
_TEMPLATE = tarfile.TarInfo().tobuf(tarfile.PAX_FORMAT)
_MEDIA_NAMES = {suffix[1:]: codec.kind for suffix, codec in SUFFIXES.items()}
_MEANINGFUL = _MEDIA_NAMES.keys() | INTEGER_NAMES | TEXT_NAMES | {"npy"}


@dataclass(frozen=True, slots=True, kw_only=True)
class WebdatasetTarget(FileTarget):
    """How archives are to be written.

    The field `__key__` names a sample; without one it is its number. A field whose name ends in a suffix that the
    webdataset library knows keeps its name. Others get one that says what they are: `image.png` or `sound.flac` (as
    encoded), `label.cls`, `text.txt`, `x.npy` for floats and tensors, `x.json` for what is nested; bytes keep their
    name. A null is a file that the sample lacks.
    """

    format: ClassVar[str] = "webdataset"
    suffix: ClassVar[str] = ".tar"

    def stored_schema(self, schema: pa.Schema) -> pa.Schema:
        """Return `schema`; archives hold everything, but for bytes inside what is nested.

        Raises:
            BadInputError: A name cannot be part of a file's name, or JSON cannot hold a field.
        """
        for name in schema.names:
            if "/" in name or not name or name.lower() != name:
                raise BadInputError(
                    f"field {name!r} cannot be a suffix in an archive: it must be lower case and without slash"
                )
        for field in schema:
            if _suffix(field.type) == "json" and _has_bytes(field.type):
                raise refuse(field, self.format, "what is nested is written as JSON, which has no bytes")
        return storable_schema(schema)

    def build(
        self, schema: pa.Schema, batches: Iterable[pa.RecordBatch], first_sample: int
    ) -> tuple[Part, list[Buffer]]:
        """Build one archive.

        Raises:
            BadInputError: A sample has no files, or a `__key__` by which readers would not find it.
        """
        chunks: list[Buffer] = []
        before = None
        for batch in batches:
            members: list[bytes] = []
            columns = [_values(column, field) for column, field in zip(batch.columns, schema, strict=True)]
            for values in zip(*columns, strict=True):
                sample = dict(zip(schema.names, values, strict=True))
                key = sample.pop(KEY, None) or f"{first_sample:09d}"
                files = [
                    (_file_name(name, schema.field(name), value), value)
                    for name, value in sample.items()
                    if value is not None
                ]
                _insist_on_sample(first_sample, key, before, [name for name, _ in files])
                for name, value in files:
                    members += _member(f"{key}.{name}", value)
                before = key
                first_sample += 1
            chunks.append(b"".join(members))
        chunks.append(bytes(2 * tarfile.BLOCKSIZE))
        return {"size_bytes": sum(map(len, chunks))}, chunks


def _insist_on_sample(number: int, key: str, before: str | None, names: list[str]) -> None:
    """Refuse what readers, to whom consecutive files of one base name are a sample, would take for something else."""
    match = MEMBER_NAME.fullmatch(f"{key}.x")
    if match is None or match[1] != key or "\0" in key:
        raise BadInputError(
            f"sample {number} has the {KEY} {key!r}, which no archive can hold: its field would begin at the first dot "
            "of a file's name; rename it, or leave the field out with fields"
        )
    if key == before:
        raise BadInputError(
            f"samples {number - 1} and {number} have the same {KEY}, {key!r}, and would be one sample in an archive: "
            "make keys distinct, or leave the field out with fields"
        )
    if not names:
        raise BadInputError(
            f"all fields of sample {number} are null, and an archive has no sample without a file: leave it out"
        )
    if len(set(names)) < len(names):
        raise BadInputError(f"two fields of sample {number} would be the same file: {sorted(names)}; rename one")


def _member(name: str, content: bytes) -> list[bytes]:
    """Return header, content and padding. No time and no owner: equal samples give equal archives."""
    return [_header(name, len(content)), content, bytes(-len(content) % tarfile.BLOCKSIZE)]


def _header(name: str, size_bytes: int) -> bytes:
    """Return what `tarfile` writes before a file; short names and sizes are filled in here, ten times as fast."""
    if len(name) > _NAME_BYTES or not name.isascii() or size_bytes >= _MAX_OCTAL:
        info = tarfile.TarInfo(name)
        info.size = size_bytes
        return info.tobuf(tarfile.PAX_FORMAT)
    header = bytearray(_TEMPLATE)
    header[: len(name)] = name.encode()
    header[124:135] = b"%011o" % size_bytes
    header[148:156] = b" " * 8  # the checksum counts itself as blanks
    header[148:155] = b"%06o\0" % sum(header)
    return bytes(header)


def _file_name(name: str, field: pa.Field, value: bytes) -> str:
    last = name.rpartition(".")[2]
    if kind := field_kind(field):
        return name if _MEDIA_NAMES.get(last) == kind else f"{name}.{_media_suffix(kind, value)}"
    suffix = _suffix(field.type)
    if suffix == "bin":  # any suffix means bytes that does not mean something else
        return f"{name}.bin" if last in _MEANINGFUL else name
    known = {"cls": INTEGER_NAMES, "txt": TEXT_NAMES, "json": TEXT_NAMES, "npy": {"npy"}}[suffix]
    return name if last in known else f"{name}.{suffix}"


def _media_suffix(kind: str, value: bytes) -> str:
    codec = sniff(value)
    return codec.name if codec and codec.kind == kind else "bin"


def _suffix(kind: pa.DataType) -> str:
    types = pa.types
    if types.is_integer(kind) or types.is_boolean(kind):
        return "cls"
    if types.is_string(kind) or types.is_large_string(kind):
        return "txt"
    if is_bytes(kind):
        return "bin"
    if isinstance(kind, pa.FixedShapeTensorType) or types.is_floating(kind):
        return "npy"
    return "json"


def _has_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_nested(kind):
        return any(_has_bytes(kind.field(position).type) for position in range(kind.num_fields))
    return is_bytes(kind)


def _values(column: pa.Array, field: pa.Field) -> list[bytes | None]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if field.name == KEY:
        return column.to_pylist()  # type: ignore[no-any-return]
    if isinstance(column.type, pa.FixedShapeTensorType):
        return [None if array is None else _npy(array) for array in tensor_values(column)]
    write = _WRITERS[_suffix(column.type)]
    if getattr(column.type, "extension_name", None) == "arrow.json":  # text that is JSON already
        write = _WRITERS["txt"]
    dtype = numpy_dtype(column.type) if pa.types.is_floating(column.type) else None
    try:
        return [None if value is None else write(value, dtype) for value in column.to_pylist()]
    except (ValueError, OverflowError) as error:  # a time that Python lacks
        raise BadInputError(f"field {field.name!r} has a value that an archive cannot hold: {error}") from error


def _npy(array: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


_WRITERS: dict[str, Callable[[Any, Any], bytes]] = {
    "bin": lambda value, _: value,
    "cls": lambda value, _: str(int(value)).encode(),
    "json": lambda value, _: json.dumps(value, ensure_ascii=False, default=str).encode(),
    "npy": lambda value, dtype: _npy(np.array(value, dtype)),
    "txt": lambda value, _: value.encode(),
}
