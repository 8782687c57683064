"""From finished shards to a dataset: index, then manifest. Whoever is killed in between leaves no dataset behind."""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dataflow.formats.arrow.census import add_statistics
from dataflow.formats.arrow.manifest import (
    INDEX_NAME,
    MANIFEST_NAME,
    IndexEntry,
    Manifest,
    content_digest,
    dataset_fingerprint,
    describe_fields,
    encode_schema,
)
from dataflow.index import Blocks, Parts, Shards, encode_index

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dataflow.formats.arrow.shard import Shard
    from dataflow.formats.destination import Destination

__all__ = ["owns", "publish", "shard_name"]

# Also of newer versions, whose additions have a folder each, and of conversions that broke off there.
_OWN = re.compile(
    r"(rev-\d{5,}/)?(shard-\d{5,}\.arrow(\.part)?|dataset\.json|index\.arrow|survey-[a-z]+-\d{5,}(\.digests|\.part))"
    r"|dataset-\d{5,}\.json|index-\d{5,}\.arrow"
)


def shard_name(number: int) -> str:
    """Return the name of a shard."""
    return f"shard-{number:05d}.arrow"


def owns(name: str) -> bool:
    """Return whether an object of this name is part of a native dataset, finished or not."""
    return _OWN.fullmatch(name) is not None


def publish(
    destination: Destination,
    schema: pa.Schema,
    shards: Mapping[str, Shard],
    *,
    compression: str,
    lineage: dict[str, Any],
) -> Manifest:
    """Write `index.arrow`, then `dataset.json`, which makes the dataset exist.

    Args:
        destination: Holds the shards already.
        schema: Schema of all shards.
        shards: By name, in the order of their samples.
        compression: What the shards were built with.
        lineage: Where the data came from; JSON types.
    """
    tables = index_tables(shards)
    index = encode_index(*tables)
    destination.put(INDEX_NAME, [index])
    encoded, entry = (
        encode_schema(schema),
        IndexEntry(name=INDEX_NAME, size_bytes=len(index), digest=content_digest(index)),
    )
    manifest = Manifest(
        schema=encoded,
        fields=describe_fields(schema),
        num_samples=int(tables[1].first_sample[-1]),
        num_blocks=len(tables[1]),
        num_shards=len(shards),
        size_bytes=sum(shard.size_bytes for shard in shards.values()),
        index=entry,
        fingerprint=dataset_fingerprint(encoded, entry.digest),
        compression=compression,
        statistics=add_statistics(shard.statistics for shard in shards.values()),
        release=version("tiered-dataflow"),
        lineage=lineage,
    )
    destination.put(MANIFEST_NAME, [manifest.to_json()])
    return manifest


def index_tables(named: Mapping[str, Shard]) -> tuple[Shards, Blocks]:
    """Return the tables of an index over shards."""
    shards = list(named.values())
    num_blocks = [len(shard.offset) for shard in shards]
    num_samples = _join([shard.num_samples for shard in shards], np.int64)
    table = Shards(
        pa.array(list(named), pa.string()),
        np.array([shard.size_bytes for shard in shards], np.int64),
        pa.array([shard.digest for shard in shards], pa.string()),
    )
    blocks = Blocks(
        shard=np.repeat(np.arange(len(shards), dtype=np.int32), num_blocks),
        offset=_join([shard.offset for shard in shards], np.int64),
        length=_join([shard.length for shard in shards], np.int64),
        first_sample=np.concatenate([np.zeros(1, np.int64), np.cumsum(num_samples)]),
        crc32c=_join([shard.crc32c for shard in shards], np.uint32),
        parts=_parts(shards),
    )
    return table, blocks


def _parts(shards: Sequence[Shard]) -> Parts | None:
    """Return where the fields lie; None where that is not known of every block."""
    num_blocks = sum(len(shard.offset) for shard in shards)
    end = _join([shard.part_end for shard in shards], np.int64)
    if not len(end) or len(end) % num_blocks or any(not shard.part_end for shard in shards):
        return None
    crc32c = _join([shard.part_crc32c for shard in shards], np.uint32)
    return Parts(end.reshape(num_blocks, -1), crc32c.reshape(num_blocks, -1))


def _join(lists: Sequence[Sequence[int]], dtype: type[np.generic]) -> np.ndarray[Any, Any]:
    return np.concatenate([np.zeros(0, dtype), *(np.array(values, dtype) for values in lists)])
