"""Whether what was written is what was to be written: `convert --verify`.

While a shard is built, the values that go into it are digested, field by field. When the dataset is published, it is
opened as any reader would, from its store, and its values are digested again. Neither depends on how values are cut
into batches or blocks, so the two are equal or a value is not. A format may hold a field in another type (JSON has no
32-bit integers): it is compared in the type that went in, and where Arrow knows no way back it is not compared, which
the result says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pyarrow as pa
import xxhash

from connectors.errors import CorruptError
from dataflow.convert.digests import times_as_numbers
from dataflow.convert.reading import read_samples
from dataflow.dataset import open_dataset

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dataflow.convert.job import ShardJob, Work
    from dataflow.dataset import Dataset
    from dataflow.formats.protocol import Part

__all__ = ["StreamDigest", "reread"]


class StreamDigest:
    """Digests the values of each field of a stream of batches.

    Args:
        schema: The fields, in whose types values count.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._hashes: dict[str, dict[str, Any]] = {name: {} for name in schema.names}

    def through(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield batches and take their values into account."""
        for batch in batches:
            for field in self._schema:
                self.add(field.name, batch.column(field.name))
            yield batch

    def add(self, name: str, column: pa.Array) -> None:
        """Take the next values of a field into account.

        Raises:
            ArrowException: They cannot be had in the field's type.
        """
        _feed(self._hashes[name], "", _plain(column, self._schema.field(name).type))

    def result(self) -> dict[str, str]:
        """Return a digest by field."""
        return {
            name: xxhash.xxh3_128_hexdigest(
                ";".join(f"{level} {digest.hexdigest()}" for level, digest in sorted(hashes.items())).encode()
            )
            for name, hashes in self._hashes.items()
        }


def reread(work: Work, jobs: Sequence[ShardJob], parts: Sequence[Part]) -> tuple[int, tuple[str, ...]]:
    """Read a published conversion again; return how many samples were compared, and the fields that could not be.

    Shards that a run without `verify` finished are counted and not compared.

    Raises:
        CorruptError: It is not what was written; names shard and field.
    """
    assert work.schema is not None
    num_compared, skipped = 0, dict.fromkeys(work.schema.names, False)
    for place, choice in enumerate(work.choices):
        own = [
            (job, part) for job, part in zip(jobs, parts, strict=True) if job.choice == place and part["num_samples"]
        ]
        if not own:
            continue
        url = f"{work.url}/{choice.name}" if choice.name else work.url
        dataset = open_dataset(url, cache=None, format=work.target.format)
        try:
            if len(dataset) != (expected := sum(part["num_samples"] for _, part in own)):
                raise CorruptError(f"{url} has {len(dataset)} samples, {expected} were written", uri=url)
            first = 0
            for job, part in own:
                samples = np.arange(first, first + part["num_samples"])
                first += len(samples)
                if "stream" in part:
                    for name in _compare(dataset, job, work.schema, samples, part["stream"]):
                        skipped[name] = True
                    num_compared += len(samples)
        finally:
            dataset.reader.close()
    return num_compared, tuple(name for name, is_skipped in skipped.items() if is_skipped)


def _compare(dataset: Dataset, job: ShardJob, schema: pa.Schema, samples: Any, stream: dict[str, str]) -> list[str]:
    """Insist that samples have the digests `stream`; return the fields that cannot be compared."""
    names = {name: _stored_name(dataset, name) for name in schema.names}
    stored = [name for name in names.values() if name is not None]
    digest, skipped, count = StreamDigest(schema), [name for name, kept in names.items() if kept is None], 0
    for _, batch in read_samples(dataset, stored or dataset.schema.names[:1], samples):
        count += batch.num_rows
        for name, kept in names.items():
            if name in skipped:
                continue
            try:
                digest.add(name, batch.column(kept))
            except pa.ArrowException:
                skipped.append(name)
    if count != len(samples):
        raise CorruptError(f"{dataset.index.url} gives {count} samples of {job.name}, {len(samples)} were written")
    for name, found in digest.result().items():
        if name not in skipped and found != stream[name]:
            raise CorruptError(
                f"{dataset.index.url}: the values of field {name!r} in {job.name} are not those that were written",
                uri=dataset.index.url,
            )
    return skipped


def _stored_name(dataset: Dataset, name: str) -> str | None:
    """Return what a field is called in the dataset: archives add a suffix."""
    names = dataset.schema.names
    if name in names:
        return name
    found = [entry for entry in names if entry.rpartition(".")[0] == name]
    return found[0] if len(found) == 1 else None


def _plain(column: Any, kind: Any) -> Any:
    storage = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    return column if column.type.equals(storage) else column.cast(storage)


def _feed(hashes: dict[str, Any], level: str, column: Any) -> None:
    """Digest validity, lengths and values as three streams a level, which no cut into batches can change."""

    def update(what: str, data: Any) -> None:
        hashes.setdefault(level + what, xxhash.xxh3_128()).update(data)

    column = times_as_numbers(column)
    types, kind = pa.types, column.type
    update("valid", column.is_valid().to_numpy(zero_copy_only=False).astype(np.uint8).tobytes())
    if column.null_count:
        column = column.drop_null()
    if not len(column):
        return
    if types.is_boolean(kind):
        update("values", column.to_numpy(zero_copy_only=False).astype(np.uint8).tobytes())
    elif types.is_integer(kind) or types.is_floating(kind):
        update("values", np.ascontiguousarray(column.to_numpy()).tobytes())
    elif types.is_string(kind) or types.is_binary(kind) or types.is_large_string(kind) or types.is_large_binary(kind):
        wide = types.is_large_string(kind) or types.is_large_binary(kind)
        offsets = np.frombuffer(column.buffers()[1], np.int64 if wide else np.int32)
        offsets = offsets[column.offset : column.offset + len(column) + 1]
        update("lengths", np.diff(offsets).astype(np.int64).tobytes())
        if offsets[-1] > offsets[0]:
            update("values", memoryview(column.buffers()[2])[int(offsets[0]) : int(offsets[-1])])
    elif types.is_list(kind) or types.is_large_list(kind):
        update("lengths", column.value_lengths().to_numpy().astype(np.int64).tobytes())
        _feed(hashes, level + ".", column.flatten())
    elif types.is_fixed_size_list(kind):
        _feed(hashes, level + ".", column.flatten())
    elif types.is_struct(kind):
        for number, values in enumerate(column.flatten()):
            _feed(hashes, f"{level}{number}.", values)
    else:
        for value in column.to_pylist():
            encoded = msgspec.msgpack.encode(value, enc_hook=str)
            update("lengths", len(encoded).to_bytes(8, "little"))
            update("values", encoded)
