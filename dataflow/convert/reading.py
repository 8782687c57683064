"""Reading chosen samples of a source as record batches, a few blocks at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from connectors.errors import ChangedError, CorruptError, DataError, NotFoundError
from dataflow.formats.pieces import decode_block, fetch_blocks, selected

if TYPE_CHECKING:
    import numpy.typing as npt

    from cache.access import BlockData, BlockReader
    from dataflow.dataset import Dataset
    from dataflow.formats import Source

__all__ = ["OnDamage", "read_samples", "read_shuffled"]

# What one request to the reader asks for; enough to hide a round trip, small beside a shard.
FETCH_BYTES = 8 << 20
FETCH_BLOCKS = 256
# Batches of fewer bytes are put together, up to so many.
SMALL_BYTES = 256 << 10
MAX_JOINED_BYTES = 16 << 20
# What is held to be brought into another order.
SHUFFLE_BYTES = 512 << 20
# What is wrong with the data and not with the way to it.
DAMAGE = (CorruptError, ChangedError, NotFoundError)

# Told which block's samples are lost, and why.
OnDamage = Callable[["npt.NDArray[np.int64]", int, DataError], None]
Numbered = tuple["npt.NDArray[np.int64]", pa.RecordBatch]


def read_samples(
    source: Dataset, names: Sequence[str], samples: npt.NDArray[np.int64], on_damage: OnDamage | None = None
) -> Iterator[Numbered]:
    """Yield samples and their fields `names`, block by block.

    Args:
        source: What to read.
        names: Fields, in the order wanted.
        samples: Their numbers, ascending.
        on_damage: Receives samples that cannot be read; without it, that is an error.
    """
    narrow = selected(source.source, names)
    length = narrow.index.blocks.length
    block, row = narrow.index.locate(samples)
    starts = np.flatnonzero(np.diff(block, prepend=-1))
    wanted = block[starts]
    bounds = np.append(starts, len(samples))
    begin = 0
    while begin < len(wanted):
        filled = np.cumsum(length[wanted[begin : begin + FETCH_BLOCKS]])
        stop = begin + max(1, int(np.searchsorted(filled, FETCH_BYTES, side="right")))
        fetched = _fetch(source.reader, narrow, wanted[begin:stop], lenient=on_damage is not None)
        batches = _decoded(narrow, names, wanted[begin:stop], fetched, samples, row, bounds[begin:], on_damage)
        yield from _joined(batches)
        begin = stop


def read_shuffled(
    source: Dataset, names: Sequence[str], samples: npt.NDArray[np.int64], on_damage: OnDamage | None = None
) -> Iterator[Numbered]:
    """Yield samples in the order given, holding about `SHUFFLE_BYTES`; arguments as `read_samples`."""
    blocks = source.index.blocks
    block, _ = source.index.locate(samples)
    size_bytes = np.cumsum(blocks.length[block] / np.diff(blocks.first_sample)[block])
    begin = 0
    while begin < len(samples):
        before = size_bytes[begin - 1] if begin else 0
        stop = max(begin + 1, int(np.searchsorted(size_bytes, before + SHUFFLE_BYTES, side="right")))
        wanted = samples[begin:stop]
        pieces = list(read_samples(source, names, np.sort(wanted), on_damage))
        if pieces:
            found = np.concatenate([numbers for numbers, _ in pieces])
            kept = wanted[np.isin(wanted, found)] if len(found) < len(wanted) else wanted
            rows = np.searchsorted(found, kept)
            yield kept, pa.concat_batches([batch for _, batch in pieces]).take(pa.array(rows))
        begin = stop


def _decoded(
    source: Source,
    names: Sequence[str],
    blocks: npt.NDArray[np.int64],
    fetched: Iterable[tuple[int, list[BlockData] | DataError]],
    samples: npt.NDArray[np.int64],
    row: npt.NDArray[np.int64],
    bounds: npt.NDArray[np.int64],
    on_damage: OnDamage | None,
) -> Iterator[Numbered]:
    """Yield the chosen samples of some blocks: those of the one at a place are `samples[bounds[place : place + 2]]`."""
    for place, data in fetched:
        part = slice(*bounds[place : place + 2])
        try:
            if isinstance(data, DataError):
                raise data
            batch = decode_block(source, int(blocks[place]), data).select(names)
        except DAMAGE as error:
            if on_damage is None:
                raise
            on_damage(samples[part], int(blocks[place]), error)
            continue
        yield samples[part], _rows(batch, row[part])


def _rows(batch: pa.RecordBatch, rows: npt.NDArray[np.int64]) -> pa.RecordBatch:
    """Return some rows, ascending; few of them as a copy, since a slice keeps all of its block in memory."""
    contiguous = int(rows[-1] - rows[0]) == len(rows) - 1
    if contiguous and 2 * len(rows) > batch.num_rows:
        return batch.slice(rows[0], len(rows))
    return batch.take(pa.array(rows))


def _joined(pieces: Iterable[Numbered]) -> Iterator[Numbered]:
    """Put small batches together: what follows then costs by bytes, and not by the files of a folder."""
    small: list[Numbered] = []
    size_bytes = 0
    for numbers, batch in pieces:
        added = batch.nbytes
        if small and (added >= SMALL_BYTES or size_bytes + added > MAX_JOINED_BYTES):
            yield _as_one(small)
            small, size_bytes = [], 0
        if added >= SMALL_BYTES:
            yield numbers, batch
        else:
            small.append((numbers, batch))
            size_bytes += added
    if small:
        yield _as_one(small)


def _as_one(pieces: list[Numbered]) -> Numbered:
    if len(pieces) == 1:
        return pieces[0]
    return np.concatenate([numbers for numbers, _ in pieces]), pa.concat_batches([batch for _, batch in pieces])


def _fetch(
    reader: BlockReader, source: Source, blocks: npt.NDArray[np.int64], *, lenient: bool
) -> Iterator[tuple[int, list[BlockData] | DataError]]:
    """Yield place and bytes of blocks; where one of many is damaged and that is tolerated, each is asked for alone."""
    try:
        yield from enumerate(fetch_blocks(reader, source.index, blocks.tolist()))
    except DAMAGE as error:
        if not lenient:
            raise
        if len(blocks) == 1:
            yield 0, error
            return
        for place in range(len(blocks)):
            for _, data in _fetch(reader, source, blocks[place : place + 1], lenient=True):
                yield place, data
