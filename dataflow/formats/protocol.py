"""What a format is to the rest: something that finds an index and turns a block's bytes into a record batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import pyarrow as pa

    from connectors.protocols import Buffer
    from dataflow.formats.destination import Destination
    from dataflow.formats.place import Place
    from dataflow.index import Index

__all__ = ["ConfigurableFormat", "Format", "GridTarget", "Part", "Source", "Target", "TracedSource"]

# What a target keeps of one shard until the dataset is published; JSON types.
Part: TypeAlias = dict[str, Any]


class Source(Protocol):
    """One dataset, opened. Immutable and picklable; holds no descriptor and no connection.

    Attributes:
        format: Name of the format, as `dataflow formats` lists it.
        schema: Fields of a sample.
        index: Where the samples lie.
    """

    @property
    def format(self) -> str: ...  # noqa: D102
    @property
    def schema(self) -> pa.Schema: ...  # noqa: D102
    @property
    def index(self) -> Index: ...  # noqa: D102

    def decode(self, block: int, data: memoryview) -> pa.RecordBatch:
        """Return the samples of one block: `schema`, in order, views of `data` where the format allows it.

        Pure and thread-safe.

        Raises:
            CorruptError: The bytes are not such a block; names shard and offset.
        """
        ...


@runtime_checkable
class TracedSource(Source, Protocol):
    """A source that says where its data came from."""

    @property
    def lineage(self) -> dict[str, Any]:
        """Where the data came from, as far as the dataset says; JSON types."""
        ...


class Format(Protocol):
    """How to find and open datasets of one format."""

    @property
    def name(self) -> str:
        """What the format is called in `open_dataset(format=)` and on the command line."""
        ...

    def open(self, place: Place) -> Source | None:
        """Open the dataset at a place, or return None where there is none of this format.

        Raises:
            DataError: There is one, and it cannot be used.
        """
        ...


@runtime_checkable
class ConfigurableFormat(Format, Protocol):
    """A format with settings of its own, written behind its name: `zarr:window=16,stride=8`."""

    def with_options(self, options: Mapping[str, str]) -> Format:
        """Return the format with these settings.

        Raises:
            BadInputError: There is no such setting, or it has another value.
        """
        ...


class Target(Protocol):
    """A format that can be written, with its settings. Immutable and picklable; equal input gives equal bytes."""

    @property
    def format(self) -> str:
        """Name of the format."""
        ...

    @property
    def manifest_name(self) -> str:
        """The object that makes the dataset exist, written last; empty where the format has none."""
        ...

    def shard_name(self, number: int) -> str:
        """Return the name of a shard."""
        ...

    def owns(self, name: str) -> bool:
        """Return whether an object of this name is part of a dataset of this format, finished or not."""
        ...

    def stored_schema(self, schema: pa.Schema) -> pa.Schema:
        """Return what is stored for `schema`.

        Raises:
            BadInputError: The format cannot hold it; names the field.
        """
        ...

    def build(
        self, schema: pa.Schema, batches: Iterable[pa.RecordBatch], first_sample: int
    ) -> tuple[Part, list[Buffer]]:
        """Build one shard in memory.

        Args:
            schema: What `stored_schema` returned; the batches have these fields, in this order.
            batches: The samples of the shard.
            first_sample: Number of the first in the whole dataset.

        Returns:
            What is remembered of the shard, `size_bytes` included, and its bytes.
        """
        ...

    def publish(
        self, destination: Destination, schema: pa.Schema, parts: Mapping[str, Part], lineage: dict[str, Any]
    ) -> None:
        """Make a dataset of the shards, all of which are in place, by name and in order; atomic."""
        ...


@runtime_checkable
class GridTarget(Target, Protocol):
    """A target all of whose shards but the last have equally many samples, in several objects each."""

    @property
    def shard_rows(self) -> int:
        """Samples of a shard; only known of what `fit` returned."""
        ...

    def fit(self, schema: pa.Schema, *, num_samples: int, sample_bytes: float, shard_size_bytes: int) -> GridTarget:
        """Return the target for a dataset; a function of its arguments alone.

        Args:
            schema: What `stored_schema` returned.
            num_samples: In the dataset, or the largest of several.
            sample_bytes: Of a sample in the source, on average.
            shard_size_bytes: About the size of a shard.
        """
        ...

    def build_objects(
        self, schema: pa.Schema, batches: Iterable[pa.RecordBatch], number: int, first_sample: int
    ) -> tuple[Part, dict[str, list[Buffer]]]:
        """Build one shard in memory, in the place of `build`.

        Args:
            schema: As in `build`.
            batches: The samples of the shard.
            number: Of the shard.
            first_sample: As in `build`.

        Returns:
            What is remembered of the shard, `size_bytes` included, and the content of its objects, by name.
        """
        ...
