"""What targets share whose datasets are a folder of like files and nothing else."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from connectors.errors import BadInputError

if TYPE_CHECKING:
    import pyarrow as pa

    from connectors.protocols import Buffer
    from dataflow.formats.destination import Destination
    from dataflow.formats.protocol import Part

__all__ = ["FileTarget"]


class FileTarget(ABC):
    """A target of which every shard is a dataset by itself; see `dataflow.formats.protocol.Target`.

    Such a format has no object that could make all shards appear at once. Other readers see shards as they are
    finished; ours refuse the folder as long as the records of an unfinished conversion lie in it.

    Attributes:
        format: Name of the format.
        suffix: How its files end.
    """

    format: ClassVar[str]
    suffix: ClassVar[str]
    manifest_name: ClassVar[str] = ""

    def shard_name(self, number: int) -> str:
        """Return the name of a shard."""
        return f"shard-{number:05d}{self.suffix}"

    def owns(self, name: str) -> bool:
        """Return whether an object of this name is part of a dataset of this format, finished or not."""
        return re.fullmatch(rf"shard-\d{{5,}}{re.escape(self.suffix)}(\.(lz4|zst))?(\.part)?", name) is not None

    @abstractmethod
    def stored_schema(self, schema: pa.Schema) -> pa.Schema:
        """Return what is stored for `schema`, or refuse it."""

    @abstractmethod
    def build(
        self, schema: pa.Schema, batches: Iterable[pa.RecordBatch], first_sample: int
    ) -> tuple[Part, list[Buffer]]:
        """Build one shard in memory."""

    def publish(
        self, destination: Destination, schema: pa.Schema, parts: Mapping[str, Part], lineage: dict[str, Any]
    ) -> None:
        """Write an empty shard where there is no sample, if the format has such a thing; else shards are the dataset.

        A file without a byte is none: nothing tells it from one that was cut off.
        """
        if parts:
            return
        _, chunks = self.build(schema, (), 0)
        if any(map(len, chunks)):
            destination.put(self.shard_name(0), chunks)


def refuse(field: pa.Field, format_name: str, hint: str) -> BadInputError:
    """Return the error for a field that a format cannot hold."""
    return BadInputError(f"{format_name} cannot hold field {field.name!r} of type {field.type}: {hint}")
