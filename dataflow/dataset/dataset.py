"""The map-style dataset: sample numbers in, batches out.

    numbers -> locate -> blocks missing from the buffer -> one `read_blocks` -> decode -> gather -> columns

Whatever the format, a batch costs at most one request to the reader, each block is decoded once, and the gather is
vectorised.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from connectors.errors import BadInputError, CorruptError
from dataflow.dataset.batch import Batch, Sample
from dataflow.dataset.buffer import BlockBuffer
from dataflow.dataset.columns import Allocate, Selection, column_of, is_rowwise
from dataflow.formats.fields import field_kind, select_fields
from dataflow.formats.pieces import decode_block, fetch_blocks, selected
from dataflow.observe.stages import count, stage

if TYPE_CHECKING:
    import pyarrow as pa

    from cache.access import BlockReader
    from dataflow.formats.protocol import Source
    from dataflow.index import Index

__all__ = ["Dataset"]

# From here on, looking at the numbers of blocks first costs less than sorting them as they are.
_FEW_SAMPLES = 512


class Dataset:
    """A dataset of `open_dataset`: map-style, as torch's samplers and loaders expect.

    May be shared by threads, inherited by a fork and pickled. Arrays that it returns are writable and own their memory;
    no later read changes them.

    Args:
        source: The opened format.
        reader: Where block bytes come from. The dataset uses it and never closes it.
        columns: Fields to read, in this order; all of them for None.
        encoded: Image fields that are handed out as the bytes of their files.
        buffer_bytes: Limit on the decoded blocks that each process keeps; see `open_dataset`.
    """

    def __init__(
        self,
        source: Source,
        reader: BlockReader,
        *,
        columns: Sequence[str] | None = None,
        encoded: Collection[str] = (),
        buffer_bytes: int,
    ) -> None:
        self._reader = reader
        self._schema = select_fields(source.schema, columns)
        self._source = selected(source, self._schema.names)
        for name in encoded:
            if name not in self._schema.names or field_kind(self._schema.field(name)) is None:
                raise BadInputError(f"encoded names {name!r}, which is no media field of this dataset")
        self._columns = [column_of(field, encoded=field.name in encoded) for field in self._schema]
        self._buffer = BlockBuffer(buffer_bytes)

    @property
    def schema(self) -> pa.Schema:
        """Fields of a sample, after projection."""
        return self._schema

    @property
    def fingerprint(self) -> str:
        """Names content, schema and block layout; the same wherever the dataset lies."""
        return self._source.index.fingerprint

    @property
    def index(self) -> Index:
        """Where the samples lie."""
        return self._source.index

    @property
    def source(self) -> Source:
        """The opened format behind this dataset, reading no more than the fields of this one where it can."""
        return self._source

    @property
    def reader(self) -> BlockReader:
        """Where block bytes come from; `reader.stats()` says how that went."""
        return self._reader

    @property
    def buffer_bytes(self) -> int:
        """Limit on the decoded blocks that each process keeps."""
        return self._buffer.capacity_bytes

    @property
    def is_rowwise(self) -> bool:
        """Whether batches that are gathered by one `get_batch` and then cut apart are what they are one by one."""
        return all(map(is_rowwise, self._columns))

    def __len__(self) -> int:
        return self._source.index.num_samples

    def __getitem__(self, number: SupportsIndex) -> Sample:
        """Return one sample; negative numbers count from the end.

        Raises:
            IndexError: Out of range; names the number and the length.
        """
        try:
            index = number.__index__()
        except AttributeError:
            raise TypeError(f"a sample number must be an integer, got {type(number).__name__}") from None
        return {name: column[0] for name, column in self.get_batch([index]).items()}

    def __getitems__(self, numbers: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Batch:
        """Return many samples at once; torch's loaders call this with a whole batch."""
        columns = self.get_batch(numbers)
        return Batch(columns, len(numbers))

    def __iter__(self) -> Iterator[Sample]:
        return map(self.__getitem__, range(len(self)))

    def __repr__(self) -> str:
        index = self.index
        return f"Dataset({index.url!r}, {len(self)} samples in {index.num_blocks} blocks of {len(index.shards)} shards)"

    def select(self, columns: Sequence[str]) -> Dataset:
        """Return the same samples with some of the fields only; both share their reader.

        Raises:
            BadInputError: This dataset has no such field, or one is named twice.
        """
        schema = select_fields(self._schema, columns)
        own = {column.name: column for column in self._columns}
        changed = {
            "_schema": schema,
            "_source": selected(self._source, schema.names),
            "_columns": [own[name] for name in schema.names],
            "_buffer": copy.copy(self._buffer),  # an empty one
        }
        other = copy.copy(self)
        other.__dict__.update(changed)
        return other

    def get_batch(
        self, numbers: Sequence[int] | npt.NDArray[np.integer[Any]], allocate: Allocate | None = None
    ) -> dict[str, npt.NDArray[Any] | list[Any]]:
        """Return the columns of some samples, in the order asked; a number may come more than once.

        Args:
            numbers: Sample numbers; negative ones count from the end.
            allocate: `allocate(field, shape, dtype)` gives the C-contiguous array that a column is written to, such as
                a slot in shared memory; by default fresh memory. Called at most once a field, and not for fields that
                become lists. Where it gives a type that holds all numbers of `dtype`, they are cast on their way.

        Raises:
            IndexError: A number is out of range.
            DataError: The bytes could not be had or are not what the index says; names shard and offset.
        """
        samples = _sample_numbers(numbers, len(self))
        block, row = self.index.locate(samples)
        if not self._columns:
            return {}
        places = None
        if (block[1:] < block[:-1]).any():
            places = in_block_order(block)
            block, row = block[places], row[places]
        is_first = np.ones(len(block), np.bool_)
        np.not_equal(block[1:], block[:-1], out=is_first[1:])
        bounds = np.append(is_first.nonzero()[0], len(samples))
        wanted = block[is_first]
        # What is needed last is buffered last, and stays.
        by_use = wanted if places is None else wanted[places[bounds[1:] - 1].argsort()]
        prepared = self._blocks(by_use.tolist())
        with stage("decode"):
            owners = is_first.cumsum() - 1
            blocks = [prepared[number] for number in wanted.tolist()]
            selection = Selection(samples, blocks, row, owners, bounds.tolist(), places, self.index.uri_of)
            return {column.name: column.gather(selection, allocate or _allocate) for column in self._columns}

    def _blocks(self, wanted: list[int]) -> dict[int, dict[str, Any]]:
        """Return the prepared blocks, fetching and decoding those that the buffer lacks."""
        prepared = self._buffer.find(wanted)
        missing = [block for block in wanted if block not in prepared]
        if not missing:
            return prepared
        with stage("fetch"):
            blocks = fetch_blocks(self._reader, self.index, missing)
        found = [data for pieces in blocks for data in pieces]
        for source, number in Counter(data.source for data in found).items():
            count(f"blocks.{source}", number)
            count(f"bytes.{source}", sum(len(data.view) for data in found if data.source == source))
        with stage("decode"):
            for block, pieces in zip(missing, blocks, strict=True):
                batch = decode_block(self._source, block, pieces)
                self._insist_on_length(block, batch.num_rows)
                columns = {column.name: column.prepare(batch.column(column.name)) for column in self._columns}
                prepared[block] = columns
                if batch.num_rows > 1:  # a block of one sample is not asked for again soon
                    self._buffer.put(block, columns, batch.nbytes)
        return prepared

    def _insist_on_length(self, block: int, num_rows: int) -> None:
        """Insist that a block has the rows that the index promises: a gather looks at each of them unasked."""
        first, stop = self.index.blocks.first_sample[block : block + 2].tolist()
        if num_rows != stop - first:
            uri = self.index.block_ref(block).uri
            raise CorruptError(
                f"block {block}, in {uri}, has {num_rows} samples, the index says {stop - first}: index or convert the "
                "dataset again",
                uri=uri,
            )


