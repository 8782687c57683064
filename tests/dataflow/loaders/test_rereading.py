"""Who shuffles native data sample by sample is told what that costs, where it costs anything, once."""

import math

import pyarrow as pa
import pytest
import torch
from torch.utils.data import DistributedSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from connectors.errors import TransientError
from dataflow import DataLoader, ElasticBatchSampler, ShardWriter, open_dataset
from dataflow.loaders import rereading
from dataflow.loaders.rereading import reads_of_a_block
from dataflow.testing import PlannedReader

SAMPLES = 640
BATCH = 8


class Cached(PlannedReader):
    """Has a cache behind it that keeps so many bytes, or an answer that is an error."""

    kept_bytes = 0
    questions = 0

    def stats(self):
        self.questions += 1
        if self.kept_bytes is None:
            raise TransientError("the server is gone")
        half = self.kept_bytes // 2
        return {"tiers": [{"name": "ram", "capacity_bytes": half}], "ring": {"name": "ring", "capacity_bytes": half}}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "numbers"
    with ShardWriter(
        folder, pa.schema([("number", pa.int64()), ("text", pa.string())]), block_size_bytes=6000
    ) as writer:
        for number in range(SAMPLES):
            writer.write({"number": number, "text": f"{number:03}" * 50})
    return folder


@pytest.fixture
def open_cached(url):
    """Open the data set behind a cache."""
    rereading._warn.cache_clear()
    opened = []

    def open_cached(kept_bytes=0, buffer_bytes=0, reader=Cached):
        dataset = open_dataset(url, buffer_bytes=buffer_bytes)
        opened.append(dataset.reader)
        dataset._reader = reader(dataset._reader)
        dataset._reader.kept_bytes = kept_bytes
        return dataset

    yield open_cached
    for reader in opened:
        reader.close()


def size_of(dataset):
    return int(dataset.index.ranges.length.sum())


def spoken(caplog):
    return [record.getMessage() for record in caplog.records if record.name == rereading.__name__]


RANDOM = {
    "RandomSampler": lambda data: {"batch_size": BATCH, "shuffle": True},
    "no batches": lambda data: {"batch_size": None, "sampler": RandomSampler(data)},
    "SubsetRandomSampler": lambda data: {"batch_size": BATCH, "sampler": SubsetRandomSampler(range(SAMPLES // 2))},
    "WeightedRandomSampler": lambda data: {
        "batch_size": BATCH,
        "sampler": WeightedRandomSampler([1.0] * SAMPLES, SAMPLES),
    },
    "DistributedSampler": lambda data: {"batch_size": BATCH, "sampler": DistributedSampler(data, 2, 0)},
}


@pytest.mark.parametrize("way", RANDOM)
def test_it_is_said_once_by_the_samplers_name_and_with_the_way_out(open_cached, caplog, way):
    for _ in range(2):
        dataset = open_cached()
        loader = DataLoader(dataset, **RANDOM[way](dataset))
        for _ in range(2):
            next(iter(loader))
    (text,) = spoken(caplog)
    assert text.startswith("RandomSampler" if way == "no batches" else way)
    assert "ElasticBatchSampler" in text
    assert "\n" not in text


def test_the_number_is_what_is_read(open_cached, caplog):
    dataset = open_cached()
    generator = torch.Generator().manual_seed(2)
    for _ in DataLoader(dataset, batch_size=BATCH, shuffle=True, generator=generator):
        pass
    read = sum(map(len, dataset.reader.requests)) / dataset.index.num_blocks
    foretold = reads_of_a_block(samples=SAMPLES, batch_size=BATCH, num_blocks=dataset.index.num_blocks, kept_share=0)
    assert foretold == pytest.approx(read, rel=0.1)
    assert f"each block some {foretold:,.0f} times" in spoken(caplog)[0]


@pytest.mark.parametrize(
    "options",
    [
        lambda data: {"batch_size": BATCH},
        lambda data: {"batch_size": BATCH, "sampler": DistributedSampler(data, 2, 0, shuffle=False)},
        lambda data: {"batch_sampler": ElasticBatchSampler(data, BATCH, rank=0, world_size=1)},
        lambda data: {"batch_size": BATCH, "sampler": SubsetRandomSampler(range(0, SAMPLES, 40))},
    ],
    ids=["in order", "dealt in order", "by blocks", "few of them"],
)
def test_nothing_is_said_or_asked_of_who_reads_few_blocks_twice(open_cached, caplog, options):
    dataset = open_cached()
    next(iter(DataLoader(dataset, **options(dataset))))
    assert spoken(caplog) == []
    assert dataset.reader.questions == 0


def test_nothing_is_said_where_all_is_kept(open_cached, caplog):
    size_bytes = size_of(open_cached())
    for dataset in (open_cached(kept_bytes=2 * size_bytes), open_cached(buffer_bytes=2 * size_bytes)):
        next(iter(DataLoader(dataset, batch_size=BATCH, shuffle=True)))
        assert dataset.reader.questions == 1
    assert spoken(caplog) == []


def test_files_that_are_read_in_place_are_no_matter(open_cached, url, caplog):
    behind_a_ladder = open_cached(reader=PlannedReader)  # which fell back to reading in place
    for dataset in (behind_a_ladder, open_dataset(url, buffer_bytes=0)):
        next(iter(DataLoader(dataset, batch_size=BATCH, shuffle=True)))
    assert spoken(caplog) == []


def test_samples_with_a_block_each_are_no_matter(tmp_path, open_cached, caplog):
    with ShardWriter(tmp_path / "single", pa.schema([("text", pa.string())]), block_size_bytes=1) as writer:
        for _ in range(20):
            writer.write({"text": "x" * 50})
    dataset = open_dataset(tmp_path / "single", buffer_bytes=0)
    assert dataset.index.num_blocks == 20
    dataset._reader = Cached(dataset._reader)
    next(iter(DataLoader(dataset, batch_size=BATCH, shuffle=True)))
    assert spoken(caplog) == []
    dataset.reader.close()


def test_a_server_that_is_gone_is_not_this_matter(open_cached, caplog):
    dataset = open_cached(kept_bytes=None)
    next(iter(DataLoader(dataset, batch_size=BATCH, shuffle=True)))
    assert dataset.reader.questions == 1
    assert spoken(caplog) == []


def test_a_batch_reads_a_block_once():
    assert reads_of_a_block(samples=100, batch_size=100, num_blocks=1, kept_share=0) == 1
    assert reads_of_a_block(samples=100, batch_size=1, num_blocks=10, kept_share=0) == pytest.approx(10)
    assert reads_of_a_block(samples=100, batch_size=1, num_blocks=10, kept_share=0.9) == pytest.approx(1)
    assert reads_of_a_block(samples=100, batch_size=10, num_blocks=10, kept_share=0) == pytest.approx(
        10 * (1 - math.pow(0.9, 10))
    )
