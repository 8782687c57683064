"""What other libraries write is read here, and what is written here is opened by them: the same values, byte by byte.

Each library runs in a process of its own, from the folder that `make test` installs them in (.ci/libraries.txt). Those
that fit into the environment of the tests are used where their formats are tested.
"""

import io
import itertools
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from dataflow.convert import convert
from dataflow.dataset import open_dataset
from dataflow.formats import audio_field, class_names, field_kind, image_field, tensor_field
from dataflow.formats.arrow import ShardWriter
from dataflow.testing.media import encode_audio, encode_image, picture, sound

LIBRARIES = Path(sys.prefix) / "libraries"
COUNT = 20
SIZES = {"shard_size_bytes": 3000, "block_size_bytes": 1000, "workers": 0}

pytestmark = [
    pytest.mark.skipif(not LIBRARIES.is_dir(), reason="pip install --no-deps --target (see .ci/libraries.txt)"),
    pytest.mark.usefixtures("kept_scans"),
]


def run(script: str, folder: Path) -> Any:
    """Run a script in `folder`, where it may import the libraries; return what it left in `result.pickle`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    environment |= {"PYTHONPATH": str(LIBRARIES), "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return pickle.loads((folder / "result.pickle").read_bytes())


def sample(number: int) -> dict[str, Any]:
    return {
        "n": -number,
        "small": number,
        "share": number / 4,
        "text": "" if number % 5 == 0 else f"é{number}",
        "data": bytes([number]) * (number % 7),
        "matrix": np.full((2, 3), number / 2, np.float32),
        "photo": encode_image(number),
        "sound": encode_audio(sound(number, 30)),
    }


SCHEMA = pa.schema(
    [
        pa.field("n", pa.int64(), nullable=False),
        pa.field("small", pa.uint8(), nullable=False),
        pa.field("share", pa.float64(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("data", pa.binary(), nullable=False),
        tensor_field("matrix", np.float32, (2, 3)),
        image_field("photo"),
        audio_field("sound"),
    ]
)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("native") / "set"
    with ShardWriter(path, SCHEMA) as writer:
        for number in range(COUNT):
            writer.write(sample(number))
    return path


def differences(number: int, found: dict[str, Any]) -> list[str]:
    """Names of the fields that are not those of the sample; images are compared by their pixels."""
    return [name for name, value in sample(number).items() if name in found and not equal(name, value, found[name])]


def equal(name: str, expected: Any, found: Any) -> bool:
    if name == "photo":
        pixels = np.array(Image.open(io.BytesIO(found))) if isinstance(found, bytes) else found
        return np.array_equal(np.array(Image.open(io.BytesIO(expected))), pixels)
    return np.array_equal(expected, found) if isinstance(expected, np.ndarray) else expected == found


STREAMING = """
import importlib.machinery, os, pickle, sys, types

# Imported by the library for datasets that are not asked for here.
for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
    module = sys.modules[name] = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []
    module.VisionDataset, module.to_tensor = object, None

import numpy as np
from streaming import LocalDataset, MDSWriter
from streaming.base.compression import decompress

with open("samples.pickle", "rb") as file:
    samples = pickle.load(file)
columns = {"n": "int", "small": "uint8", "share": "float64", "text": "str", "data": "bytes", "photo": "png",
           "sound": "bytes", "matrix": "ndarray:float32:2,3"}
for name, compression in {"plain": None, "zstd": "zstd:7", "gz": "gz", "br": "br", "bz2": "bz2"}.items():
    with MDSWriter(out=name, columns=columns, compression=compression, hashes=["sha1"], size_limit=4000) as writer:
        for sample in samples:
            writer.write(sample)
for name in os.listdir("packed"):
    if name.endswith(".zstd"):
        with open(f"packed/{name}", "rb") as packed, open(f"packed/{name[:-5]}", "wb") as plain:
            plain.write(decompress("zstd", packed.read()))
