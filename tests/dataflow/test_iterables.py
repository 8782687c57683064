"""Iterables and PyTorch datasets as the source of a conversion."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from connectors.errors import BadInputError, DataError
from dataflow.convert import convert, parse_rule
from dataflow.dataset import open_dataset
from dataflow.formats import field_kind

COUNT = 40


def sample(number: int) -> dict:
    return {
        "n": number,
        "x": np.float32(number / 2),
        "text": None if number % 7 == 3 else f"é{number}",
        "data": bytes([number]),
        "matrix": np.full((2, 3), number, np.int16),
        "many": list(range(number % 4)),
        "photo": Image.fromarray(np.full((3, 4, 3), number, np.uint8)),
    }


class MapStyle(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, number: int) -> tuple:
        return torch.full((2, 2), number, dtype=torch.int32), number % 3


class IterableStyle(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[dict]:
        return map(sample, range(COUNT))


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def test_what_an_iterable_gives_is_written(tmp_path: Path) -> None:
    result = convert(IterableStyle(), tmp_path / "out", shard_size_bytes=2000, block_size_bytes=500)
    written = open_dataset(tmp_path / "out")
    assert (len(written), result.num_samples) == (COUNT, COUNT)
    assert result.num_shards > 1
    assert field_kind(written.schema.field("photo")) == "image"
    assert isinstance(written.schema.field("matrix").type, pa.FixedShapeTensorType)
    for number, row in enumerate(written):
        for name, value in sample(number).items():
            np.testing.assert_array_equal(row[name], np.asarray(value) if name == "photo" else value)
    assert written.source.lineage["source"]["url"] == f"python:{__name__}.IterableStyle"


def test_a_map_style_dataset_of_tuples_is_written_in_order(tmp_path: Path) -> None:
    convert(MapStyle(), tmp_path / "out", split={"train": 3, "val": 1})
    parts = [open_dataset(tmp_path / "out" / name) for name in ("train", "val")]
    assert [len(part) for part in parts] == [30, 10]
    assert all((row["0"] == row["0"][0, 0]).all() and row["0"][0, 0] % 3 == row["1"] for part in parts for row in part)
    assert parts[0].schema.names == ["0", "1"]


def test_equal_iterables_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        convert(({"n": number} for number in range(1000)), tmp_path / name)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_plain_values_are_the_field_data(tmp_path: Path) -> None:
    convert(["a", "b"], tmp_path / "out", to="jsonl")
    assert [row["data"] for row in open_dataset(tmp_path / "out")] == ["a", "b"]


def test_a_schema_says_what_the_first_samples_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataflow.convert.iterables.SAMPLES_TO_INFER", 5)
    rows = [{"n": None if number < 10 else number} for number in range(20)]
    with pytest.raises(BadInputError, match="'n' cannot hold"):
        convert(rows, tmp_path / "out")
    convert(rows, tmp_path / "out", schema=pa.schema([("n", pa.int64())]), rules=[parse_rule("missing field=n")])
    assert [int(row["n"]) for row in open_dataset(tmp_path / "out")] == list(range(10, 20))


def test_a_sample_that_the_first_ones_did_not_announce_is_refused(tmp_path: Path) -> None:
    first = [{"n": 1, "meta": {"a": 1}}] * 300
    with pytest.raises(BadInputError, match=r"field 'n' cannot hold a value as int64: 1.5 has a fraction"):
        convert([*first, {"n": 1.5, "meta": {}}], tmp_path / "fraction")
    with pytest.raises(BadInputError, match=r"field 'meta' cannot hold .*: \['b'\] are unknown"):
        convert([*first, {"n": 1, "meta": {"b": 1}}], tmp_path / "unknown")


@pytest.mark.parametrize(("mode", "channels"), [("1", 1), ("L", 1), ("LA", 2), ("RGB", 3), ("RGBA", 4), ("CMYK", 3)])
def test_images_of_pillow_keep_their_channels(tmp_path: Path, mode: str, channels: int) -> None:
    is_kept = mode in ("L", "LA", "RGB", "RGBA")
    pixels = np.arange(6 * channels, dtype=np.uint8).reshape(2, 3, channels).squeeze() * 8
    convert([{"image": Image.fromarray(pixels) if is_kept else Image.new(mode, (3, 2))}], tmp_path / "out")
    stored = open_dataset(tmp_path / "out")[0]["image"]
    assert stored.shape == pixels.shape
    if is_kept:
        np.testing.assert_array_equal(stored, pixels)


def test_transparency_of_a_palette_is_kept(tmp_path: Path) -> None:
    image = Image.new("P", (2, 2))
    image.putpalette([10, 20, 30] * 256)
    image.info["transparency"] = 0
    convert([{"image": image}], tmp_path / "out")
    assert open_dataset(tmp_path / "out")[0]["image"].tolist() == [[[10, 20, 30, 0]] * 2] * 2


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_images_of_more_than_8_bits_are_refused_and_not_cut(tmp_path: Path, mode: str) -> None:
    with pytest.raises(BadInputError, match=rf"it has mode {mode}, more than 8 bits a channel; store it as a tensor"):
        convert([{"image": Image.new(mode, (3, 2), 1000)}], tmp_path / "out")


def test_integers_beyond_63_bits_are_unsigned(tmp_path: Path) -> None:
    convert([{"n": 1 << 63}, {"n": (1 << 64) - 1}], tmp_path / "out")
    assert open_dataset(tmp_path / "out").get_batch([0, 1])["n"].tolist() == [1 << 63, (1 << 64) - 1]
    with pytest.raises(
        BadInputError, match="field 'n' has values that Arrow has no type for: integers have at most 64"
    ):
        convert([{"n": 1 << 64}], tmp_path / "large")


def test_a_quarantine_names_the_object(tmp_path: Path) -> None:
    convert(
        [{"n": number} for number in range(20)],
        tmp_path / "out",
        rules=[parse_rule("range field=n max=17")],
        on_error="quarantine",
    )
    rejects = list(open_dataset(tmp_path / "out.quarantine"))
    assert [(int(row["sample"]), row["uri"]) for row in rejects] == [
        (18, "python:builtins.list"),
        (19, "python:builtins.list"),
    ]


def failing() -> Iterator[dict]:
    yield from ({"n": number} for number in range(300))
    raise KeyError("no more")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (failing, "failed on sample 300: KeyError"),
        ([], "gives no samples"),
        ([{"a": 1}, {"b": 1}], "sample 1 of .* has the fields"),
        ([{"a": 1}, {"a": "x"}], "field 'a' has values"),
        (3, "a int is no source"),
        ({"a": 1}, "a dict is no source"),
        (b"abc", "a bytes is no source"),
    ],
    ids=["fails", "empty", "other fields", "other types", "number", "mapping", "bytes"],
)
def test_what_gives_no_samples_is_an_error_and_leaves_nothing(tmp_path: Path, source: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        convert(source() if callable(source) else source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_drawn_for_a_destination_in_use(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    drawn = iter([{"n": 1}])
    for settings in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(BadInputError):
            convert(drawn, tmp_path / "out", **settings)
    assert next(drawn) == {"n": 1}


def test_a_schema_is_refused_for_files(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="has its own"):
        convert(tmp_path / "in", tmp_path / "out", schema=pa.schema([("n", pa.int64())]))
