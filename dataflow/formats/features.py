"""What the HuggingFace library says of columns, in the metadata of Arrow and Parquet files.

Images, audio and video (structs of bytes and path) become such fields, class labels keep their names; other features
are what Arrow holds.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from connectors.errors import BadInputError
from dataflow.formats.fields import field_kind, label_field, media_field

__all__ = ["as_featured", "features_of", "with_features"]

_MEDIA = {"Audio": "audio", "Image": "image", "Video": "video"}


def features_of(stored: pa.Schema) -> dict[str, Any]:
    """Return the features by name; none where the library has not written the file."""
    try:
        features = json.loads((stored.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def with_features(stored: pa.Schema) -> pa.Schema:
    """Return the fields of a sample: what the library says of features goes into their metadata."""
    features = features_of(stored)
    return pa.schema([_field(entry, features.get(entry.name)) for entry in stored])


def as_featured(column: pa.Array, entry: pa.Field, uri: str) -> pa.Array:
    """Return a column of a file as the field that `with_features` made of it, or that is stored for that.

    Raises:
        BadInputError: Media are not in the file; names it.
    """
    if field_kind(entry) is None or not pa.types.is_struct(column.type):
        return column if column.type == entry.type else column.cast(entry.type)
    # A media file: its bytes, without the bytes below a missing struct.
    content = column.flatten()[column.type.get_field_index("bytes")]
    if content.null_count > column.null_count:
        raise BadInputError(
            f"field {entry.name!r} of {uri} has media that lie in files elsewhere; embed them before saving", uri=uri
        )
    return content.cast(entry.type)


def _field(entry: pa.Field, feature: Any) -> pa.Field:
    kind = feature.get("_type") if isinstance(feature, dict) else None
    if kind in _MEDIA and pa.types.is_struct(entry.type) and entry.type.get_field_index("bytes") >= 0:
        return media_field(entry.name, _MEDIA[kind]).with_nullable(True)
    if kind == "ClassLabel" and entry.type == pa.int64() and feature.get("names"):
        return label_field(entry.name, feature["names"]).with_nullable(entry.nullable)
    return entry.remove_metadata()
