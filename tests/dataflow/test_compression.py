"""`--compression auto`: by what it saves, the same for the same source."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from connectors.errors import BadInputError
from dataflow.convert import convert
from dataflow.convert.compression import measure_compression
from dataflow.dataset import open_dataset
from dataflow.formats.arrow import ShardWriter

RANDOM = np.random.default_rng(0)
CONTENTS = {
    "noise": lambda _: RANDOM.bytes(2000),
    "repeated": lambda _: b"the same again " * 130,
    # Half of the bits are always zero: nothing repeats, which is all that lz4 sees.
    "narrow": lambda _: (RANDOM.integers(0, 16, 2000, np.uint8)).tobytes(),
}


def source(path: Path, content: str, count: int = 100) -> Path:
    with ShardWriter(path, pa.schema([("data", pa.binary()), ("n", pa.int64())])) as writer:
        for number in range(count):
            writer.write({"data": CONTENTS[content](number), "n": number})
    return path


@pytest.mark.parametrize(("content", "chosen"), [("noise", "none"), ("repeated", "lz4"), ("narrow", "zstd")])
def test_what_saves_a_tenth_is_taken(tmp_path: Path, content: str, chosen: str) -> None:
    convert(source(tmp_path / "in", content), tmp_path / "out", compression="auto", fields=["data"])
    convert(tmp_path / "in", tmp_path / "told", compression=chosen, fields=["data"])
    assert open_dataset(tmp_path / "out").source.manifest.compression == chosen
    for file in (tmp_path / "told").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_only_what_the_format_has_is_measured(tmp_path: Path) -> None:
    dataset = open_dataset(source(tmp_path / "in", "repeated"))
    assert measure_compression(dataset, "mds", 1 << 20, None) == "zstd"
    assert measure_compression(dataset, "webdataset", 1 << 20, None) == "none"


def test_an_empty_source_is_not_compressed(tmp_path: Path) -> None:
    convert(source(tmp_path / "in", "noise", 0), tmp_path / "out", compression="auto")
    assert open_dataset(tmp_path / "out").source.manifest.compression == "none"


def test_what_a_map_makes_cannot_be_measured(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="choose one"):
        convert(source(tmp_path / "in", "noise"), tmp_path / "out", compression="auto", map="json:loads")
