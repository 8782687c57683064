"""Keys that more than one sample has, found in bounded memory: digests, sorted and spilled, merged at the end.

A digest and its sample take 24 bytes, in a temporary folder and not in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dataflow.convert.digests import bucket_sizes, find_duplicates, sample_digests

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from dataflow.formats.destination import Destination

__all__ = ["KeyCheck"]

# Digests that are held before they are spilled.
RUN_LENGTH = 1 << 20


class KeyCheck:
    """Collects the keys of samples.

    Args:
        folder: Takes what is spilled; empty.
    """

    def __init__(self, folder: Destination) -> None:
        self._folder = folder
        self._files: list[tuple[str, list[int]]] = []
        self._held: list[npt.NDArray[Any]] = []
        self._num_held = 0

    def add(self, keys: pa.Array, first: int) -> None:
        """Add the keys of samples that follow each other from number `first` on; nulls are no keys."""
        numbers = np.arange(first, first + len(keys))
        if keys.null_count:
            valid = keys.is_valid()
            numbers, keys = numbers[valid.to_numpy(zero_copy_only=False)], keys.filter(valid)
        digests = sample_digests(pa.RecordBatch.from_arrays([keys], names=["key"]), numbers)
        self._held.append(digests)
        self._num_held += len(digests)
        if self._num_held >= RUN_LENGTH:
            self._spill()

    def repeated(self) -> Iterator[tuple[int, int]]:
        """Yield every sample whose key an earlier sample has, and the first that has it."""
        self._spill()
        for samples, originals in find_duplicates(self._folder, self._files):
            yield from zip(samples.tolist(), originals.tolist(), strict=True)

    def _spill(self) -> None:
        if not self._num_held:
            return
        run = np.sort(np.concatenate(self._held))
        self._held, self._num_held = [], 0
        name = f"keys-{len(self._files):05d}"
        self._folder.put(name, [run.tobytes()])
        self._files.append((name, bucket_sizes(run).tolist()))
