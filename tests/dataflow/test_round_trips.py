"""Every source into every format that is written: what it can hold comes back, what it cannot is refused in words.

`HOLDS` says which fields those are, by their types, as docs/reference/formats.md does. Fields with nulls are left out
where a format has none; test_targets.py has what is said of them.
"""

import gzip
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from connectors.errors import BadInputError
from dataflow.convert import convert
from dataflow.dataset import Dataset, open_dataset
from dataflow.formats import audio_field, field_kind, image_field, tensor_field, video_field
from dataflow.formats.arrow import ShardWriter
from dataflow.formats.writable import WRITABLE, make_target
from dataflow.loaders import DataLoader, ElasticBatchSampler
from dataflow.loaders.announcer import block_table
from dataflow.testing.media import encode_audio, encode_image, encode_video, frames, sound

DATA = Path(__file__).parent / "data"
COUNT = 7
SCHEMA = pa.schema(
    [
        pa.field("schlüssel", pa.string(), nullable=False),
        pa.field("text", pa.string()),
        image_field("photo"),
        audio_field("sound").with_nullable(True),
        video_field("clip"),
        pa.field("blob", pa.binary()),
        pa.field("label", pa.int64(), nullable=False),
        pa.field("small", pa.uint8(), nullable=False),
        pa.field("share", pa.float64(), nullable=False),
        pa.field("flag", pa.bool_(), nullable=False),
        pa.field("age", pa.int32()),
        tensor_field("matrix", np.float32, (2, 3)),
        tensor_field("cube", np.uint8, (2, 2, 2)),
        tensor_field("halves", np.float16, (4,)),
        pa.field("tokens", pa.list_(pa.int64()), nullable=False),
        pa.field("names", pa.list_(pa.string())),
        pa.field("box", pa.struct({"x": pa.float64(), "tags": pa.list_(pa.string())})),
    ]
)
TEXTS = ["", None, "日本語", 'line\nbreak, "quotes"', "🙂 e\u0301", " ", "plain"]


def sample(number: int) -> dict[str, Any]:
    return {
        "schlüssel": f"ключ-{number}",
        "text": TEXTS[number],
        "photo": encode_image(number, "jpeg"),
        "sound": None if number == 3 else encode_audio(sound(number, 40), ["flac", "wav"][number % 2]),
        "clip": encode_video(frames(2), ["gif", "mp4"][number % 2]),
        "blob": None if number == 2 else bytes([number]) * number,
        "label": -number,
        "small": 250 + number % 5,
        "share": number / 4,
        "flag": number % 2 == 0,
        "age": None if number == 5 else number,
        "matrix": np.full((2, 3), number / 2, np.float32),
        "cube": np.full((2, 2, 2), number, np.uint8),
        "halves": np.full(4, number / 8, np.float16),
        "tokens": list(range(number % 4)),
        "names": None if number == 1 else ["é"] * (number % 3),
        "box": None if number == 4 else {"x": number / 2, "tags": ["a"] * (number % 3)},
    }


def sizes(to: str) -> dict[str, int]:
    """Several shards and blocks; but Megatron refuses a shard without any tokens."""
    return {"shard_size_bytes": 1 << 20 if to == "megatron" else 6000, "block_size_bytes": 2000, "workers": 0}


def native(path: Path) -> None:
    with ShardWriter(path, SCHEMA) as writer:
        for number in range(COUNT):
            writer.write(sample(number))


def of_python(path: Path) -> None:
    rows = [{name: value for name, value in sample(number).items() if name != "box"} for number in range(COUNT)]
    convert(rows, path)


def table(path: Path) -> None:
    path.mkdir()
    rows = "".join(f'{n},{n / 4},"té,{n}\n"\n' for n in range(COUNT))
    (path / "a.csv").write_text("n,share,text\n" + rows)


def lines(path: Path) -> None:
    path.mkdir()
    (path / "a.txt").write_text("".join(f"Zeile {n} ü\n" for n in range(COUNT)))


def folder(path: Path) -> None:
    for number in range(COUNT):
        (path / "ä" / "deep").mkdir(parents=True, exist_ok=True)
        (path / "ä" / "deep" / f"{number}.wav").write_bytes(encode_audio(sound(number, 40), "wav"))
        (path / "ä" / f"{number}.jpg").write_bytes(encode_image(number, "jpeg"))


