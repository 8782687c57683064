"""Folders of media files, classes from folders or from a table."""

import csv
import json
import os
import pickle
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from connectors.errors import BadInputError, ChangedError, CorruptError
from dataflow.convert import convert
from dataflow.dataset import open_dataset
from dataflow.dataset.verification import verify
from dataflow.formats import class_names, field_kind
from dataflow.testing.media import encode_audio, encode_video, frames, sound


def pixels(number: int, shape: tuple[int, ...] = (4, 5, 3)) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, shape, np.uint8)


def put(path: Path, number: int, **options: object) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = pixels(number)
    Image.fromarray(content).save(path, **options)
    return content


def test_every_file_is_a_sample_labelled_by_its_folder(tmp_path: Path) -> None:
    expected = [
        put(tmp_path / "cat" / "1.png", 1),
        put(tmp_path / "cat" / "10.png", 2),
        put(tmp_path / "dog house" / "ä.png", 3),
    ]
    dataset = open_dataset(tmp_path)
    assert dataset.source.format == "folder"
    assert class_names(dataset.schema.field("label")) == ["cat", "dog house"]
    assert [sample["label"] for sample in dataset] == [0, 0, 1]
    for sample, content in zip(dataset, expected, strict=True):
        np.testing.assert_array_equal(sample["image"], content)


def test_nested_folders_belong_to_the_class_above(tmp_path: Path) -> None:
    put(tmp_path / "cat" / "2024" / "may" / "1.png", 1)
    put(tmp_path / "dog" / "1.png", 1)
    assert class_names(open_dataset(tmp_path).schema.field("label")) == ["cat", "dog"]


