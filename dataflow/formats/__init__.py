"""Formats: each turns a URL into an index and a block's bytes into a record batch."""

from dataflow.formats.fields import (
    audio_field,
    class_names,
    field_kind,
    image_field,
    label_field,
    tensor_field,
    video_field,
)
from dataflow.formats.protocol import Format, Source
from dataflow.formats.registry import FORMATS, formats_called, open_source

__all__ = [
    "FORMATS",
    "Format",
    "Source",
    "audio_field",
    "class_names",
    "field_kind",
    "formats_called",
    "image_field",
    "label_field",
    "open_source",
    "tensor_field",
    "video_field",
]
