"""Indexes of formats that have none: found by one pass over the files, then remembered.

A scan's result is kept as an Arrow IPC file in the user's cache directory, under a name that is a digest of everything
it depends on: format, place, and name, size and version token of every file. A file that changed has another token, so
a stale result is never found, let alone trusted. Nor is a damaged one: it holds a digest of its content. What cannot be
kept (a full or read-only disk) is scanned again.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from connectors.errors import BadInputError, CorruptError
from dataflow.formats.place import BadRange
from dataflow.index import Blocks, Index, Shards, encode_index, kept
from dataflow.index.storage import decode_tables, read_metadata

if TYPE_CHECKING:
    from connectors.objects import ObjectMeta
    from dataflow.formats.place import Place

__all__ = [
    "BLOCK_BYTES",
    "BlockTable",
    "Scan",
    "cut_blocks",
    "listing_fingerprint",
    "remembered",
    "shard_table",
    "table_digest",
]

logger = logging.getLogger(__name__)

# What a block of a scanned format aims at: the same as for native shards.
BLOCK_BYTES = 1 << 20
# Part of the name of a kept scan: to be raised when what scans find changes.
SCAN_VERSION = 6


class BlockTable:
    """Collects the blocks of a scan, in the order of their samples."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, int, int]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, shard: int, offset: int, length: int, num_samples: int) -> None:
        """Add one block."""
        self._rows.append((shard, offset, length, num_samples))

    def finish(self) -> Blocks:
        """Return the table."""
        columns = np.array(self._rows, np.int64).reshape(-1, 4).T
        first_sample = np.concatenate([np.zeros(1, np.int64), np.cumsum(columns[3])])
        return Blocks(columns[0].astype(np.int32), columns[1].copy(), columns[2].copy(), first_sample)


@dataclass(frozen=True, slots=True)
class Scan:
    """What a pass over the files found.

    Attributes:
        blocks: The blocks; `shard` numbers the files.
        schema: Fields of a sample.
        facts: What else the format wants to remember.
    """

    blocks: Blocks
    schema: pa.Schema
    facts: dict[str, str] = field(default_factory=dict)


def remembered(
    place: Place, format_name: str, files: Sequence[ObjectMeta], scan: Callable[[], Scan]
) -> tuple[Index, Scan]:
    """Return the index over `files`: as it was found before, or by calling `scan` now.

    Raises:
        DataError: As `scan` does.
    """
    shards = shard_table(files)
    name = _name(place.root, format_name + ("\0lenient" if place.lenient else ""), shards)
    found = _load(name)
    if found is None:
        known = len(place.bad or ())
        found = scan()
        if place.bad is not None:
            found.facts["bad"] = msgspec.json.encode(place.bad[known:]).decode()
        _keep(name, shards, found)
    elif place.bad is not None:
        place.bad += msgspec.json.decode(found.facts["bad"], type=list[BadRange])
    index = Index(place.root, listing_fingerprint(shards, found.blocks, found.schema), shards, found.blocks)
    index.check()
    return index, found


def shard_table(files: Sequence[ObjectMeta]) -> Shards:
    """Return files as shards; their version tokens are the store's own.

    Raises:
        BadInputError: The name of a file is not UTF-8.
    """
    try:
        names = pa.array([meta.key for meta in files], pa.string())
    except UnicodeEncodeError as error:
        raise BadInputError(
            f"the name of the file {error.object!r} is not UTF-8, as an index needs it: rename it"
        ) from error
    return Shards(
        names,
        np.array([meta.size_bytes for meta in files], np.int64),
        pa.array([meta.version for meta in files], pa.string()),
    )


def listing_fingerprint(shards: Shards, blocks: Blocks, schema: pa.Schema) -> str:
    """Name a dataset by schema, names and sizes of its files, and block layout; tokens differ between equal copies."""
    digest = xxhash.xxh3_128(schema.serialize().to_pybytes())
    digest.update("\0".join(shards.names.to_pylist()).encode())
    for vector in (shards.size_bytes, blocks.shard, blocks.offset, blocks.length, blocks.first_sample):
        digest.update(np.ascontiguousarray(vector).data)
    return digest.hexdigest()


def table_digest(
    texts: Iterable[str], schema: bytes, shards: Shards, blocks: Blocks, *more: npt.NDArray[np.int32]
) -> str:
    """Return a digest of all that a kept index holds."""
    digest = xxhash.xxh3_128("\0".join(texts).encode())
    digest.update(schema)
    for names in (shards.names, shards.versions):
        digest.update("\0".join(names.to_pylist()).encode())
    vectors = (shards.size_bytes, blocks.shard, blocks.offset, blocks.length, blocks.first_sample)
    for vector in (*vectors, *more):
        digest.update(np.ascontiguousarray(vector).data)
    return digest.hexdigest()


def _name(root: str, format_name: str, shards: Shards) -> str:
    digest = xxhash.xxh3_128(f"{SCAN_VERSION}\0{format_name}\0{root}".encode())
    digest.update("\0".join([*shards.names.to_pylist(), *shards.versions.to_pylist()]).encode())
    digest.update(np.ascontiguousarray(shards.size_bytes).data)
    return f"{digest.hexdigest()}.arrow"


def _load(name: str) -> Scan | None:
    data = kept.load(name)
    if data is None:
        return None
    try:
        facts = read_metadata(data, uri=name)
        digest, schema = facts.pop("digest"), base64.b64decode(facts.pop("schema"))
        shards, blocks = decode_tables(data, uri=name)
    except (CorruptError, KeyError, ValueError) as error:
        reason: object = error
    else:
        if digest == _digest(facts, schema, shards, blocks):
            return Scan(blocks, pa.ipc.read_schema(pa.py_buffer(schema)), facts)
        reason = "it does not match its own digest"
    logger.warning("the kept scan %s is damaged and is made again: %s", name, reason)
    return None


def _keep(name: str, shards: Shards, scan: Scan) -> None:
    schema = scan.schema.serialize().to_pybytes()
    own = {"schema": base64.b64encode(schema).decode(), "digest": _digest(scan.facts, schema, shards, scan.blocks)}
    kept.keep(name, encode_index(shards, scan.blocks, scan.facts | own))


def _digest(facts: dict[str, str], schema: bytes, shards: Shards, blocks: Blocks) -> str:
    return table_digest(map(str, sorted(facts.items())), schema, shards, blocks)


def cut_blocks(ends: npt.NDArray[np.int64], size_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Cut records that follow each other into blocks of at least `size_bytes`, but for the last.

    Args:
        ends: Where each record ends; the first begins at 0.
        size_bytes: When a block is full.

    Yields:
        Offset, length (at least 1) and number of records of each block.
    """
    first, offset, total = 0, 0, int(ends[-1]) if len(ends) else 0
    while offset < total:
        last = int(np.searchsorted(ends, min(offset + size_bytes, total))) + 1
        if ends[last - 1] == total:
            last = len(ends)  # with the records of no bytes that follow
        end = int(ends[last - 1])
        yield offset, end - offset, last - first
        first, offset = last, end
