"""Boxes of large tensors in native shards, by the ranges of the rows that they touch. Pure but for asking versions.

Without compression and without nulls the bytes of a tensor field are its values, sample by sample, in the order of C. A
box then is a number of runs, one for each place along its outer axes; runs that lie near to each other share a request.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cache.keys import BlockRef
from connectors.coalesce import coalesce
from connectors.errors import BadInputError
from connectors.objects import Span
from dataflow.formats.fields import value_dtype
from dataflow.formats.pieces import CropPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from dataflow.formats.arrow.reading import ArrowSource

__all__ = ["can_crop_tensor", "crop_tensor"]

# Smaller tensors are read with their blocks, which caches keep.
LARGE_BYTES = 256 << 10
# What has to lie between two runs for them to be told apart.
GAP_BYTES = 32 << 10
# Runs that are told apart share a request where less than a request's worth lies between them, and not much more than
# they are long themselves; not too many of them, since a connection carries so much and no more.
REQUEST_WORTH_BYTES = 1 << 20
GAP_PER_RUN = 2
REQUEST_BYTES = 8 << 20
# A box that needs a larger part of its tensor is cut from the whole.
WORTH = 0.5
PADDING_BYTES = 64  # that Arrow may leave behind a buffer


def can_crop_tensor(source: ArrowSource, name: str, shape: Sequence[int]) -> bool:
    """Say whether reading the runs of such boxes saves enough."""
    field = source.schema.field(name)
    kind: Any = field.type
    if not isinstance(kind, pa.FixedShapeTensorType) or kind.permutation is not None or field.nullable:
        return False
    if pa.types.is_boolean(kind.value_type) or source.manifest.compression != "none":
        return False
    size_bytes = kind.value_type.byte_width * math.prod(kind.shape)
    if source.index.blocks.parts is None or size_bytes < LARGE_BYTES:
        return False
    depth, run_bytes = _runs(kind.shape, shape, kind.value_type.byte_width)
    return bool(math.prod(shape[:depth]) * run_bytes <= WORTH * size_bytes)


def crop_tensor(
    source: ArrowSource,
    name: str,
    sample: int,
    start: Sequence[int],
    shape: Sequence[int],
    version_of: Callable[[int], str],
) -> CropPlan:
    """Return how a box is read; see `dataflow.formats.pieces.CroppableSource`.

    Raises:
        BadInputError: The block has values missing inside its tensors.
    """
    blocks, kind = source.index.blocks, source.schema.field(name).type
    assert blocks.parts is not None
    item_bytes, column = kind.value_type.byte_width, source.schema.get_field_index(name)
    (block,), (row,) = source.index.locate(np.array([sample], np.int64))
    size_bytes = item_bytes * math.prod(kind.shape)
    first, end = (int(place) for place in blocks.parts.end[block, column : column + 2])
    num_rows = blocks.num_samples_in(int(block))
    if not 0 <= end - first - num_rows * size_bytes <= 2 * PADDING_BYTES:
        raise BadInputError(f"field {name!r} of sample {sample} lies beside tensors with missing values: fill them")
    depth, run_bytes = _runs(kind.shape, shape, item_bytes)
    strides = _strides(kind.shape, item_bytes)
    shard = int(blocks.shard[block])
    uri, version = source.index.shard_uri(shard), version_of(shard)
    begin = int(blocks.offset[block]) + first + int(row) * size_bytes
    begin += sum(place * stride for place, stride in zip(start, strides, strict=True))
    outer = np.array(list(np.ndindex(*shape[:depth])), np.int64)  # of one place without an axis where depth is 0
    offsets = (begin + outer @ np.array(strides[:depth], np.int64)).tolist()
    requests = coalesce(
        [Span(offset, run_bytes) for offset in offsets],
        max_gap_bytes=min(REQUEST_WORTH_BYTES, GAP_PER_RUN * run_bytes),
        max_span_bytes=REQUEST_BYTES,
    )
    dtype = value_dtype(kind)

    def assemble(pieces: Sequence[memoryview], out: npt.NDArray[Any]) -> None:
        read = [np.frombuffer(data, dtype) for data in pieces]
        addresses = [part.__array_interface__["data"][0] for part in read]
        shifts = {address - request.span.offset for address, request in zip(addresses, requests, strict=True)}
        if len(shifts) == 1:  # they lie in memory as in the file, which is mapped
            out[...] = np.lib.stride_tricks.as_strided(read[0], shape, strides, writeable=False)
            return
        for part, request in zip(read, requests, strict=True):
            for member in request.members:
                run = part[(offsets[member] - request.span.offset) // item_bytes :]
                box = np.lib.stride_tricks.as_strided(run, shape[depth:], strides[depth:], writeable=False)
                out[tuple(outer[member])] = box

    return CropPlan([BlockRef(uri, version, one.span.offset, one.span.length) for one in requests], assemble)


def _strides(shape: Sequence[int], item_bytes: int) -> list[int]:
    return [item_bytes * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _runs(shape: Sequence[int], box: Sequence[int], item_bytes: int) -> tuple[int, int]:
    """Return how many outer axes of a box are told apart by runs, and the bytes of a run.

    A run reaches from the first to the last value of what is inside those axes.
    """
    strides = _strides(shape, item_bytes)

    def run_bytes(depth: int) -> int:
        return item_bytes + sum((size - 1) * stride for size, stride in zip(box[depth:], strides[depth:], strict=True))

    depth = 0
    while depth < len(shape) and strides[depth] - run_bytes(depth + 1) >= GAP_BYTES:
        depth += 1
    return depth, run_bytes(depth)