read = {}
for name in ("ours", "packed"):
    read[name] = [dict(sample) | {"photo": np.array(sample["photo"])} for sample in LocalDataset(name)]
with open("result.pickle", "wb") as file:
    pickle.dump(read, file)
"""


def test_mds_both_ways_with_streaming(native: Path, tmp_path: Path) -> None:
    pictures = [sample(number) | {"photo": Image.fromarray(picture(number))} for number in range(COUNT)]
    (tmp_path / "samples.pickle").write_bytes(pickle.dumps(pictures))
    convert(native, tmp_path / "ours", to="mds", **SIZES)
    convert(native, tmp_path / "packed", to="mds", compression="zstd", **SIZES)
    for rows in run(STREAMING, tmp_path).values():
        assert [differences(number, row) for number, row in enumerate(rows)] == [[]] * COUNT
        assert rows[0].keys() == sample(0).keys()
    for name in ("plain", "zstd", "gz", "br", "bz2"):
        theirs = open_dataset(tmp_path / name, encoded=["photo"])
        assert len(theirs.index.shards) > 1
        assert theirs.schema.names == sorted(SCHEMA.names)
        assert [differences(number, row) for number, row in enumerate(theirs)] == [[]] * COUNT


LITDATA = """
import pickle

from litdata import Audio, Video
from litdata.streaming.writer import BinaryWriter

with open("samples.pickle", "rb") as file:
    samples = pickle.load(file)
wraps = {"plain": {}}
for level in ("chunk", "batch", "sample"):
    wraps[level] = {"compression": "zstd", "compression_level": level}
wraps["batch"]["compression_batch_size"] = 2
for name, options in wraps.items():
    writer = BinaryWriter(name, chunk_bytes=5000, **options)
    for number, sample in enumerate(samples):
        writer[number] = sample | {"sound": Audio(bytes=sample["sound"]), "clip": Video(bytes=sample["data"] + b"-")}
    writer.done()
    writer.merge()
with open("result.pickle", "wb") as file:
    pickle.dump(None, file)
"""


def test_litdata_is_read(tmp_path: Path) -> None:
    rows = [{name: value for name, value in sample(number).items() if name != "photo"} for number in range(COUNT)]
    (tmp_path / "samples.pickle").write_bytes(pickle.dumps(rows))
    run(LITDATA, tmp_path)
    for wrap in ("plain", "chunk", "batch", "sample"):
        theirs = open_dataset(tmp_path / wrap)
        assert len(theirs) == COUNT
        assert len(theirs.index.shards) > 1
        assert {field_kind(theirs.schema.field(name)) for name in ("sound", "clip")} == {"audio", "video"}
        for number, row in enumerate(theirs):
            assert differences(number, row) == []
            assert row["clip"] == sample(number)["data"] + b"-"
            assert row.keys() == rows[0].keys() | {"clip"}


DATASETS = """
import pickle

from datasets import Audio, ClassLabel, Dataset, Features, Image, List, Value

with open("samples.pickle", "rb") as file:
    samples = pickle.load(file)
file = {"bytes": Value("binary"), "path": Value("string")}  # to encode sound itself, the library needs another one
features = Features({
    "n": Value("int64"), "small": Value("uint8"), "share": Value("float64"), "text": Value("string"),
    "data": Value("binary"), "photo": Image(), "sound": file, "kind": ClassLabel(names=["ant", "bee"]),
    "many": List(Value("int32")),
})
rows = [
    {name: sample[name] for name in ("n", "small", "share", "text", "data")}
    | {"photo": {"bytes": sample["photo"], "path": None}, "sound": {"bytes": sample["sound"], "path": None}}
    | {"kind": number % 2, "many": list(range(number % 3))}
    for number, sample in enumerate(samples)
]
theirs = Dataset.from_list(rows, features=features).cast_column("sound", Audio(decode=False))
theirs.save_to_disk("theirs", num_shards=3)
read = {name: list(Dataset.from_parquet(f"{name}/*.parquet", cache_dir="cache")) for name in ("ours", "packed")}
with open("result.pickle", "wb") as file:
    pickle.dump(read, file)