def test_other_files_and_folders_without_images_do_not_count(tmp_path: Path) -> None:
    put(tmp_path / "cat" / "1.png", 1)
    put(tmp_path / "zebra" / "1.png", 1)
    (tmp_path / "README.txt").write_text("about")
    (tmp_path / "cat" / "notes.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("")
    dataset = open_dataset(tmp_path)
    assert len(dataset) == 2
    assert class_names(dataset.schema.field("label")) == ["cat", "zebra"]


def test_hidden_files_are_no_samples_and_hidden_folders_no_classes(tmp_path: Path) -> None:
    image = put(tmp_path / "cat" / "a.png", 1)
    for hidden in ("cat/._a.png", "cat/.b.png", ".git/c.png", "dog/.ipynb_checkpoints/d.png", "dog/e.png"):
        put(tmp_path / hidden, 2)
    (tmp_path / "._x.parquet").write_bytes(b"x")
    dataset = open_dataset(tmp_path)
    assert class_names(dataset.schema.field("label")) == ["cat", "dog"]
    assert dataset.index.shards.names.to_pylist() == ["cat/a.png", "dog/e.png"]
    np.testing.assert_array_equal(dataset[0]["image"], image)


def test_a_hidden_file_is_a_sample_where_it_is_named(tmp_path: Path) -> None:
    put(tmp_path / "set" / ".a.png", 1)
    put(tmp_path / "set" / "b.png", 2)
    assert len(open_dataset(tmp_path / "set" / ".a.png")) == 1
    (tmp_path / "set" / "metadata.csv").write_text("file_name,caption\n.a.png,x\n")
    assert [sample["caption"] for sample in open_dataset(tmp_path / "set")] == ["x"]
    (tmp_path / "set").rename(tmp_path / ".set")
    assert len(open_dataset(tmp_path / ".set")) == 1


def test_a_file_whose_name_is_no_text_is_named(tmp_path: Path) -> None:
    put(tmp_path / "a.png", 1)
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff.png")
    with pytest.raises(BadInputError, match=r"'\\udcff\.png' is not UTF-8.*rename it"):
        open_dataset(tmp_path)


def test_a_flat_folder_has_images_without_labels(tmp_path: Path) -> None:
    put(tmp_path / "1.png", 1)
    dataset = open_dataset(tmp_path)
    assert dataset.schema.names == ["image"]
    np.testing.assert_array_equal(dataset[0]["image"], pixels(1))


def test_an_image_beside_class_folders_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "cat" / "1.png", 1)
    put(tmp_path / "lost.png", 1)
    with pytest.raises(BadInputError, match=r"lost\.png lies beside class folders"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(("name", "options"), [("a.PNG", {}), ("a.bmp", {}), ("a.webp", {"lossless": True})])
def test_lossless_codecs_come_back_exactly(tmp_path: Path, name: str, options: dict) -> None:
    expected = put(tmp_path / "c" / name, 1, **options)
    np.testing.assert_array_equal(open_dataset(tmp_path)[0]["image"], expected)


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG"])
def test_jpeg_comes_as_pillow_decodes_it(tmp_path: Path, name: str) -> None:
    put(tmp_path / "c" / name, 1)
    with Image.open(tmp_path / "c" / name) as image:
        np.testing.assert_array_equal(open_dataset(tmp_path)[0]["image"], np.array(image))


@pytest.mark.parametrize(
    ("mode", "shape"),
    [("L", (4, 5)), ("1", (4, 5)), ("RGB", (4, 5, 3)), ("RGBA", (4, 5, 4)), ("LA", (4, 5, 2)), ("P", (4, 5, 3))],
)
def test_every_mode_of_8_bits_has_its_shape(tmp_path: Path, mode: str, shape: tuple[int, ...]) -> None:
    (tmp_path / "c").mkdir()
    Image.fromarray(pixels(1)).convert(mode).save(tmp_path / "c" / "a.png")
    dataset = open_dataset(tmp_path)
    assert dataset[0]["image"].shape == shape
    assert dataset.get_batch([0, 0])["image"].shape == (2, *shape)


def test_more_than_8_bits_is_said_to_be_unsupported(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    Image.fromarray(np.zeros((2, 2), np.uint16)).save(tmp_path / "c" / "a.png")
    with pytest.raises(CorruptError, match=r"sample 0 .* mode I;16"):
        open_dataset(tmp_path)[0]


def test_images_of_different_shapes_become_a_list(tmp_path: Path) -> None:
    for number, size in enumerate([(2, 3), (2, 3), (5, 2)]):
        (tmp_path / "c").mkdir(exist_ok=True)
        Image.fromarray(pixels(number, size)).save(tmp_path / "c" / f"{number}.png")
    dataset = open_dataset(tmp_path)
    assert dataset.get_batch([0, 1])["image"].shape == (2, 2, 3)
    mixed = dataset.get_batch([2, 0])["image"]
    assert isinstance(mixed, list)
    assert [image.shape for image in mixed] == [(5, 2), (2, 3)]


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    put(tmp_path / "c" / "1.png", 1)
    (tmp_path / "c" / "2.png").write_bytes(b"not a picture")
    (tmp_path / "c" / "3.png").write_bytes((tmp_path / "c" / "1.png").read_bytes()[:60])
    dataset = open_dataset(tmp_path)
    for number in (1, 2):
        message = rf"field 'image' of sample {number} is not a readable image: [^<]*; in .*/c/{number + 1}\.png"
        with pytest.raises(CorruptError, match=message) as caught:
            dataset.get_batch([0, number])
        assert caught.value.uri == (tmp_path / "c" / f"{number + 1}.png").as_uri()


def test_an_empty_file_is_named_when_the_folder_is_opened(tmp_path: Path) -> None:
    put(tmp_path / "c" / "1.png", 1)
    (tmp_path / "c" / "2.png").touch()
    with pytest.raises(CorruptError, match=r"2\.png is empty"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("link", ["cat/2.png", "dog"])
def test_a_link_that_leads_nowhere_is_refused_by_name(tmp_path: Path, link: str) -> None:
    put(tmp_path / "set/cat/1.png", 1)
    (tmp_path / "set" / link).symlink_to(tmp_path / "gone")
    for reading in (open_dataset, lambda path: convert(path, tmp_path / "out")):
        with pytest.raises(CorruptError, match=f"set/{link} is a symbolic link to what does not exist"):
            reading(tmp_path / "set")
    result = convert(tmp_path / "set", tmp_path / "out", on_error="skip")
    assert (result.num_samples, result.num_errors) == (1, 1)
    assert link in result.errors[0]


def test_a_folder_is_walked_once_to_open_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("cat", "dog"):
        put(tmp_path / "set" / folder / "1.png", 1)
    scanned: Counter[str] = Counter()
    scandir = os.scandir

    def counting(path: str) -> object:
        scanned[os.path.relpath(path, tmp_path)] += 1
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counting)
    assert len(open_dataset(tmp_path / "set")) == 2
    assert scanned == {"set": 1, "set/cat": 1, "set/dog": 1}


def test_a_file_that_changes_after_opening_is_named(tmp_path: Path) -> None:
    put(tmp_path / "c" / "1.png", 1)
    dataset = open_dataset(tmp_path)
    put(tmp_path / "c" / "1.png", 1, compress_level=0)
    with pytest.raises(ChangedError, match=r"1\.png"):
        dataset[0]


def test_the_fingerprint_is_that_of_a_copy_and_not_of_another_folder(tmp_path: Path) -> None:
    for place in ("one", "two", "three"):
        put(tmp_path / place / "c" / "1.png", 1)
    put(tmp_path / "three" / "c" / "2.png", 2)
    one, two, three = (open_dataset(tmp_path / place).fingerprint for place in ("one", "two", "three"))
    assert one == two != three


# Sound, video, text


def save(path: Path, content: bytes) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return content


@pytest.mark.parametrize(
    ("kind", "name", "content"),
    [
        ("audio", "a.FLAC", encode_audio(sound(0))),
        ("audio", "ä b.mp3", b"ID3"),
        ("video", "a.mp4", encode_video(frames(2))),
        ("video", "日本.gif", b"GIF89a"),
    ],
    ids=["flac", "mp3", "mp4", "gif"],
)
def test_sound_and_video_come_as_their_files(tmp_path: Path, kind: str, name: str, content: bytes) -> None:
    save(tmp_path / "one" / "deep" / name, content)
    save(tmp_path / "two" / name, content)
    dataset = open_dataset(tmp_path)
    assert dataset.schema.names == [kind, "label"]
    assert field_kind(dataset.schema.field(kind)) == kind
    assert not dataset.schema.field(kind).nullable
    assert [dict(sample) for sample in dataset] == [{kind: content, "label": 0}, {kind: content, "label": 1}]


def test_files_of_several_kinds_have_a_field_each(tmp_path: Path) -> None:
    content = save(tmp_path / "c" / "1.wav", encode_audio(sound(0), "wav"))
    pixels = put(tmp_path / "c" / "2.png", 1)
    dataset = open_dataset(tmp_path)
    assert dataset.schema.names == ["audio", "image", "label"]
    batch = dataset.get_batch([1, 0])
    assert batch["audio"] == [None, content]
    np.testing.assert_array_equal(batch["image"][0], pixels)
    assert batch["image"][1] is None


def test_text_files_are_samples_when_asked_for(tmp_path: Path) -> None:
    texts = ["one\ntwo\n", "日本\n", "three"]
    for place, text in zip(["neg/1.txt", "neg/2.txt", "pos/deep/1.TXT"], texts, strict=True):
        save(tmp_path / place, text.encode())
    assert open_dataset(tmp_path).source.format == "text"
    dataset = open_dataset(tmp_path, format="text-folder")
    assert [(sample["text"], sample["label"]) for sample in dataset] == list(zip(texts, [0, 0, 1], strict=True))
    assert class_names(dataset.schema.field("label")) == ["neg", "pos"]


def test_a_text_file_that_is_none_is_named(tmp_path: Path) -> None:
    save(tmp_path / "c" / "1.txt", b"\xff\xfe\xff")
    with pytest.raises(CorruptError, match=r"c/1\.txt is no text in UTF-8"):
        open_dataset(tmp_path, format="text-folder")[0]


@pytest.mark.parametrize("name", ["data.parquet", "data.tfrecord"])
def test_pictures_beside_another_dataset_are_not_the_dataset(tmp_path: Path, name: str) -> None:
    put(tmp_path / "logo.png", 1)
    save(tmp_path / name, b"none")
    with pytest.raises(CorruptError, match=name):
        open_dataset(tmp_path)


# Tables

ROWS = [("b/2.png", 5, "two"), ("1.png", 7, "ä"), ("b/deep/ünï.png", 0, "")]


def write_table(path: Path, rows: list[tuple], names: tuple[str, ...] = ("file_name", "stars", "caption")) -> None:
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([names, *rows])


def images_of_the_rows(root: Path) -> None:
    for number, (name, *_) in enumerate(ROWS):
        put(root / name, number)
    put(root / "not named.png", 9)


@pytest.mark.parametrize("table", ["metadata.csv", "METADATA.tsv", "metadata.jsonl", "metadata.parquet", "labels.csv"])
def test_a_table_says_which_files_and_what_they_are(tmp_path: Path, table: str) -> None:
    images_of_the_rows(tmp_path)
    write_table(tmp_path / table, ROWS)
    dataset = open_dataset(tmp_path)
    assert dataset.source.format == "folder"
    assert dataset.schema.names == ["image", "stars", "caption"]
    batch = pickle.loads(pickle.dumps(dataset)).get_batch([2, 0, 1])
    assert batch["stars"].tolist() == [0, 5, 7]
    assert batch["caption"] == ["", "two", "ä"]
    np.testing.assert_array_equal(batch["image"], [pixels(2), pixels(0), pixels(1)])


@pytest.mark.parametrize("column", ["filename", "File", "path", "image"])
def test_the_column_of_names_is_found_by_what_it_names(tmp_path: Path, column: str) -> None:
    images_of_the_rows(tmp_path)
    write_table(tmp_path / "metadata.csv", ROWS, (column, "stars", "caption"))
    assert open_dataset(tmp_path).schema.names == ["image", "stars", "caption"]


def test_tables_in_folders_name_what_lies_there(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        save(tmp_path / folder / "x.wav", folder.encode())
        write_table(tmp_path / folder / "metadata.csv", [("./x.wav", f"in {folder}")], ("file_name", "text"))
    dataset = open_dataset(tmp_path)
    assert [dict(sample) for sample in dataset] == [{"audio": f.encode(), "text": f"in {f}"} for f in ("a", "b")]


def test_a_table_may_name_text_and_any_other_file(tmp_path: Path) -> None:
    names = ["doc.txt", "scan.dcm", "s.wav"]
    for name in names:
        save(tmp_path / name, name.encode())
    write_table(tmp_path / "metadata.jsonl", [(name, n) for n, name in enumerate(names)], ("file_name", "n"))
    dataset = open_dataset(tmp_path)
    assert dataset.schema.names == ["audio", "file", "text", "n"]
    assert dataset[0] == {"audio": None, "file": None, "text": "doc.txt", "n": 0}
    assert dataset[1] == {"audio": None, "file": b"scan.dcm", "text": None, "n": 1}


def test_names_are_compared_in_their_composed_form(tmp_path: Path) -> None:
    save(tmp_path / unicodedata.normalize("NFD", "é.wav"), b"sound")
    write_table(tmp_path / "metadata.csv", [(unicodedata.normalize("NFC", "é.wav"),)], ("file_name",))
    assert open_dataset(tmp_path).schema.names == ["audio"]
    assert open_dataset(tmp_path)[0]["audio"] == b"sound"


def test_one_file_may_have_several_rows_and_dates_stay_text(tmp_path: Path) -> None:
    save(tmp_path / "1.wav", b"sound")
    write_table(tmp_path / "metadata.csv", [("1.wav", "2024-05-01"), ("1.wav", "2024-05-02")], ("file_name", "day"))
    dataset = open_dataset(tmp_path)
    assert [dict(s) for s in dataset] == [{"audio": b"sound", "day": f"2024-05-0{day}"} for day in (1, 2)]
    assert verify(dataset).num_samples == 2


def test_another_table_is_no_table_of_files(tmp_path: Path) -> None:
    put(tmp_path / "c" / "1.png", 1)
    write_table(tmp_path / "prices.csv", [("EUR", 3)], ("path", "n"))
    assert open_dataset(tmp_path).schema.names == ["image", "label"]
    write_table(tmp_path / "metadata.csv", [("x", 3)], ("author", "n"))
    with pytest.raises(BadInputError, match=r"metadata\.csv has no column file_name"):
        open_dataset(tmp_path)


def test_a_table_alone_is_the_dataset_itself(tmp_path: Path) -> None:
    write_table(tmp_path / "metadata.csv", [("http://there/1.png", 3)], ("file_name", "n"))
    assert open_dataset(tmp_path).source.format == "csv"
    write_table(tmp_path / "metadata.parquet", [("http://there/1.png", 3)], ("file_name", "n"))
    assert open_dataset(tmp_path).source.format == "parquet"


@pytest.mark.parametrize(
    ("rows", "names", "error", "message"),
    [
        (
            [("1.png", 1), ("2.png", 2)],
            ("file_name", "n"),
            CorruptError,
            r"row 1 of .*metadata\.csv names '2\.png', which is not",
        ),
        ([("1.png", 1), ("empty.png", 2)], ("file_name", "n"), CorruptError, "which is empty"),
        ([("1.png", 1), ("../1.png", 2)], ("file_name", "n"), CorruptError, "row 1"),
        ([("1.png", 1), ("", 2)], ("file_name", "n"), CorruptError, "row 1"),
        ([("1.png", 1)], ("file_name", "image"), BadInputError, "column 'image'.*rename it"),
        ([("1.png", "1.png")], ("left_file_name", "right_file_name"), BadInputError, "several files a row"),
    ],
    ids=["missing", "empty", "outside", "nameless", "clash", "several"],
)
def test_a_table_that_cannot_be_followed_is_named(
    tmp_path: Path, rows: list[tuple], names: tuple[str, ...], error: type[Exception], message: str
) -> None:
    put(tmp_path / "1.png", 1)
    if "empty" in message:
        (tmp_path / "empty.png").touch()
        write_table(tmp_path / "metadata.csv", rows, names)
        with pytest.raises(error, match="is empty"):
            open_dataset(tmp_path)
        return
    write_table(tmp_path / "metadata.csv", rows, names)
    with pytest.raises(error, match=message):
        open_dataset(tmp_path)


def test_a_table_without_rows_is_named(tmp_path: Path) -> None:
    put(tmp_path / "1.png", 1)
    (tmp_path / "metadata.csv").write_text("file_name,n\n")
    with pytest.raises(BadInputError, match=r"metadata\.csv has no rows"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    "content", [b"a,b\n1\n", b"\xff\xfe\x00,\n1", b"file_name,n\xff\n1.png,1\n"], ids=["ragged", "binary", "name"]
)
def test_a_damaged_table_is_named(tmp_path: Path, content: bytes) -> None:
    put(tmp_path / "1.png", 1)
    save(tmp_path / "metadata.csv", content)
    with pytest.raises(CorruptError, match=r"metadata\.csv cannot be read as a table"):
        open_dataset(tmp_path)


def test_a_table_whose_names_are_no_utf8_is_named(tmp_path: Path) -> None:
    put(tmp_path / "1.png", 1)
    names = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 5], np.int32)), pa.py_buffer(b"1.pn\xff")]
    )
    pq.write_table(pa.table({"file_name": names}), tmp_path / "metadata.parquet")
    with pytest.raises(CorruptError, match=r"metadata\.parquet cannot be read as a table"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_large_integers_of_a_table_stay_integers(tmp_path: Path, name: str) -> None:
    put(tmp_path / "1.png", 1)
    rows = {"metadata.csv": "file_name,n,day\n1.png,{n},2020-01-01\n"}
    rows["metadata.jsonl"] = '{{"file_name": "1.png", "n": {n}, "day": "2020-01-01"}}\n'
    (tmp_path / name).write_text(rows[name].format(n=2**64 - 1))
    found = open_dataset(tmp_path, columns=["n", "day"])[0]
    assert found == {"n": 2**64 - 1, "day": "2020-01-01"}
    (tmp_path / name).write_text(rows[name].format(n=2**64 + 1))
    with pytest.raises(BadInputError, match=rf"field 'n' of .*{name} has the integer {2**64 + 1}"):
        open_dataset(tmp_path)


def test_a_table_that_is_nested_too_deep_is_named(tmp_path: Path) -> None:
    put(tmp_path / "1.png", 1)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "n": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(BadInputError, match=r"metadata\.jsonl is nested more than 64 levels deep in line 1"):
        open_dataset(tmp_path)


def test_several_tables_that_name_files_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "1.png", 1)
    for name in ("a.csv", "b.csv"):
        write_table(tmp_path / name, [("1.png",)], ("file_name",))
    with pytest.raises(BadInputError, match=r"several tables name files: .*a\.csv.*call the right one metadata\.csv"):
        open_dataset(tmp_path)