def folder_with_table(path: Path) -> None:
    folder(path)
    rows = "".join(f"ä/{n}.jpg,{n},Wort {n}\n" for n in range(COUNT))
    (path / "metadata.csv").write_text("file_name,n,word\n" + rows)


def theirs(name: str) -> Callable[[Path], Any]:
    return lambda path: shutil.copytree(DATA / name, path)


# Sources that are not written by a conversion of the native one.
READ_ONLY: dict[str, Callable[[Path], Any]] = {
    "csv": table,
    "folder": folder,
    "folder with table": folder_with_table,
    "huggingface": theirs("huggingface"),
    "litdata": theirs("litdata"),
    "mds of streaming": theirs("mds-zstd"),
    "python": of_python,
    "text": lines,
}
PACKED = ("jsonl", "webdataset")

# What a field must be to be held


def is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def is_tensor(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.FixedShapeTensorType)


def is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind))


def is_scalar(kind: pa.DataType) -> bool:
    return is_number(kind) or bool(pa.types.is_string(kind) or pa.types.is_binary(kind))


def is_sequence(kind: pa.DataType) -> bool:
    return is_list(kind) or (is_tensor(kind) and len(kind.shape) == 1)


def is_token(kind: pa.DataType) -> bool:
    return is_number(kind) and not (pa.types.is_boolean(kind) or pa.types.is_float16(kind) or pa.types.is_uint32(kind))


def has_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(has_bytes(entry.type) for entry in kind)
    return has_bytes(kind.value_type) if is_list(kind) else bool(pa.types.is_binary(kind))


HOLDS: dict[str, Callable[[pa.DataType], bool]] = {
    "arrow": lambda kind: True,
    "jsonl": lambda kind: is_tensor(kind) or not has_bytes(kind),
    "mds": lambda kind: is_scalar(kind) or is_tensor(kind),
    "megatron": lambda kind: (
        (is_list(kind) or (is_tensor(kind) and len(kind.shape) == 1)) and is_token(kind.value_type)
    ),
    "parquet": lambda kind: True,
    "tfrecord": lambda kind: is_scalar(kind) or is_tensor(kind) or (is_list(kind) and is_scalar(kind.value_type)),
    "webdataset": lambda kind: pa.types.is_binary(kind) or not has_bytes(kind),
    "zarr": lambda kind: is_scalar(kind) or is_tensor(kind) or pa.types.is_fixed_size_list(kind),
}
WITHOUT_NULLS = {"mds", "megatron", "zarr"}


def same(to: str, name: str, before: Any, after: Any) -> bool:
    """Whether a value came back, as far as the format keeps it.

    Archives have files: numbers and tensors are `.npy`, what is nested is `.json`. TFRecord keeps neither shapes, nor
    whether one value is a list, nor whether bytes are text.
    """
    if before == after or before is None or after is None:
        return before is after or before == after
    if to == "webdataset" and name.endswith(".npy"):
        return bool(np.load(io.BytesIO(after)).tolist() == before)
    if to == "webdataset" and name.endswith(".json"):
        return bool(json.loads(after) == before)
    return to == "tfrecord" and flat(after) == flat(before)


def flat(value: Any) -> list[Any]:
    if isinstance(value, list):
        return [single for entry in value for single in flat(entry)]
    return [value.encode() if isinstance(value, str) else value]


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def values(path: Path) -> tuple[pa.Schema, dict[str, list[Any]]]:
    """The fields and all values of a dataset, media as the bytes of their files."""
    schema = reading(path).schema
    media = [entry.name for entry in schema if field_kind(entry)]
    numbers: list[str] = []  # those with nulls, which make no array
    while True:
        names = [name for name in schema.names if name not in numbers]
        dataset = reading(path, columns=names, encoded=[name for name in media if name in names])
        try:
            columns = dataset.get_batch(range(len(dataset)))
        except BadInputError as error:
            numbers += re.findall(r"field '(.*)' of sample \d+ is null", str(error))
        else:
            break
    found = {name: [plain(value) for value in column] for name, column in columns.items()}
    for name in numbers:
        found[name] = [number_or_none(reading(path, columns=[name]), place, name) for place in range(len(dataset))]
    return schema, found


