"""What a byte costs between the cache and the batch: copies per byte, and origin requests per 1,000 samples.

    python benchmarks/data_path.py [--samples 32768]

A batch is gathered into memory that was there before, while every allocation of Python, numpy and Arrow is watched. The
gather itself is one copy; whatever else was allocated on the way, divided by the size of the batch, are the others.
"""

from __future__ import annotations

import argparse
import tempfile
import tracemalloc
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from cache.config import CacheConfig, TierConfig
from dataflow import Dataset, ShardWriter, open_dataset
from dataflow.order import BlockOrder

TOKENS = 2048
BATCH = 64
BLOCK_BYTES = 1 << 20
WINDOW_BLOCKS = 8


class DataPath(NamedTuple):
    """What one pass over a dataset in block order cost."""

    copies_per_byte: float
    origin_requests_per_1000: float


def write_tokens(url: str, num_samples: int) -> None:
    """Write a dataset of `num_samples` rows of 2048 random uint16 tokens."""
    kind = pa.fixed_shape_tensor(pa.uint16(), (TOKENS,))
    rng = np.random.default_rng(0)
    schema = pa.schema([pa.field("tokens", kind, nullable=False)])
    with ShardWriter(url, schema, block_size_bytes=BLOCK_BYTES) as writer:
        for begin in range(0, num_samples, 1024):
            tokens = rng.integers(0, 2**16, (min(1024, num_samples - begin), TOKENS), np.uint16)
            array = pa.FixedShapeTensorArray.from_numpy_ndarray(tokens)
            writer.write_batch(pa.record_batch([array], names=["tokens"]))


def measure(dataset: Dataset, *, epoch: int) -> DataPath:
    """Read one epoch batch by batch, as one rank would."""
    order = BlockOrder(dataset.index.blocks.first_sample, 0, epoch, WINDOW_BLOCKS)
    slots: dict[str, np.ndarray] = {}

    def allocate(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        if name not in slots or slots[name].shape != shape:
            slots[name] = np.empty(shape, dtype)
        return slots[name]

    dataset.get_batch(order.take(0, BATCH), allocate)  # the slots exist from here on
    before = dataset.reader.stats()
    extra_bytes = batch_bytes = 0
    for begin in range(0, len(order), BATCH):
        numbers = order.take(begin, min(begin + BATCH, len(order)))
        arrow_bytes = pa.total_allocated_bytes()
        tracemalloc.start()
        batch = dataset.get_batch(numbers, allocate)
        extra_bytes += tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - arrow_bytes
        tracemalloc.stop()
        batch_bytes += sum(column.nbytes for column in batch.values())
    after = dataset.reader.stats()
    requests = after["origin"]["requests"] - before["origin"]["requests"]
    return DataPath(1 + extra_bytes / batch_bytes, 1000 * requests / len(order))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=32768)
    num_samples = parser.parse_args().samples
    with tempfile.TemporaryDirectory() as folder:
        url = str(Path(folder) / "tokens")
        write_tokens(url, num_samples)
        size = num_samples * TOKENS * 2
        disk = {"path": f"{folder}/cache", "medium": "nvme"}
        caches = {
            "in place": None,
            "ram tier, a third does not fit": _cache(TierConfig("ram", capacity_bytes=2 * size // 3)),
            "disk tier, a third does not fit": _cache(TierConfig("disk", capacity_bytes=2 * size // 3, **disk)),
        }
        print(f"{'':<32} {'epoch':>5} {'copies per byte':>16} {'origin requests per 1,000 samples':>34}")
        for name, cache in caches.items():
            dataset = open_dataset(url, cache=cache, buffer_bytes=2 * WINDOW_BLOCKS * BLOCK_BYTES)
            for epoch in range(3):
                path = measure(dataset, epoch=epoch)
                print(f"{name:<32} {epoch:>5} {path.copies_per_byte:>16.3f} {path.origin_requests_per_1000:>34.2f}")
            dataset.reader.close()


def _cache(tier: TierConfig) -> CacheConfig:
    return CacheConfig(tiers=(tier,), ring_bytes=2 * WINDOW_BLOCKS * BLOCK_BYTES)


if __name__ == "__main__":
    main()
