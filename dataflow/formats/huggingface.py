"""Datasets of the HuggingFace library on disk: Arrow IPC streams, and JSON beside them that says which and of what.

What `save_to_disk` writes is recognised by `state.json`, what lies in the library's cache by `dataset_info.json`. Every
record batch is a block (`record_batches`).
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from connectors.errors import BadInputError, CorruptError
from dataflow.formats.features import as_featured, with_features
from dataflow.formats.fields import storable_schema
from dataflow.formats.record_batches import read_batch, scan_batches
from dataflow.formats.scan import BlockTable, Scan, remembered

if TYPE_CHECKING:
    from connectors.objects import ObjectMeta
    from dataflow.formats.place import Place
    from dataflow.index import Index

__all__ = ["HuggingfaceFormat", "HuggingfaceSource"]

STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"


@dataclass(frozen=True, slots=True, eq=False)
class HuggingfaceSource:
    """One dataset of the library, opened; see `dataflow.formats.protocol.Source`.

    Attributes:
        schema: Fields of a sample.
        index: One block per record batch.
        stored: Schema of the files.
    """

    schema: pa.Schema
    index: Index
    stored: pa.Schema
    format: str = field(default="huggingface", init=False)

    def decode(self, block: int, data: memoryview) -> pa.RecordBatch:
        """Return the record batch that `data` is; without compression its columns are views of `data`."""
        ref = self.index.block_ref(block)
        batch = read_batch(data, self.stored, ref)
        pairs = zip(batch.columns, self.schema, strict=True)
        return pa.RecordBatch.from_arrays([as_featured(*pair, ref.uri) for pair in pairs], schema=self.schema)


class HuggingfaceFormat:
    """What `datasets.Dataset.save_to_disk` writes, and the library's cache."""

    name = "huggingface"

    def open(self, place: Place) -> HuggingfaceSource | None:
        """Read the state and scan the streams; None where there is no such dataset.

        Raises:
            CorruptError: A file is missing or damaged; names it and the offset.
            BadInputError: It is a dict of datasets, a cache of several splits, empty, has an index of its own, or
                dictionary-encoded fields.
        """
        found = {meta.key: meta for meta in place.files}
        if SPLITS in found:
            splits = _read_json(place, found[SPLITS]).get("splits")
            raise BadInputError(f"{place.url} holds the datasets {splits}; open one, such as {place.url}/train")
        files = self._files(place, found)
        if not files:
            return None
        index, scan = remembered(place, self.name, files, lambda: _scan(place, files))
        stored = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(scan.facts["stored"])))
        return HuggingfaceSource(scan.schema, index, stored)

    def _files(self, place: Place, found: dict[str, ObjectMeta]) -> list[ObjectMeta]:
        if STATE in found:
            state = _read_json(place, found[STATE])
            if "_data_files" not in state:
                return []
            if any(key.startswith("_indices") and state[key] for key in state):
                raise BadInputError(f"{place.url} has an index of its own; call flatten_indices before save_to_disk")
            try:
                names = [entry["filename"] for entry in state["_data_files"]]
            except (TypeError, KeyError) as error:
                uri = place.uri(found[STATE])
                raise CorruptError(f"{uri} does not name its files: {error}", uri=uri) from error
            if not names:
                raise BadInputError(
                    f"the dataset at {place.url} has no samples, and no file that would say which fields"
                )
            for name in names:
                if name not in found:
                    raise CorruptError(f"{place.url}/{name} is missing, {STATE} names it", uri=f"{place.url}/{name}")
            return [found[name] for name in names]
        if INFO not in found:
            return []
        # Beside the dataset lie results of `map` and the like, which the library calls cache-*.
        streams = place.files_named((".arrow",))
        streams = [meta for meta in streams if "/" not in meta.key and not meta.key.startswith("cache-")]
        splits = _splits_among(streams, _read_json(place, found[INFO]).get("splits"))
        if len(splits) > 1:
            raise BadInputError(
                f"{place.url} is a cache of the splits {splits}; call save_to_disk on one of them, and open that"
            )
        return streams


def _splits_among(streams: Sequence[ObjectMeta], splits: Any) -> list[str]:
    """Return the splits, out of those that the description of a cache names, of which there are streams."""
    ends = {name: re.compile(rf"-{re.escape(name)}(-\d+-of-\d+)?\.arrow\Z") for name in splits or ()}
    return [name for name, end in ends.items() if any(end.search(meta.key) for meta in streams)]


def _read_json(place: Place, meta: ObjectMeta) -> dict[str, Any]:
    uri = place.uri(meta)
    try:
        content = json.loads(bytes(place.reader.read_object(uri).data))
    except ValueError as error:
        raise CorruptError(f"{uri} is not JSON: {error}", uri=uri) from error
    return content if isinstance(content, dict) else {}


def _scan(place: Place, files: Sequence[ObjectMeta]) -> Scan:
    table, stored = BlockTable(), None
    for shard, meta in enumerate(files):
        found, _ = scan_batches(place, meta, table, shard)
        if stored is not None and not found.equals(stored):
            uri = place.uri(meta)
            raise BadInputError(f"{uri} has another schema than the files before it", uri=uri)
        stored = stored or found
    assert stored is not None
    encoded = base64.b64encode(stored.serialize().to_pybytes()).decode()
    return Scan(table.finish(), storable_schema(with_features(stored)), {"stored": encoded})
