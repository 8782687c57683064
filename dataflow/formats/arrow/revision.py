"""Newer versions of a native dataset: the same shards and more behind them.

    dataset.json        the newest version          dataset-00001.json   an older one
    index.arrow         index of version 1          index-00002.arrow    of version 2
    shard-00000.arrow   of version 1                rev-00002/           what version 2 added: a dataset of its own

Nothing that a version names is ever changed or removed, so who has one open, or opens it by its number, goes on. What
is added is complete, manifest and all, before a version is made of it, in three puts: index, manifest of the old
version under its number, manifest of the new one. Killed between any two, the old version is what there is, and the
same puts are done again. Two that publish at the same time are told apart by the manifest they began with; the look at
it and the last put are two steps, so one writer at a time is the rule and this only the guard.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from connectors.errors import BadInputError, CorruptError, NotFoundError
from connectors.objects import join_uri
from dataflow.formats.arrow.census import add_statistics
from dataflow.formats.arrow.manifest import MANIFEST_NAME, IndexEntry, Manifest, content_digest, dataset_fingerprint
from dataflow.index import Blocks, Index, Parts, Shards, decode_index, encode_index

if TYPE_CHECKING:
    from dataflow.formats.destination import Destination

__all__ = ["addition_name", "manifest_name", "publish_revision", "read_manifest"]


def addition_name(revision: int) -> str:
    """Return the folder of what a version added."""
    return f"rev-{revision:05d}"


def manifest_name(revision: int) -> str:
    """Return what the manifest of a version is called once there is a newer one."""
    return f"dataset-{revision:05d}.json"


def read_manifest(destination: Destination, folder: str = "") -> Manifest | None:
    """Return the manifest of the dataset there; None where there is none."""
    name = f"{folder}/{MANIFEST_NAME}" if folder else MANIFEST_NAME
    try:
        data = bytes(destination.get(name))
    except NotFoundError:
        return None
    return Manifest.from_json(data, uri=join_uri(destination.url, name))


def publish_revision(destination: Destination, base: Manifest) -> Manifest:
    """Make a new version of a dataset and of what lies complete in the folder of the next one.

    Args:
        destination: Holds the dataset.
        base: Its newest version, as the addition was begun with.

    Returns:
        The manifest of the new version.

    Raises:
        BadInputError: The addition has another schema, or the dataset has changed since.
    """
    revision = base.revision + 1
    folder = addition_name(revision)
    added = read_manifest(destination, folder)
    if added is None:
        raise BadInputError(f"{destination.url}/{folder} holds no finished dataset to append", uri=destination.url)
    insist_on_schema(base, added.read_schema(uri=destination.url), destination.url)
    shards, blocks = _joined(_index(destination, base, ""), _index(destination, added, folder), folder)
    index = encode_index(shards, blocks)
    name = f"index-{revision:05d}.arrow"
    entry = IndexEntry(name=name, size_bytes=len(index), digest=content_digest(index))
    manifest = replace(
        base,
        revision=revision,
        num_samples=base.num_samples + added.num_samples,
        num_blocks=base.num_blocks + added.num_blocks,
        num_shards=base.num_shards + added.num_shards,
        size_bytes=base.size_bytes + added.size_bytes,
        index=entry,
        fingerprint=dataset_fingerprint(base.schema, entry.digest),
        statistics=add_statistics([part.statistics for part in (base, added) if part.num_samples]),
        release=version("tiered-dataflow"),
        lineage=base.lineage | {"appended": [*base.lineage.get("appended", []), added.lineage]},
    )
    destination.put(name, [index])
    destination.put(manifest_name(base.revision), [base.to_json()])
    if (now := read_manifest(destination)) is None or now.fingerprint != base.fingerprint:
        raise BadInputError(
            f"{destination.url} has been changed by somebody else while samples were appended; append again",
            uri=destination.url,
        )
    destination.put(MANIFEST_NAME, [manifest.to_json()])
    return manifest


def insist_on_schema(base: Manifest, schema: pa.Schema, url: str) -> None:
    """Refuse samples whose fields are not those of a dataset.

    Raises:
        BadInputError: Names the first field that differs.
    """
    own = base.read_schema(uri=url)
    if own.equals(schema, check_metadata=True):
        return
    for name in dict.fromkeys([*own.names, *schema.names]):
        if name not in schema.names or name not in own.names:
            where = "the samples to append have not" if name in own.names else "the dataset has not"
            raise BadInputError(f"{url} and the samples to append differ: {where} the field {name!r}", uri=url)
        here, there = own.field(name), schema.field(name)
        if not here.equals(there, check_metadata=True):
            raise BadInputError(
                f"{url} and the samples to append differ in field {name!r}: {_told(here)} and {_told(there)}", uri=url
            )
    raise BadInputError(f"{url} has the fields {own.names}, the samples to append {schema.names}", uri=url)


def _told(field: pa.Field) -> str:
    declared = {key.decode(): value.decode() for key, value in (field.metadata or {}).items()}
    return f"{field.type}{'' if field.nullable else ' not null'}{f' {declared}' if declared else ''}"


def _index(destination: Destination, manifest: Manifest, folder: str) -> Index:
    name = f"{folder}/{manifest.index.name}" if folder else manifest.index.name
    uri = join_uri(destination.url, name)
    data = memoryview(destination.get(name))
    if content_digest(data) != manifest.index.digest:
        raise CorruptError(f"{uri} is not the index that its manifest was written with", uri=uri)
    return decode_index(data, url=destination.url, fingerprint=manifest.fingerprint, uri=uri)


def _joined(one: Index, other: Index, folder: str) -> tuple[Shards, Blocks]:
    """Return the tables of two datasets behind each other; the shards of the second lie in `folder`."""
    names = [f"{folder}/{name}" for name in other.shards.names.to_pylist()]
    shards = Shards(
        pa.array([*one.shards.names.to_pylist(), *names], pa.string()),
        np.concatenate([one.shards.size_bytes, other.shards.size_bytes]),
        pa.array([*one.shards.versions.to_pylist(), *other.shards.versions.to_pylist()], pa.string()),
    )
    assert one.blocks.crc32c is not None
    assert other.blocks.crc32c is not None
    blocks = Blocks(
        np.concatenate([one.blocks.shard, other.blocks.shard + np.int32(len(one.shards))]),
        np.concatenate([one.blocks.offset, other.blocks.offset]),
        np.concatenate([one.blocks.length, other.blocks.length]),
        np.concatenate([one.blocks.first_sample, other.blocks.first_sample[1:] + one.num_samples]),
        np.concatenate([one.blocks.crc32c, other.blocks.crc32c]),
        _joined_parts(one.blocks.parts, other.blocks.parts),
    )
    return shards, blocks


def _joined_parts(one: Parts | None, other: Parts | None) -> Parts | None:
    """Return where fields lie; None where an older release wrote one of the two and did not say."""
    if one is None or other is None:
        return None
    return Parts(np.concatenate([one.end, other.end]), np.concatenate([one.crc32c, other.crc32c]))
