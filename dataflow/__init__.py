"""Dataflow keeps accelerators fed: datasets in stores, through a cache, into a drop-in DataLoader."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dataflow._siblings import check_siblings

check_siblings()

if TYPE_CHECKING:
    from dataflow.dataset import Batch, Dataset, open_dataset
    from dataflow.formats import audio_field, class_names, image_field, label_field, tensor_field, video_field
    from dataflow.formats.arrow import ShardWriter
    from dataflow.loaders import DataLoader, ElasticBatchSampler

__all__ = [
    "Batch",
    "DataLoader",
    "Dataset",
    "ElasticBatchSampler",
    "ShardWriter",
    "audio_field",
    "class_names",
    "image_field",
    "label_field",
    "open_dataset",
    "tensor_field",
    "video_field",
]

# Loaded when first used: `import dataflow` needs neither torch nor pyarrow, and `dataflow --help` answers at once.
_HOMES = {
    "Batch": "dataflow.dataset",
    "DataLoader": "dataflow.loaders",
    "Dataset": "dataflow.dataset",
    "ElasticBatchSampler": "dataflow.loaders",
    "ShardWriter": "dataflow.formats.arrow",
    "audio_field": "dataflow.formats",
    "class_names": "dataflow.formats",
    "image_field": "dataflow.formats",
    "label_field": "dataflow.formats",
    "open_dataset": "dataflow.dataset",
    "tensor_field": "dataflow.formats",
    "video_field": "dataflow.formats",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'dataflow' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
