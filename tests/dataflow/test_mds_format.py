"""MDS, against what MosaicML Streaming wrote."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from connectors.errors import BadInputError, CorruptError
from dataflow.convert import convert
from dataflow.dataset import open_dataset
from dataflow.formats import mds

DATA = Path(__file__).parent / "data"
COUNT = 20


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr(mds, "BLOCK_BYTES", 400)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    shutil.copytree(DATA / "mds-plain", tmp_path / "set")
    return tmp_path / "set"


def check(sample: dict, number: int) -> None:
    assert sample["n"] == -number
    assert sample["u8"] == number
    assert sample["u8"].dtype == np.uint8
    assert sample["f"] == number / 2
    assert sample["t"] == f"é{number}"
    assert sample["b"] == bytes([number]) * number
    assert json.loads(sample["j"]) == {"n": number}
    np.testing.assert_array_equal(sample["p"], np.full((4, 5, 3), number, np.uint8))
    np.testing.assert_array_equal(sample["a"], np.arange(6, dtype=np.int16).reshape(2, 3) * number)
    assert sample["s"] == number * 10


@pytest.mark.parametrize("name", ["plain", "zstd"])
def test_what_streaming_writes_comes_back(name: str) -> None:
    dataset = open_dataset(DATA / f"mds-{name}")
    assert dataset.source.format == "mds"
    assert len(dataset) == COUNT
    shards = len(dataset.index.shards)
    assert shards == 2
    assert dataset.index.num_blocks == shards if name == "zstd" else dataset.index.num_blocks > 2 * shards
    for number, sample in enumerate(dataset):
        check(sample, number)
    for sample, number in zip(dataset.__getitems__([19, 0, 11]), [19, 0, 11], strict=True):
        check(sample, number)


def test_mds_converts_to_native_shards(path: Path, tmp_path: Path) -> None:
    convert(path, tmp_path / "out", shard_size_bytes=2000, block_size_bytes=500)
    for number, sample in zip(range(COUNT), open_dataset(tmp_path / "out"), strict=True):
        check(sample, number)


def change(path: Path, **changes: object) -> None:
    content = json.loads((path / "index.json").read_text())
    for shard in content["shards"]:
        shard.update(changes)
    (path / "index.json").write_text(json.dumps(content))


@pytest.mark.parametrize("encoding", ["pkl", "pil", "ndarray", "ndarray:int16", "list[png]"])
def test_an_encoding_that_is_not_supported_is_named(path: Path, encoding: str) -> None:
    content = json.loads((path / "index.json").read_text())
    change(path, column_encodings=[encoding, *content["shards"][0]["column_encodings"][1:]])
    with pytest.raises(BadInputError, match=r"MDS encoding .* is not supported"):
        open_dataset(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"column_names": ["a"]},
        {"column_names": ["a", "a"], "column_encodings": ["int", "int"]},
        {"column_names": ["a"], "column_encodings": ["ndarray:nonsense:1"]},
        {"column_names": ["a"], "column_encodings": ["ndarray:object:1"]},
        {"column_names": ["a"], "column_encodings": ["ndarray:int8:x"]},
        {"column_names": [], "column_encodings": []},
    ],
)
def test_columns_that_make_no_sense_are_refused(path: Path, changes: dict) -> None:
    change(path, **changes)
    with pytest.raises(BadInputError, match=r"index\.json describes no columns that can be read"):
        open_dataset(path)


def test_an_unknown_compression_is_named(path: Path) -> None:
    shard = {"basename": "shard.00000.mds", "bytes": (path / "shard.00000.mds").stat().st_size}
    content = json.loads((path / "index.json").read_text())
    content["shards"] = content["shards"][:1]
    (path / "index.json").write_text(json.dumps(content))
    change(path, compression="snappy", zip_data=shard)
    with pytest.raises(BadInputError, match="compression 'snappy' is not supported"):
        open_dataset(path)


def test_a_missing_shard_is_named(path: Path) -> None:
    (path / "shard.00001.mds").unlink()
    with pytest.raises(CorruptError, match=r"shard\.00001\.mds is missing"):
        open_dataset(path)


def test_a_truncated_shard_is_named(path: Path) -> None:
    shard = path / "shard.00001.mds"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CorruptError, match=r"shard\.00001\.mds has \d+ bytes, .*index\.json says"):
        open_dataset(path)


@pytest.mark.parametrize("offset", [0, 4, 9])
def test_a_damaged_table_is_named(path: Path, offset: int) -> None:
    shard = path / "shard.00001.mds"
    content = bytearray(shard.read_bytes())
    content[offset] ^= 0x80
    shard.write_bytes(content)
    with pytest.raises(CorruptError, match=r"shard\.00001\.mds"):
        open_dataset(path).get_batch(range(COUNT))


def test_a_damaged_sample_is_named(path: Path) -> None:
    shard = path / "shard.00000.mds"
    ref = open_dataset(path).index.block_ref(0)
    content = bytearray(shard.read_bytes())
    content[ref.offset + 3] = 0xFF
    shard.write_bytes(content)
    with pytest.raises(CorruptError, match=rf"samples at offset {ref.offset} of .*shard\.00000\.mds are damaged"):
        open_dataset(path)[0]


def test_an_integer_of_more_than_64_bits_is_refused_in_words(path: Path) -> None:
    sample = struct.pack("<I", 20) + b"18446744073709551616"
    (path / "shard.00000.mds").write_bytes(struct.pack("<III", 1, 12, 12 + len(sample)) + sample)
    shard = {"column_encodings": ["str_int"], "column_names": ["n"], "column_sizes": [None], "format": "mds"}
    shard |= {"raw_data": {"basename": "shard.00000.mds", "bytes": 12 + len(sample)}, "samples": 1, "version": 2}
    (path / "index.json").write_text(json.dumps({"version": 2, "shards": [shard]}))
    with pytest.raises(BadInputError, match=r"shard\.00000\.mds have an integer of more than 64 bits"):
        open_dataset(path)[0]


def test_an_index_without_shards_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"shards": [], "version": 2}')
    with pytest.raises(BadInputError, match=r"index\.json names no shards"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("content", [b'{"hello": "world"}', b'{"hello": "\xff"}', b"no JSON"])
def test_another_index_json_is_no_mds(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "index.json").write_bytes(content)
    (tmp_path / "a.txt").write_text("one\n")
    assert open_dataset(tmp_path).source.format == "text"