def number_or_none(dataset: Dataset, place: int, name: str) -> Any:
    try:
        return plain(dataset[place][name])
    except BadInputError:
        return None


def reading(path: Path, **settings: Any) -> Dataset:
    dataset = open_dataset(path, cache=None, **settings)
    opened.append(dataset)
    return dataset


opened: list[Dataset] = []


@pytest.fixture(autouse=True)
def _all_closed(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "scans"))
    yield
    while opened:
        opened.pop().reader.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "set"
    native(path)
    return path


SOURCES = [*WRITABLE, *(f"{name} gz" for name in PACKED), *READ_ONLY]


@pytest.fixture(scope="module", params=SOURCES)
def source(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name, _, packed = request.param.partition(" ")
    path = tmp_path_factory.mktemp("source") / "set"
    if request.param in READ_ONLY:
        READ_ONLY[request.param](path)
        return path
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "scans"))
        convert(base, path, to=name, fields=held(base, name), **sizes(name))
    if packed:
        for file in list(path.iterdir()):
            file.with_name(file.name + ".gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
    return path


def held(path: Path, to: str) -> list[str]:
    """The fields of a dataset that a format holds, checked against what the format itself says."""
    schema, columns = values(path)
    names = []
    for entry in schema:
        target = make_target(to, block_size_bytes=2000, compression="none")
        if not HOLDS[to](entry.type) or (to == "zarr" and entry.name == "__key__"):
            with pytest.raises(BadInputError, match=re.escape(repr(entry.name))):
                target.stored_schema(pa.schema([entry]))
            continue
        target.stored_schema(pa.schema([entry]))
        if to not in WITHOUT_NULLS or None not in columns[entry.name]:
            names.append(entry.name)
    return names[:1] if to == "megatron" else names


@pytest.mark.parametrize("to", WRITABLE)
def test_everything_that_a_format_holds_comes_back(source: Path, tmp_path: Path, to: str) -> None:
    names = held(source, to)
    if not names:
        with pytest.raises(BadInputError, match=to):
            convert(source, tmp_path / "out", to=to, **sizes(to))
        return
    convert(source, tmp_path / "out", to=to, fields=names, **sizes(to))
    schema, before = values(source)
    stored, after = values(tmp_path / "out")
    for name in names:
        # In archives, files of several codecs are as many fields.
        places = [place for place in stored.names if to == "megatron" or f"{place}.".startswith(f"{name}.")]
        found = [
            next((value for value in row if value is not None), None)
            for row in zip(*(after[place] for place in places), strict=True)
        ]
        assert len(found) == len(before[name])
        assert [pair for pair in zip(before[name], found, strict=True) if not same(to, places[0], *pair)] == []
        if to in ("arrow", "parquet", "webdataset"):
            assert {field_kind(stored.field(place)) for place in places} == {field_kind(schema.field(name))}


def test_every_format_is_shuffled_planned_and_resumed_by_its_index(source: Path) -> None:
    schema, columns = values(source)
    name = next(name for name in schema.names if None not in columns[name])
    media = [name] if field_kind(schema.field(name)) else []
    dataset = reading(source, columns=[name], encoded=media)

    def loader() -> DataLoader[list[Any]]:
        order = ElasticBatchSampler(dataset, 2, seed=3)
        return DataLoader(dataset, batch_sampler=order, collate_fn=lambda samples: [one[name] for one in samples])

    numbers = [number for batch in ElasticBatchSampler(dataset, 2, seed=3) for number in batch]
    assert sorted(numbers) == list(range(len(dataset)))
    undisturbed = [plain(value) for batch in loader() for value in batch]
    assert undisturbed == [columns[name][number] for number in numbers]
    first, second = loader(), loader()
    begun = [plain(value) for value in next(iter(first))]
    second.load_state_dict(first.state_dict())
    assert begun + [plain(value) for batch in second for value in batch] == undisturbed
    assert len(block_table(dataset.index)) == len(dataset.index.ranges) >= 1


def test_the_sample_set_itself_comes_back_from_native_shards(base: Path) -> None:
    schema, columns = values(base)
    assert schema.equals(SCHEMA, check_metadata=True)
    for name in SCHEMA.names:
        assert columns[name] == [plain(sample(number)[name]) for number in range(COUNT)]
