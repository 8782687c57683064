"""`dataset.json`: what a native dataset is. Written last and atomically, so a dataset without it does not exist yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import pyarrow as pa
import xxhash

from connectors.errors import BadInputError, CorruptError
from dataflow.formats.arrow.census import FieldStatistics
from dataflow.formats.fields import field_kind

__all__ = ["FORMAT", "INDEX_NAME", "MANIFEST_NAME", "IndexEntry", "Manifest", "content_digest", "dataset_fingerprint"]

FORMAT = "dataflow-arrow"
VERSION = 1
MANIFEST_NAME = "dataset.json"
INDEX_NAME = "index.arrow"


def content_digest(data: bytes | memoryview | pa.Buffer) -> str:
    """Return the xxh3-128 of some bytes, in hexadecimal. It names content; it does not guard against an adversary."""
    return xxhash.xxh3_128_hexdigest(data)


def dataset_fingerprint(schema: bytes, index_digest: str) -> str:
    """Return the name of a dataset: of its schema, and by the index of every shard's content and of the block layout.

    Neither the place, nor the time, nor the lineage enters, so equal shards have equal fingerprints anywhere.
    """
    return content_digest(len(schema).to_bytes(8, "little") + schema + index_digest.encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexEntry:
    """The index file that belongs to a manifest."""

    name: str
    size_bytes: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One version of a native dataset.

    Attributes:
        schema: The Arrow schema as an encapsulated IPC message; JSON carries it as base64.
        fields: The same for human readers: name, type and kind of every field.
        num_samples: Samples in all shards.
        num_blocks: Record batches in all shards.
        num_shards: Shards.
        size_bytes: Bytes of all shards.
        index: The index file.
        fingerprint: Name of content, schema and block layout (`dataset_fingerprint`).
        compression: Compression of the shards' buffers: `none`, `lz4` or `zstd`.
        statistics: Of every field, counted while it was written; empty where an older release wrote some of it.
        revision: Its number among the versions of the dataset, from 1; appending makes the next.
        release: The release of tiered-dataflow that wrote it.
        lineage: Where the data came from; JSON types, never credentials.
    """

    schema: bytes
    fields: list[dict[str, str]]
    num_samples: int
    num_blocks: int
    num_shards: int
    size_bytes: int
    index: IndexEntry
    fingerprint: str
    compression: str
    statistics: dict[str, FieldStatistics] = field(default_factory=dict)
    revision: int = 1
    release: str = ""
    lineage: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """Return the manifest as indented JSON; equal manifests give equal bytes."""
        content = {"format": FORMAT, "version": VERSION} | msgspec.to_builtins(self)
        return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"

    @classmethod
    def from_json(cls, data: bytes, *, uri: str) -> Manifest:
        """Read a manifest.

        Raises:
            CorruptError: Not a manifest of ours, or one that contradicts itself.
            BadInputError: Written by a newer release.
        """
        try:
            content = msgspec.json.decode(data, type=dict[str, Any])
            if content.pop("format", None) != FORMAT:
                raise CorruptError(
                    f"{uri} is not the manifest of a native dataset: its format is not {FORMAT!r}", uri=uri
                )
            version = content.pop("version", None)
            if not isinstance(version, int) or version < 1:
                raise CorruptError(f"{uri} states no version", uri=uri)
            if version > VERSION:
                raise BadInputError(
                    f"{uri} has version {version} and this release reads up to {VERSION}; upgrade tiered-dataflow",
                    uri=uri,
                )
            manifest = msgspec.convert(content, cls)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise CorruptError(f"{uri} is not a manifest: {error}", uri=uri) from error
        if "/" in manifest.index.name:
            raise CorruptError(f"{uri} names an index outside of the dataset: {manifest.index.name}", uri=uri)
        if dataset_fingerprint(manifest.schema, manifest.index.digest) != manifest.fingerprint:
            raise CorruptError(
                f"{uri} contradicts itself: fingerprint, schema and index do not belong together", uri=uri
            )
        return manifest

    def read_schema(self, *, uri: str) -> pa.Schema:
        """Return the Arrow schema."""
        try:
            return pa.ipc.read_schema(pa.py_buffer(self.schema))
        except (pa.ArrowException, OSError, EOFError) as error:
            raise CorruptError(f"{uri} carries no readable schema: {error}", uri=uri) from error


def describe_fields(schema: pa.Schema) -> list[dict[str, str]]:
    """Return name and type of every field, and its kind where it has one, for human readers."""
    rows = []
    for entry in schema:
        row = {"name": entry.name, "type": str(entry.type)}
        kind = field_kind(entry)
        rows.append(row | {"kind": kind} if kind else row)
    return rows


def encode_schema(schema: pa.Schema) -> bytes:
    """Return a schema as an encapsulated IPC message."""
    return schema.serialize().to_pybytes()  # type: ignore[no-any-return]