"""


def test_huggingface_both_ways_with_datasets(native: Path, tmp_path: Path) -> None:
    (tmp_path / "samples.pickle").write_bytes(pickle.dumps([sample(number) for number in range(COUNT)]))
    fields = [name for name in SCHEMA.names if name != "matrix"]
    convert(native, tmp_path / "ours", to="parquet", fields=fields, **SIZES)
    convert(native, tmp_path / "packed", to="parquet", compression="zstd", fields=fields, **SIZES)
    for rows in run(DATASETS, tmp_path).values():
        assert [differences(number, row) for number, row in enumerate(rows)] == [[]] * COUNT
        assert list(rows[0]) == fields
    theirs = open_dataset(tmp_path / "theirs", encoded=["photo"])
    assert len(theirs.index.shards) == 3
    assert class_names(theirs.schema.field("kind")) == ["ant", "bee"]
    assert [field_kind(theirs.schema.field(name)) for name in ("photo", "sound")] == ["image", "audio"]
    for number, row in enumerate(theirs):
        assert differences(number, row) == []
        assert (row["kind"], row["many"].tolist()) == (number % 2, list(range(number % 3)))


def test_native_shards_are_opened_by_polars_and_duckdb(native: Path, tmp_path: Path) -> None:
    shutil.copytree(native, tmp_path / "set")
    script = """
import glob, pickle
import duckdb, polars
import pyarrow as pa

seen = {"polars": [], "duckdb": []}
for shard in sorted(glob.glob("set/shard-*.arrow")):
    frame = polars.read_ipc(shard)
    seen["polars"] += [(row["n"], row["text"], row["data"], [*row["matrix"]]) for row in frame.iter_rows(named=True)]
    rows = pa.ipc.open_file(shard).read_all()
    for n, text, data, matrix in duckdb.sql("select n, text, data, matrix from rows").fetchall():
        seen["duckdb"].append((n, text, data, [*matrix]))
with open("result.pickle", "wb") as file:
    pickle.dump(seen, file)
"""
    expected = [
        (one["n"], one["text"], one["data"], one["matrix"].ravel().tolist()) for one in map(sample, range(COUNT))
    ]
    assert run(script, tmp_path) == {"polars": expected, "duckdb": expected}


RESUME_STREAM = """
import itertools, pickle
from datasets import Dataset
from dataflow import DataLoader

def load():
    stream = Dataset.from_dict({"n": range(20)}).to_iterable_dataset(num_shards=4)
    return DataLoader(stream, batch_size=3, **OPTIONS)

def epoch(batches):
    return [batch["n"].tolist() for batch in batches]

def resumed(state):
    loader = load()
    loader.load_state_dict(state)
    return [epoch(loader) for _ in range(3)]

loader = load()
whole, state = epoch(loader), loader.state_dict()
assert epoch(loader) == whole
found = [resumed(state)]
iterator = iter(loader)
for done in range(len(whole) + 1):
    found.append(resumed(loader.state_dict()))
    next(iterator, None)
pickle.dump((whole, found), open("result.pickle", "wb"))
"""


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_workers": 1, "workers": "thread"},
        {"num_workers": 2, "persistent_workers": True},
    ],
    ids=["inline", "thread", "processes"],
)
def test_a_huggingface_stream_is_whole_in_each_epoch_after_the_one_it_was_resumed_in(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    whole, (between, *within) = run(RESUME_STREAM.replace("OPTIONS", repr(options)), tmp_path)
    assert sorted(itertools.chain(*whole)) == list(range(20))
    assert between == [whole] * 3
    assert within == [[whole[done:], whole, whole] for done in range(len(whole) + 1)]
