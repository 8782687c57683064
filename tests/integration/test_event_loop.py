"""The synchronous interface where an event loop runs already: a cell of a notebook, a coroutine of a service."""

import os
import subprocess
import sys

import pytest

CELL = """
import asyncio, sys
import numpy as np
import pyarrow as pa
from dataflow import DataLoader, ElasticBatchSampler, ShardWriter, open_dataset
from dataflow.convert import convert

async def cell(root):
    with ShardWriter(f"{root}/one", pa.schema([("x", pa.int64())]), block_size_bytes=100) as writer:
        writer.write_columns({"x": np.arange(64)})
    assert convert(f"{root}/one", f"{root}/two", to="jsonl").num_samples == 64
    for url, workers in [(f"{root}/one", 0), (f"{root}/two", 1)]:
        dataset = open_dataset(url)
        assert dataset[5]["x"] == 5
        sampler = ElasticBatchSampler(dataset, 8, rank=0, world_size=1)
        batches = DataLoader(dataset, batch_sampler=sampler, num_workers=workers)
        print(sorted(int(x) for batch in batches for x in batch["x"]) == list(range(64)))
        dataset.reader.close()

for root in sys.argv[1:]:
    asyncio.run(cell(root))
"""


@pytest.mark.s3
def test_a_cell_writes_converts_and_trains(tmp_path, s3_server, s3_bucket):
    # In a process of its own: here, whatever blocks a loop is an error.
    command = [sys.executable, "-c", CELL, str(tmp_path), "memory://cell", f"s3://{s3_bucket}"]
    done = subprocess.run(command, env=os.environ | s3_server.environment(), capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("True\n" * 6, 0), done.stderr