def test_tables_that_disagree_are_refused(tmp_path: Path) -> None:
    for folder, value in (("a", 1), ("b", "one")):
        put(tmp_path / folder / "1.png", 1)
        write_table(tmp_path / folder / "metadata.csv", [("1.png", value)], ("file_name", "n"))
    with pytest.raises(BadInputError, match="disagree about a column"):
        open_dataset(tmp_path)


def test_the_fingerprint_covers_the_table(tmp_path: Path) -> None:
    for place, caption in (("one", "x"), ("two", "x"), ("three", "y")):
        put(tmp_path / place / "1.png", 1)
        write_table(tmp_path / place / "metadata.csv", [("1.png", caption)], ("file_name", "caption"))
    one, two, three = (open_dataset(tmp_path / place).fingerprint for place in ("one", "two", "three"))
    assert one == two != three


def test_a_folder_with_a_table_converts_with_all_it_has(tmp_path: Path) -> None:
    images_of_the_rows(tmp_path / "in")
    save(tmp_path / "in" / "s.wav", b"sound")
    write_table(tmp_path / "in" / "metadata.csv", [*ROWS, ("s.wav", 1, "heard")])
    convert(tmp_path / "in", tmp_path / "out", workers=0)
    source, target = (open_dataset(tmp_path / name, encoded=["image", "audio"]) for name in ("in", "out"))
    assert target.schema.equals(source.schema, check_metadata=True)
    assert [dict(sample) for sample in target] == [dict(sample) for sample in source]
