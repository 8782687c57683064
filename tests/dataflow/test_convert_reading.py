"""Reading chosen samples: in bounded memory, few batches for many small blocks."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dataflow.convert import convert
from dataflow.convert.reading import read_samples
from dataflow.dataset import Dataset, open_dataset
from dataflow.formats.arrow import ShardWriter
from dataflow.formats.destination import Destination

ROWS, BLOCKS, VALUE_BYTES = 9, 40, 110_000


@pytest.fixture
def packed(tmp_path: Path) -> Dataset:
    """Forty blocks, each a thousand times larger in memory than on disk."""
    with ShardWriter(tmp_path / "set", pa.schema([pa.field("x", pa.binary())]), compression="zstd") as writer:
        for number in range(ROWS * BLOCKS):
            writer.write({"x": number.to_bytes(4, "big") + bytes(VALUE_BYTES)})
    dataset = open_dataset(tmp_path / "set", cache=None)
    assert dataset.index.num_blocks == BLOCKS
    return dataset


def test_a_sample_that_is_kept_does_not_keep_its_block(packed: Dataset) -> None:
    before = pa.total_allocated_bytes()
    kept = list(read_samples(packed, ["x"], np.arange(0, len(packed), ROWS)))
    assert sum(batch.num_rows for _, batch in kept) == BLOCKS
    assert pa.total_allocated_bytes() - before < 1.1 * BLOCKS * VALUE_BYTES


def test_well_packed_blocks_come_one_after_the_other(packed: Dataset) -> None:
    before, most, found = pa.total_allocated_bytes(), 0, []
    for numbers, batch in read_samples(packed, ["x"], np.arange(len(packed))):
        found += numbers.tolist()
        assert [value[:4] for value in batch.column("x").to_pylist()] == [
            n.to_bytes(4, "big") for n in numbers.tolist()
        ]
        most = max(most, pa.total_allocated_bytes() - before)
    assert found == list(range(len(packed)))
    assert most < 6 << 20


def test_small_files_come_together(tmp_path: Path) -> None:
    for number in range(20):
        folder = tmp_path / f"c{number % 2}"
        folder.mkdir(exist_ok=True)
        (folder / f"{number:02}.jpg").write_bytes(b"\xff\xd8\xff" + bytes(number))
    dataset = open_dataset(tmp_path, cache=None)
    ((numbers, batch),) = read_samples(dataset, ["image", "label"], np.arange(20))
    assert numbers.tolist() == list(range(20))
    assert batch.column("label").to_pylist() == [0] * 10 + [1] * 10
    assert [len(value) for value in batch.column("image").to_pylist()] == [
        3 + n for n in [*range(0, 20, 2), *range(1, 20, 2)]
    ]


@pytest.mark.parametrize("to", ["arrow", "webdataset", "mds"])
def test_a_conversion_holds_a_shard_and_not_the_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path / "set", pa.schema([pa.field("x", pa.binary())]), compression="lz4") as writer:
        for _ in range(160):
            writer.write({"x": rng.bytes(100_000)})
    held: list[int] = []

    def put(self: Destination, name: str, chunks: Iterable[bytes]) -> None:
        chunks = list(chunks)
        held.append(pa.total_allocated_bytes() - before)
        original(self, name, chunks)

    original, before = Destination.put, pa.total_allocated_bytes()
    monkeypatch.setattr(Destination, "put", put)
    result = convert(tmp_path / "set", tmp_path / "out", to=to, workers=0, shard_size_bytes=2 << 20)
    assert result.num_shards == 8
    assert len(held) >= 16
    assert max(held) < 5 << 20
