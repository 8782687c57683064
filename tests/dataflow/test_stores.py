"""Datasets in stores that are no local disk."""

import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cache.config import CacheConfig, TierConfig
from connectors.errors import BadInputError
from connectors.testing.seaweed import SeaweedServer
from dataflow.convert import convert
from dataflow.dataset import Dataset, open_dataset
from dataflow.dataset.verification import verify
from dataflow.formats import tensor_field
from dataflow.formats.arrow import ShardWriter

COUNT = 200
SCHEMA = pa.schema([tensor_field("x", np.float32, (16,)), pa.field("text", pa.string())])
SIZES = {"block_size_bytes": 1000, "shard_size_bytes": 5000}
TIERS = CacheConfig(tiers=(TierConfig("ram", capacity_bytes=64 << 10),), ring_bytes=64 << 10)


def write(url: str | Path) -> None:
    with ShardWriter(url, SCHEMA, **SIZES) as writer:
        for number in range(COUNT):
            writer.write({"x": np.full(16, number, np.float32), "text": str(number)})


def check(dataset: Dataset) -> None:
    for numbers in np.random.default_rng(0).permutation(COUNT).reshape(-1, 20):
        batch = dataset.get_batch(numbers)
        assert batch["x"][:, 3].tolist() == numbers.tolist()
        assert batch["text"] == [str(number) for number in numbers]


def test_memory_is_a_store_like_any_other(tmp_path: Path) -> None:
    root = f"memory://{uuid.uuid4().hex}"
    write(f"{root}/one")
    check(open_dataset(f"{root}/one"))
    convert(f"{root}/one", f"{root}/two", **SIZES)
    convert(f"{root}/one", tmp_path / "three", to="parquet", **SIZES)
    check(open_dataset(f"{root}/two"))
    with pytest.raises(BadInputError, match="lives in one process"):
        convert(f"{root}/one", f"{root}/four", workers=2, **SIZES)


def test_local_files_are_read_through_a_cache_where_that_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "set")
    dataset = open_dataset(tmp_path / "set", cache=TIERS)
    try:
        check(dataset)
        assert verify(dataset).num_problems == 0
    finally:
        dataset.reader.close()


@pytest.mark.s3
@pytest.mark.parametrize("to", ["arrow", "parquet", "webdataset"])
def test_a_bucket_is_converted_to_by_workers_and_read_through_a_cache(
    s3_server: SeaweedServer, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write(tmp_path / "set")
    convert(tmp_path / "set", f"s3://{s3_bucket}/set", to=to, fields=["text"], workers=2, **SIZES)
    dataset = open_dataset(f"s3://{s3_bucket}/set", cache=TIERS)
    try:
        assert dataset.get_batch([199, 0, 77])["text"] == ["199", "0", "77"]
        assert verify(dataset).num_samples == COUNT
    finally:
        dataset.reader.close()
