"""`compression="auto"`: measured on the first samples, by size alone, so that equal sources give equal bytes."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from connectors.errors import BadInputError
from dataflow.convert.reading import read_samples
from dataflow.formats.fields import select_fields
from dataflow.formats.writable import make_target

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dataflow.dataset import Dataset
    from dataflow.formats.protocol import Target

__all__ = ["AUTO", "measure_compression"]

AUTO = "auto"
# What is built to measure: a few blocks.
MEASURED_BYTES = 8 << 20
# A compression has to save that part of the plain size more than the faster one before it.
WORTH = 0.1


def measure_compression(source: Dataset, to: str, block_size_bytes: int, fields: Sequence[str] | None) -> str:
    """Return which of `none`, `lz4` and `zstd` to write a source with, of those that the format has.

    Each of them, from the fastest to read to the slowest, is taken when it saves a tenth of the plain size more than
    the best one before. JPEG stays as it is, text does not.

    Raises:
        BadInputError: The format cannot hold the fields.
    """
    blocks = source.index.blocks
    if not len(blocks):
        return "none"
    last = int(np.searchsorted(np.cumsum(blocks.length), MEASURED_BYTES)) + 1
    count = int(blocks.first_sample[min(last, len(blocks))])
    names = select_fields(source.schema, fields).names
    # A bad block says nothing about how well the others compress.
    batches = [batch for _, batch in read_samples(source, names, np.arange(count), lambda *_: None)]
    best, least, plain = "none", 0, 0
    for compression, target in _targets(to, block_size_bytes).items():
        schema = target.stored_schema(select_fields(source.schema, fields))
        size_bytes = target.build(schema, (batch.select(schema.names) for batch in batches), 0)[0]["size_bytes"]
        if compression == "none":
            least = plain = size_bytes
        elif size_bytes < least - WORTH * plain:
            best, least = compression, size_bytes
    return best


def _targets(to: str, block_size_bytes: int) -> dict[str, Target]:
    """Return the format with every compression that it has."""
    targets = {"none": make_target(to, block_size_bytes=block_size_bytes, compression="none")}
    for compression in ("lz4", "zstd"):
        with suppress(BadInputError):
            targets[compression] = make_target(to, block_size_bytes=block_size_bytes, compression=compression)
    return targets
