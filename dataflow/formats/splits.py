"""Files for training and for testing in one folder, which nobody wants to be one dataset."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from connectors.objects import join_uri

if TYPE_CHECKING:
    from dataflow.formats.place import Place
    from dataflow.formats.protocol import Source

__all__ = ["mixed_splits"]

_SPLIT = re.compile(
    r"(?:.*/)?(train(?:ing)?|valid(?:ation)?|val|dev|test(?:ing)?|eval(?:uation)?)(?=[-_./])", re.IGNORECASE
)
# Others say themselves which files they have.
_FOUND_BY_NAME = frozenset({"csv", "folder", "jsonl", "megatron", "parquet", "text", "tfrecord", "webdataset"})
# Of more files so many are looked at.
_MAX_NAMES = 10_000


def mixed_splits(place: Place, source: Source) -> str | None:
    """Say that a dataset has the files of several splits, though nobody named them; None where it has not."""
    if place.names_files or source.format not in _FOUND_BY_NAME:
        return None
    names = source.index.shards.names
    chosen = names.take(np.linspace(0, len(names) - 1, min(len(names), _MAX_NAMES)).astype(np.int64))
    found = {match[1].lower(): match for name in chosen.to_pylist() if (match := _SPLIT.match(name))}
    training = found.get("train", found.get("training"))
    if training is None or len(found) < 2:
        return None
    is_folder = training.string[training.end()] == "/"
    return (
        f"{place.url} is read as one dataset, and has files of {', '.join(sorted(found))}; name those that you want, "
        f"as {join_uri(place.root, training[0])}{'' if is_folder else '*'}"
    )
