"""What a format is to the rest: something that finds an index and turns a block's bytes into a record batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import pyarrow as pa

    from cache.access import BlockReader
    from dataflow.index import Index

__all__ = ["Format", "Source"]


class Source(Protocol):
    """One dataset, opened. Immutable and picklable; holds no descriptor and no connection.

    Attributes:
        format: Name of the format, as `dataflow formats` lists it.
        schema: Fields of a sample.
        index: Where the samples lie.
        lineage: Where the data came from, as far as the dataset says; JSON types.
    """

    @property
    def format(self) -> str: ...  # noqa: D102
    @property
    def schema(self) -> pa.Schema: ...  # noqa: D102
    @property
    def index(self) -> Index: ...  # noqa: D102
    @property
    def lineage(self) -> dict[str, object]: ...  # noqa: D102

    def decode(self, block: int, data: memoryview) -> pa.RecordBatch:
        """Return the samples of one block: `schema`, in order, views of `data` where the format allows it.

        Pure and thread-safe.

        Raises:
            CorruptError: The bytes are not such a block; names shard and offset.
        """
        ...


class Format(Protocol):
    """How to find and open datasets of one format."""

    name: str

    def open(self, url: str, reader: BlockReader) -> Source | None:
        """Open the dataset at `url`, or return None where there is none of this format.

        Raises:
            DataError: There is one, and it cannot be used.
        """
        ...
