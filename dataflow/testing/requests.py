"""What a store is asked for, counted: small samples as one file each, and the same samples as native shards."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np

from cache.access import open_reader
from connectors.protocols import Store
from connectors.registry import open_store
from connectors.wrappers import CountingStore
from dataflow.convert import convert
from dataflow.dataset import Dataset
from dataflow.formats import open_source
from dataflow.formats.destination import Destination
from dataflow.order import BlockOrder
from dataflow.testing.readers import CountingReader

__all__ = ["count_requests"]

BATCH_SIZE = 64
# Holds the blocks that are shuffled with each other.
BUFFER_BYTES = 256 << 20


def count_requests(num_samples: int, *, sample_bytes: int = 2048) -> dict[str, float]:
    """Write samples and read a shuffled epoch of them; return the requests per 1,000 samples, by what was done.

    Everything lies in memory. A block of a shard counts as a request of its own, also where a store is asked for
    several at once; so do listings, heads, manifests and records.

    Args:
        num_samples: How many.
        sample_bytes: Size of each, in a file that bears an image's name.
    """
    stores: list[CountingStore] = []

    def counted(url: str) -> Store:
        stores.append(CountingStore(open_store(url)))
        return stores[-1]

    def written() -> int:
        total = sum(store.requests.total() for store in stores)
        stores.clear()
        return total

    root = f"memory://requests-{num_samples}-{sample_bytes}"
    with patch("dataflow.formats.destination.open_store", counted):
        with Destination(f"{root}/files") as destination:
            for number in range(num_samples):
                destination.put(f"class/{number:06}.jpg", [number.to_bytes(8, "big"), bytes(sample_bytes - 8)])
        found = {"files, written": written()}
        convert(f"{root}/files", f"{root}/shards", workers=0, overwrite=True)
        found["shards, written"] = written()
    found["files, read"] = _read(f"{root}/files")
    found["shards, read"] = _read(f"{root}/shards")
    return {name: 1000 * count / num_samples for name, count in found.items()}


def _read(url: str) -> int:
    """Read every sample once, shuffled as training does by default; return the requests."""
    reader = CountingReader(open_reader(url, None))
    dataset = Dataset(open_source(url, reader), reader, columns=["image"], encoded=["image"], buffer_bytes=BUFFER_BYTES)
    order = BlockOrder(dataset.index.blocks.first_sample, 0, 0, 64)
    seen = 0
    for start in range(0, len(dataset), BATCH_SIZE):
        seen += len(dataset.__getitems__(order.take(start, min(start + BATCH_SIZE, len(dataset)))))
    assert seen == len(np.unique(order.take(0, len(dataset))))
    return sum(map(len, reader.requests)) + len(reader.objects) + len(reader.heads) + len(reader.listed)
