"""Between the cache and the batch a byte is copied once: by the gather."""

import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from cache.config import CacheConfig, TierConfig
from dataflow import ShardWriter, open_dataset

ROWS, WIDTH, BATCH = 1024, 4096, 128


@pytest.fixture
def url(tmp_path):
    rows = np.arange(ROWS * WIDTH, dtype=np.uint32).reshape(ROWS, WIDTH)
    array = pa.FixedShapeTensorArray.from_numpy_ndarray(rows)
    schema = pa.schema([pa.field("row", array.type, nullable=False)])
    with ShardWriter(str(tmp_path / "set"), schema, block_size_bytes=1 << 20) as writer:
        writer.write_batch(pa.record_batch([array], schema=schema))
    return tmp_path / "set"


@pytest.mark.parametrize(
    "cache", [None, CacheConfig(tiers=(TierConfig("ram", capacity_bytes=64 << 20),))], ids=["in place", "ram tier"]
)
def test_a_batch_is_gathered_straight_into_the_memory_it_is_given(url, cache):
    dataset = open_dataset(url, cache=cache)
    slot = np.zeros((BATCH, WIDTH), np.uint32)
    numbers = np.random.default_rng(0).permutation(ROWS)[:BATCH]
    dataset.get_batch(range(ROWS))  # blocks are in the cache, and mapped
    arrow_bytes = pa.total_allocated_bytes()
    tracemalloc.start()
    batch = dataset.get_batch(numbers, lambda name, shape, dtype: slot)
    extra_bytes = tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - arrow_bytes
    tracemalloc.stop()
    dataset.reader.close()
    assert batch["row"] is slot
    np.testing.assert_array_equal(slot[:, 0], numbers * WIDTH)
    assert extra_bytes < slot.nbytes // 20
