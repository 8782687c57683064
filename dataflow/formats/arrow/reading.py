"""Opening native datasets: manifest, index, and one record batch per block."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from connectors.errors import CorruptError, NotFoundError
from connectors.objects import join_uri
from dataflow.formats.arrow.cropping import can_crop_tensor, crop_tensor
from dataflow.formats.arrow.manifest import MANIFEST_NAME, Manifest, content_digest
from dataflow.formats.arrow.revision import manifest_name
from dataflow.formats.arrow.selecting import select_fields
from dataflow.index import Index, decode_index
from dataflow.index.fetch import fetch_index

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dataflow.formats.pieces import CropPlan
    from dataflow.formats.place import Place
    from dataflow.formats.protocol import Source

__all__ = ["ArrowFormat", "ArrowSource"]


@dataclass(frozen=True, slots=True, eq=False)
class ArrowSource:
    """One native dataset, opened; see `dataflow.formats.protocol.Source`.

    Attributes:
        schema: Fields of a sample.
        index: Where the samples lie.
        manifest: What the dataset says of itself.
    """

    schema: pa.Schema
    index: Index
    manifest: Manifest
    format: str = field(default="arrow", init=False)

    @property
    def lineage(self) -> dict[str, Any]:
        """Where the data came from."""
        return self.manifest.lineage

    def decode(self, block: int, data: memoryview) -> pa.RecordBatch:
        """Return the record batch that `data` is; without compression its columns are views of `data`."""
        try:
            batch = pa.ipc.read_record_batch(pa.py_buffer(data), self.schema)
            batch.validate()
        except (pa.ArrowException, OSError, EOFError) as error:
            raise self._corrupt(block, str(error)) from error
        expected = self.index.blocks.num_samples_in(block)
        if batch.num_rows != expected:
            raise self._corrupt(block, f"it has {batch.num_rows} samples, the index says {expected}")
        return batch

    def select(self, names: Sequence[str]) -> Source:
        """Return a source that reads some of the fields."""
        return select_fields(self, names)

    def can_crop(self, name: str, shape: Sequence[int]) -> bool:
        """Say whether the rows of such boxes can be read alone: of large tensors without compression."""
        return can_crop_tensor(self, name, shape)

    def crop(
        self, name: str, sample: int, start: Sequence[int], shape: Sequence[int], version_of: Callable[[int], str]
    ) -> CropPlan:
        """Return how a box of a tensor is read: by its rows."""
        return crop_tensor(self, name, sample, start, shape, version_of)

    def _corrupt(self, block: int, reason: str) -> CorruptError:
        ref = self.index.block_ref(block)
        return CorruptError(
            f"block {block} ({ref.length} bytes at offset {ref.offset} of {ref.uri}) is not a record batch of this "
            f"dataset: {reason}",
            uri=ref.uri,
        )


def _older(place: Place, newest: Manifest) -> tuple[str, Manifest]:
    assert place.revision is not None
    uri = join_uri(place.url, manifest_name(place.revision))
    try:
        return uri, Manifest.from_json(place.reader.read_object(uri).data, uri=uri)
    except NotFoundError:
        raise NotFoundError(
            f"{place.url} has no version {place.revision}; its newest is {newest.revision}", uri=place.url
        ) from None


class ArrowFormat:
    """Native datasets: Arrow IPC shards, `index.arrow`, `dataset.json`."""

    name = "arrow"

    def open(self, place: Place) -> ArrowSource | None:
        """Open the dataset at a place, or return None where there is no `dataset.json`.

        Raises:
            CorruptError: Manifest or index are damaged or do not belong together.
            BadInputError: Written by a newer release.
            NotFoundError: The dataset has no such version.
        """
        url, reader = place.url, place.reader
        manifest_uri = join_uri(url, MANIFEST_NAME)
        try:
            data = reader.read_object(manifest_uri).data
        except NotFoundError:
            return None
        manifest = Manifest.from_json(data, uri=manifest_uri)
        if place.revision not in (None, manifest.revision):
            manifest_uri, manifest = _older(place, manifest)
        index_uri = join_uri(url, manifest.index.name)

        def decode(content: memoryview) -> Index:
            if len(content) != manifest.index.size_bytes or content_digest(content) != manifest.index.digest:
                raise CorruptError(
                    f"{index_uri} ({len(content)} bytes) is not the index that {manifest_uri} was written with "
                    f"({manifest.index.size_bytes} bytes): damaged, or from another version of the dataset",
                    uri=index_uri,
                )
            return decode_index(content, url=url, fingerprint=manifest.fingerprint, uri=index_uri)

        try:
            index = fetch_index(reader, index_uri, decode, digest=manifest.index.digest)
        except NotFoundError as error:
            raise CorruptError(f"{manifest_uri} exists but its index {index_uri} is missing", uri=index_uri) from error
        if index.num_samples != manifest.num_samples:
            raise CorruptError(
                f"{manifest_uri} counts {manifest.num_samples} samples, its index {index.num_samples}", uri=manifest_uri
            )
        return ArrowSource(manifest.read_schema(uri=manifest_uri), index, manifest)