def _allocate(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:  # noqa: ARG001
    return np.empty(shape, dtype)


def in_block_order(block: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the places in the batch of its samples, block by block; those of one block in the order of the batch.

    Args:
        block: int64, the number of the block of each sample.
    """
    if len(block) > _FEW_SAMPLES:
        distance = block - block.min()
        if distance.max() <= np.iinfo(np.uint16).max:
            block = distance.astype(np.uint16)  # which numpy sorts digit by digit, seven times as fast
    return block.argsort(kind="stable")


def _sample_numbers(numbers: Sequence[int] | npt.NDArray[np.integer[Any]], length: int) -> npt.NDArray[np.int64]:
    samples = np.asarray(numbers)
    if samples.size == 0:
        return np.empty(0, np.int64)
    if samples.ndim != 1 or samples.dtype.kind not in "iu":
        raise TypeError(f"sample numbers must be a sequence of integers, got {samples.dtype} of shape {samples.shape}")
    if samples.dtype == np.uint64 and (wrong := samples > np.iinfo(np.int64).max).any():
        raise IndexError(f"sample {samples[wrong][0]} is out of range for a dataset of {length} samples")
    samples = samples.astype(np.int64, copy=False)
    negative = samples < 0
    if negative.any():
        if (wrong := samples < -length).any():
            raise IndexError(f"sample {samples[wrong][0]} is out of range for a dataset of {length} samples")
        samples = np.where(negative, samples + length, samples)
    return samples
