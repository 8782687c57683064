"""Finding equal samples in bounded memory: digests, sorted by job, merged a range of digests at a time.

Two samples count as equal when 128 bits of xxh3 over all values agree, which for 10^9 different samples happens by
chance once in 10^20 datasets. A digest and its sample take 24 bytes, on the store and not in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from connectors.errors import BadInputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dataflow.formats.destination import Destination

__all__ = ["bucket_sizes", "find_duplicates", "sample_digests", "times_as_numbers", "value_bytes"]

# Sorted as a whole, so by digest and then by sample.
DIGEST = np.dtype([("high", "<u8"), ("low", "<u8"), ("sample", "<i8")])
_WHOLE_NUMBERS = {32: pa.int32(), 64: pa.int64()}
BUCKETS = 256  # by the first byte of the digest
MERGE_BYTES = 64 << 20


def sample_digests(batch: pa.RecordBatch | None, numbers: npt.NDArray[np.int64] | None) -> npt.NDArray[Any]:
    """Return the digest of every sample, in their order; none for None."""
    if batch is None or numbers is None:
        return np.zeros(0, DIGEST)
    digests = np.zeros(batch.num_rows, DIGEST)
    digests["sample"] = numbers
    columns = [value_bytes(column) for column in batch.columns]
    for place, values in enumerate(zip(*columns, strict=True)):
        digest = xxhash.xxh3_128()
        for value in values:
            # The length keeps "ab", "c" and "a", "bc" apart, and a missing value from an empty one.
            digest.update((-1 if value is None else len(value)).to_bytes(8, "little", signed=True))
            digest.update(value or b"")
        number = digest.intdigest()
        digests["high"][place], digests["low"][place] = number >> 64, number & (1 << 64) - 1
    return digests


def bucket_sizes(digests: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return how many digests begin with each byte."""
    return np.bincount((digests["high"] >> np.uint64(56)).astype(np.int64), minlength=BUCKETS)


def find_duplicates(
    destination: Destination, files: Sequence[tuple[str, list[int]]]
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Yield samples that equal an earlier one, and the first one that each equals.

    Args:
        destination: Holds sorted digests.
        files: Their names, and the numbers of digests per bucket in each.
    """
    sizes = np.array([counts for _, counts in files], np.int64).reshape(len(files), BUCKETS) * DIGEST.itemsize
    ends = np.cumsum(sizes, axis=1)
    totals = sizes.sum(axis=0)
    first = 0
    while first < BUCKETS:
        last = first + max(1, int(np.searchsorted(np.cumsum(totals[first:]), MERGE_BYTES, side="right")))
        parts = [np.zeros(0, DIGEST)]
        for place, (name, _) in enumerate(files):
            begin, end = int(ends[place, first - 1]) if first else 0, int(ends[place, last - 1])
            if end > begin:
                parts.append(np.frombuffer(destination.get_range(name, begin, end - begin), DIGEST))
        yield _repeated(np.sort(np.concatenate(parts)))
        first = last


def _repeated(digests: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    new = np.ones(len(digests), np.bool_)
    new[1:] = (digests["high"][1:] != digests["high"][:-1]) | (digests["low"][1:] != digests["low"][:-1])
    originals = np.maximum.accumulate(np.where(new, np.arange(len(digests)), 0))
    return digests["sample"][~new], digests["sample"][originals][~new]


def value_bytes(column: Any) -> Sequence[bytes | None]:
    """Return every value as bytes that are equal for equal values only.

    Raises:
        BadInputError: There are times inside what is nested that Python lacks, such as those with nanoseconds.
    """
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    column = times_as_numbers(column)
    types, kind = pa.types, column.type
    if types.is_binary(kind) or types.is_large_binary(kind):
        return column.to_pylist()  # type: ignore[no-any-return]
    if types.is_string(kind) or types.is_large_string(kind):
        return [None if value is None else value.encode() for value in column.to_pylist()]
    if types.is_integer(kind) or types.is_floating(kind):
        # Nulls have bytes, too, so that values look the same beside them.
        values = pc.fill_null(column, pa.scalar(0, kind)).to_numpy()
        content, width = np.ascontiguousarray(values).tobytes(), values.itemsize
        cut = [content[start : start + width] for start in range(0, len(content), width)]
        if not column.null_count:
            return cut
        return [value if valid else None for value, valid in zip(cut, column.is_valid().to_pylist(), strict=True)]
    encode = msgspec.msgpack.Encoder(enc_hook=str).encode
    try:
        return [None if value is None else encode(value) for value in column.to_pylist()]
    except (ValueError, OverflowError) as error:
        raise BadInputError(f"values of {kind} cannot be compared: {error}") from error


def times_as_numbers(column: Any) -> Any:
    """Return times as the whole numbers that Arrow stores, because Python's have no nanoseconds; all else as it is."""
    kind = column.type
    if not pa.types.is_temporal(kind) or kind.bit_width not in _WHOLE_NUMBERS:
        return column
    return column.view(_WHOLE_NUMBERS[kind.bit_width])
