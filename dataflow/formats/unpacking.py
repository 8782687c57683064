"""Files that are compressed as a whole: they can only be read from their front, so each is one block."""

from __future__ import annotations

import re

import pyarrow as pa

from connectors.errors import BadInputError, CorruptError

__all__ = ["COMPRESSIONS", "STEP_BYTES", "compression_of", "decompress", "suffixed", "unpack"]

COMPRESSIONS = {".bz2": "bz2", ".gz": "gzip", ".lz4": "lz4", ".tgz": "gzip", ".zst": "zstd"}
# A file that unpacks to more is refused: it would be unpacked again and again, and held whole.
MAX_UNPACKED_BYTES = 1 << 30
STEP_BYTES = 8 << 20
# What TensorFlow Datasets and Beam put behind a suffix: `train.tfrecord-00000-of-00010`.
_NUMBER = re.compile(r"-\d+-of-\d+\Z")


def suffixed(name: str) -> str:
    """Return the name of a file so that it ends in its suffix, in small letters."""
    return (_NUMBER.sub("", name) if "-of-" in name else name).lower()  # asked for each of millions of files


def compression_of(name: str) -> str | None:
    """Return how a file is compressed, by its name; None where it is not."""
    return next((compression for suffix, compression in COMPRESSIONS.items() if suffixed(name).endswith(suffix)), None)


def unpack(data: memoryview, uri: str, compression: str | None = None) -> memoryview:
    """Return the content of a whole file; of one that is not compressed, `data` itself.

    Args:
        data: The whole file.
        uri: Its name, which says how it is compressed where `compression` does not.
        compression: As pyarrow calls it.

    Raises:
        CorruptError: It cannot be decompressed.
        BadInputError: It is too large for that.
    """
    compression = compression or compression_of(uri)
    if compression is None:
        return data
    try:
        content = decompress(data, compression, MAX_UNPACKED_BYTES + 1, step_bytes=STEP_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise CorruptError(f"{uri} cannot be decompressed as {compression}: {error}", uri=uri) from error
    if len(content) > MAX_UNPACKED_BYTES:
        raise BadInputError(
            f"{uri} unpacks to more than {MAX_UNPACKED_BYTES} bytes, and a compressed file is read whole: split it",
            uri=uri,
        )
    return content


def decompress(data: memoryview, compression: str, most_bytes: int, *, step_bytes: int) -> memoryview:
    """Return what `data` unpacks to, cut off behind `most_bytes`.

    Args:
        data: Whole.
        compression: As pyarrow calls it.
        most_bytes: See above; above 0.
        step_bytes: To be unpacked at once, which takes memory for all of them.

    Raises:
        OSError: It is damaged; an `ArrowException` likewise.
    """
    parts, left = [], most_bytes
    with pa.input_stream(pa.BufferReader(pa.py_buffer(data)), compression=compression) as stream:
        # Where its `read` fails, the memory that was taken for it is lost.
        while left and (part := stream.read_buffer(min(left, step_bytes))):
            parts.append(part)
            left -= len(part)
    return memoryview(parts[0] if len(parts) == 1 else b"".join(parts)).cast("B")
