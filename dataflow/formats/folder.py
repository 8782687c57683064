"""Folders of images: `root/class/name.png`, every file one sample.

What counts, by the name alone (nothing is opened to build the index):
- A file is an image when its name ends in .jpg, .jpeg, .png, .webp or .bmp, in any case; other files are left out.
- The first folder below the root is the class, whatever lies deeper: `root/cat/2024/1.png` is a cat. Labels number the
  class names in sorted order. A folder without images is no class.
- Images beside class folders are an error: they would be samples without a label. Images and no folder at all is a
  dataset without labels.
- Samples are numbered in the order of their paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from connectors.errors import BadInputError
from connectors.objects import ObjectMeta, join_uri
from dataflow.formats.fields import image_field, label_field
from dataflow.formats.scan import listing_fingerprint, shard_table
from dataflow.index import Blocks, Index

if TYPE_CHECKING:
    from dataflow.formats.place import Place

__all__ = ["FolderFormat", "FolderSource"]

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


@dataclass(frozen=True, slots=True, eq=False)
class FolderSource:
    """One folder of images, opened; see `dataflow.formats.protocol.Source`.

    Attributes:
        schema: `image`, and `label` where there are classes.
        index: One block per file.
        labels: int64 per file; None where there are no classes.
    """

    schema: pa.Schema
    index: Index
    labels: npt.NDArray[np.int64] | None
    format: str = field(default="folder", init=False)

    @property
    def lineage(self) -> dict[str, Any]:
        """A folder says nothing about where it came from."""
        return {}

    def decode(self, block: int, data: memoryview) -> pa.RecordBatch:
        """Return the one sample of a file; the image is a view of `data`."""
        offsets = pa.py_buffer(np.array([0, len(data)], np.int32))
        arrays = [pa.Array.from_buffers(pa.binary(), 1, [None, offsets, pa.py_buffer(data)])]
        if self.labels is not None:
            arrays.append(pa.array(self.labels[block : block + 1]))
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)


class FolderFormat:
    """Image files in class folders."""

    name = "folder"

    def open(self, place: Place) -> FolderSource | None:
        """List a place and index its images; None where there are none.

        Raises:
            BadInputError: Images lie beside class folders, or one has 2 GiB or more.
            CorruptError: An image has no bytes.
        """
        images = place.files_named(IMAGE_SUFFIXES)
        if not images:
            return None
        url = place.root
        for meta in images:
            uri = place.uri(meta)
            if meta.size_bytes >= 1 << 31:
                raise BadInputError(
                    f"{uri} has {meta.size_bytes} bytes; images of 2 GiB and more are not supported", uri=uri
                )
        fields, labels = [image_field("image")], None
        classes = _classes(url, images)
        if classes:
            number = {name: label for label, name in enumerate(classes)}
            labels = np.array([number[meta.key.split("/", 1)[0]] for meta in images], np.int64)
            fields.append(label_field("label", classes))
        schema = pa.schema(fields)
        return FolderSource(schema, _index(url, images, schema), labels)


def _classes(url: str, images: Sequence[ObjectMeta]) -> list[str]:
    """Return the class names in the order of their labels; none for a flat folder."""
    loose = next((meta.key for meta in images if "/" not in meta.key), None)
    classes = sorted({meta.key.split("/", 1)[0] for meta in images if "/" in meta.key})
    if classes and loose is not None:
        raise BadInputError(
            f"{join_uri(url, loose)} lies beside class folders ({classes[0]}, ...), so it has no label; move it",
            uri=url,
        )
    return classes


def _index(url: str, images: Sequence[ObjectMeta], schema: pa.Schema) -> Index:
    """Build the index. The fingerprint covers schema, paths and sizes; version tokens differ between copies."""
    count, shards = len(images), shard_table(images)
    first_sample = np.arange(count + 1, dtype=np.int64)
    blocks = Blocks(np.arange(count, dtype=np.int32), np.zeros(count, np.int64), shards.size_bytes, first_sample)
    return Index(url, listing_fingerprint(shards, blocks, schema), shards, blocks)
