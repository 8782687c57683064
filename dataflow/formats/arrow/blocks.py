"""Cutting a stream of record batches into blocks. Pure.

A block takes samples while their sizes sum to at most the block size, and at least one. Where the cuts fall depends on
the samples alone, not on how they were handed in, so two conversions of the same source agree byte by byte.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

__all__ = ["BlockCutter", "column_bytes", "sample_sizes"]


class BlockCutter:
    """Collects samples and gives them back as blocks.

    Args:
        block_size_bytes: Size that a block of more than one sample never passes.
    """

    def __init__(self, block_size_bytes: int) -> None:
        self._limit = block_size_bytes
        self._pieces: list[pa.RecordBatch] = []
        self._filled = 0

    def push(self, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        """Add samples; yield each block that they complete."""
        ends = np.cumsum(sample_sizes(batch))
        start = 0
        while start < batch.num_rows:
            before = int(ends[start - 1]) if start else 0
            stop = int(np.searchsorted(ends, before + self._limit - self._filled, side="right"))
            if stop == start and not self._pieces:
                stop = start + 1  # a sample larger than a block is a block of its own
            if stop > start:
                self._pieces.append(batch.slice(start, stop - start))
                self._filled += int(ends[stop - 1]) - before
                start = stop
            if start < batch.num_rows:
                yield from self.flush()

    def flush(self) -> Iterator[pa.RecordBatch]:
        """Yield what is left as one last block, if anything is."""
        pieces, self._pieces, self._filled = self._pieces, [], 0
        if pieces:
            yield _exact_batch(pieces[0]) if len(pieces) == 1 else pa.concat_batches(pieces)


def sample_sizes(batch: pa.RecordBatch) -> npt.NDArray[np.int64]:
    """Return the bytes that each sample takes, int64, at least 1.

    Exact for fixed-width, string, binary and flat list fields. Deeper nesting counts 8 bytes per innermost value.
    """
    sizes = np.zeros(batch.num_rows, np.int64)
    for column in batch.columns:
        sizes += _sizes(column)
    return np.maximum(sizes, 1)


def column_bytes(column: Any) -> int:
    """Return the bytes of all values of a column, counted as in `sample_sizes`."""
    sizes = _sizes(column)
    return int(np.sum(sizes)) if isinstance(sizes, np.ndarray) else sizes * len(column)


def _exact_batch(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return a batch of which nothing but its own values is written: Arrow pads slices with what lies behind them."""
    return pa.RecordBatch.from_arrays([_exact(column) for column in batch.columns], schema=batch.schema)


def _exact(column: Any) -> Any:
    """Return an array whose buffers end with its last value, without a copy where the type is simple."""
    kind, length, start = column.type, len(column), column.offset
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, _exact(column.storage))
    buffers = column.buffers()
    if column.null_count or not length:
        pass
    elif pa.types.is_fixed_size_list(kind):
        return pa.Array.from_buffers(kind, length, [None], children=[_exact(column.flatten())])
    elif _is_plain(kind):
        width = kind.bit_width // 8
        return pa.Array.from_buffers(kind, length, [None, buffers[1].slice(start * width, length * width)])
    elif _is_text(kind) and buffers[2] is not None:
        offset_type = _offset_type(kind)
        offsets = np.frombuffer(buffers[1], offset_type)[start : start + length + 1]
        end = int(offsets[-1])
        return pa.Array.from_buffers(kind, length, [None, pa.py_buffer(offsets), buffers[2].slice(0, end)])
    return column.take(pa.array(np.arange(length)))


def _is_plain(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_temporal(kind))


def _is_text(kind: pa.DataType) -> bool:
    return _offset_type(kind) is not None and not pa.types.is_nested(kind)


def _sizes(column: Any) -> npt.NDArray[np.int64] | int:
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        return _sizes(column.storage)
    if pa.types.is_struct(kind):
        total: npt.NDArray[np.int64] | int = 0
        for child in column.flatten():
            total = total + _sizes(child)
        return total
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size) * _width(kind.value_type)
    offset_type = _offset_type(kind)
    if offset_type is None:
        return _width(kind)
    offsets = np.frombuffer(column.buffers()[1], offset_type)[column.offset : column.offset + len(column) + 1]
    width = 1 if not pa.types.is_nested(kind) else 8 if pa.types.is_map(kind) else _width(kind.value_type)
    return np.diff(offsets).astype(np.int64) * width + offsets.itemsize


def _offset_type(kind: pa.DataType) -> type[np.generic] | None:
    """Return the integer type of the offsets of a variable-size type; None for other types."""
    types = pa.types
    if types.is_string(kind) or types.is_binary(kind) or types.is_list(kind) or types.is_map(kind):
        return np.int32
    if types.is_large_string(kind) or types.is_large_binary(kind) or types.is_large_list(kind):
        return np.int64
    return None


def _width(kind: pa.DataType) -> int:
    try:
        return max(1, int(kind.bit_width) // 8)
    except ValueError:
        return 8
