"""The native format: Arrow IPC shards, an index of their record batches, and a manifest that is written last."""

from dataflow.formats.arrow.reading import ArrowFormat, ArrowSource
from dataflow.formats.arrow.writing import ShardWriter

__all__ = ["ArrowFormat", "ArrowSource", "ShardWriter"]
