"""Sidecars: the index of files that have none, as one Arrow IPC file.

The file is that of `dataflow.index.storage` with one more column and with metadata:

    learned       list<int32>    of each shard, which of the texts in the metadata says what its scan learned
    metadata      kind, version, format, schema, facts, learned, fingerprint, digest

What a scan learns of one file (its fields, say) is remembered per file, so that an index is brought up to date by
scanning only the files whose version token changed. Of a folder of media files, whose names say all, it has no blocks
and is the listing. Most files teach the same, so the texts are few. The digest covers
all of it: a sidecar is exactly what was written, or it is not used.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from connectors.errors import CorruptError
from connectors.objects import ObjectMeta
from dataflow.formats.scan import listing_fingerprint, shard_table, table_digest
from dataflow.index import Blocks, Index, Shards, encode_index
from dataflow.index.storage import decode_tables, read_extra, read_metadata

__all__ = ["FileScan", "Sidecar", "known_parts", "make_sidecar"]

KIND = "dataflow-sidecar"
# To be raised when what scans find changes: a sidecar of another version is not used.
VERSION = 4


@dataclass(frozen=True, slots=True, eq=False)
class FileScan:
    """What one pass over one file found.

    Attributes:
        rows: int64, (number of blocks, 3): offset, length and number of samples of each block.
        learned: What the format needs to know of the file beside; equal for files that are alike.
    """

    rows: npt.NDArray[np.int64]
    learned: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Sidecar:
    """One index with what belongs to it. Immutable.

    Attributes:
        format: Name of the format.
        schema: Fields of a sample.
        facts: What else the format wants to remember of all files together.
        shards: The files, and their versions when they were scanned.
        blocks: The blocks inside them.
        learned: The texts.
        learned_of: int32 per shard: its text.
        fingerprint: Name of the dataset.
    """

    format: str
    schema: pa.Schema
    facts: dict[str, str]
    shards: Shards
    blocks: Blocks
    learned: list[str]
    learned_of: npt.NDArray[np.int32]
    fingerprint: str

    def index(self, url: str) -> Index:
        """Return the index, for the files below `url`."""
        return Index(url, self.fingerprint, self.shards, self.blocks)

    def listing(self) -> list[ObjectMeta]:
        """Return the files as they would be listed."""
        shards = self.shards
        rows = zip(shards.names.to_pylist(), shards.size_bytes.tolist(), shards.versions.to_pylist(), strict=True)
        return [ObjectMeta(*row) for row in rows]

    def part(self, shard: int) -> FileScan:
        """Return what the scan of one file found."""
        first, last = np.searchsorted(self.blocks.shard, [shard, shard + 1])
        counts = np.diff(self.blocks.first_sample[first : last + 1])
        rows = np.stack([self.blocks.offset[first:last], self.blocks.length[first:last], counts], axis=1)
        return FileScan(rows, self.learned[self.learned_of[shard]])

    def encode(self) -> bytes:
        """Return the file; equal sidecars give equal bytes."""
        metadata = {
            "kind": KIND,
            "version": str(VERSION),
            "format": self.format,
            "schema": base64.b64encode(self.schema.serialize().to_pybytes()).decode(),
            "facts": msgspec.json.encode(self.facts).decode(),
            "learned": msgspec.json.encode(self.learned).decode(),
            "fingerprint": self.fingerprint,
            "digest": self._digest(),
        }
        return encode_index(self.shards, self.blocks, metadata, {"learned": pa.array(self.learned_of, pa.int32())})

    @classmethod
    def decode(cls, data: bytes | memoryview, *, uri: str) -> Sidecar:
        """Read a sidecar; its vectors are views of `data`.

        Raises:
            CorruptError: Not a sidecar of this version, or not as it was written.
        """
        metadata = read_metadata(data, uri=uri)
        if (metadata.get("kind"), metadata.get("version")) != (KIND, str(VERSION)):
            raise CorruptError(
                f"{uri} is no index of files as this release writes it; run `dataflow index` again", uri=uri
            )
        shards, blocks = decode_tables(data, uri=uri)
        try:
            sidecar = cls(
                metadata["format"],
                pa.ipc.read_schema(pa.py_buffer(base64.b64decode(metadata["schema"]))),
                msgspec.json.decode(metadata["facts"], type=dict[str, str]),
                shards,
                blocks,
                msgspec.json.decode(metadata["learned"], type=list[str]),
                read_extra(data, "learned", uri=uri),
                metadata["fingerprint"],
            )
        except (KeyError, ValueError, pa.ArrowException, OSError, EOFError, msgspec.MsgspecError) as error:
            raise CorruptError(f"{uri} is no sidecar: {error}", uri=uri) from error
        if sidecar._digest() != metadata.get("digest"):
            raise CorruptError(f"{uri} does not match its own digest", uri=uri)
        return sidecar

    def _digest(self) -> str:
        texts = [self.format, self.fingerprint, *self.learned, *map(str, sorted(self.facts.items()))]
        return table_digest(texts, self.schema.serialize().to_pybytes(), self.shards, self.blocks, self.learned_of)


@dataclass(slots=True)
class _Texts:
    """Numbers texts in the order of their first appearance."""

    numbers: dict[str, int] = field(default_factory=dict)

    def number(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))


def make_sidecar(
    format_name: str,
    files: Sequence[ObjectMeta],
    parts: Sequence[FileScan],
    merged: tuple[pa.Schema, dict[str, str]],
) -> Sidecar:
    """Put the scans of all files together, in the order of the files.

    Args:
        format_name: Of the format.
        files: The files.
        parts: What was found in each.
        merged: What their texts mean together: schema and facts.
    """
    texts = _Texts()
    learned_of = np.array([texts.number(part.learned) for part in parts], np.int32)
    rows = np.concatenate([np.zeros((0, 3), np.int64), *(part.rows for part in parts)])
    blocks = Blocks(
        np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.rows) for part in parts]),
        rows[:, 0].copy(),
        rows[:, 1].copy(),
        np.concatenate([np.zeros(1, np.int64), np.cumsum(rows[:, 2])]),
    )
    shards = shard_table(files)
    schema, facts = merged
    fingerprint = listing_fingerprint(shards, blocks, schema)
    return Sidecar(format_name, schema, facts, shards, blocks, list(texts.numbers), learned_of, fingerprint)


def known_parts(sidecar: Sidecar | None, files: Sequence[ObjectMeta]) -> list[FileScan | None]:
    """Return what a sidecar knows of files whose name, size and version token are as they were; None for all others."""
    if sidecar is None:
        return [None] * len(files)
    shards = sidecar.shards
    tokens = zip(shards.names.to_pylist(), shards.size_bytes.tolist(), shards.versions.to_pylist(), strict=True)
    known = {token: shard for shard, token in enumerate(tokens)}
    found = (known.get((meta.key, meta.size_bytes, meta.version)) for meta in files)
    return [None if shard is None else sidecar.part(shard) for shard in found]
