"""WebDataset archives, against the webdataset library."""

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import webdataset
from PIL import Image

from connectors.errors import BadInputError, CorruptError, DataError
from dataflow.convert import convert
from dataflow.dataset import open_dataset
from dataflow.formats import webdataset as ours

COUNT = 40


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr(ours, "BLOCK_BYTES", 8000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def pixels(number: int) -> np.ndarray:
    return np.full((4, 6, 3), number, np.uint8)


def write_samples(path: Path, numbers: range) -> None:
    with webdataset.TarWriter(str(path)) as writer:
        for number in numbers:
            sample = {
                "__key__": f"part/{number:04d}",
                "png": pixels(number),
                "cls": number,
                "txt": f"é{number}",
                "json": {"n": number},
                "left.bin": bytes([number]) * number,
            }
            if number % 3 == 0:
                del sample["txt"]
            writer.write(sample)


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_what_the_library_writes_comes_back(tmp_path: Path, packed: str) -> None:
    for part in range(2):
        plain = tmp_path / "plain.tar"
        write_samples(plain, range(part * COUNT // 2, (part + 1) * COUNT // 2))
        (tmp_path / "set").mkdir(exist_ok=True)
        compression = {"": None, ".gz": "gzip", ".zst": "zstd"}[packed]
        with pa.output_stream(tmp_path / "set" / f"{part}.tar{packed}", compression=compression) as file:
            file.write(plain.read_bytes())
    dataset = open_dataset(tmp_path / "set")
    assert dataset.source.format == "webdataset"
    assert len(dataset) == COUNT
    assert dataset.index.num_blocks == 2 if packed else dataset.index.num_blocks > 8
    for number, sample in enumerate(dataset):
        assert sample["__key__"] == f"part/{number:04d}"
        np.testing.assert_array_equal(sample["png"], pixels(number))
        assert sample["cls"] == number
        assert sample["txt"] == (f"é{number}" if number % 3 else None)
        assert json.loads(sample["json"]) == {"n": number}
        assert sample["left.bin"] == bytes([number]) * number
    assert dataset.get_batch([39, 0, 20])["cls"].tolist() == [39, 0, 20]


def put(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_survive_the_cut_into_blocks(tmp_path: Path, form: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "BLOCK_BYTES", 1)
    names = ["ä" * 150 + str(number) for number in range(5)]
    put(tmp_path / "a.tar", [(f"{name}.txt", b"x") for name in names], form)
    dataset = open_dataset(tmp_path)
    assert dataset.index.num_blocks == 5
    assert dataset.get_batch(range(5))["__key__"] == names


def test_a_class_that_is_no_number_makes_the_field_text(tmp_path: Path) -> None:
    put(tmp_path / "a.tar", [("1.cls", b"7"), ("2.cls", b"cat"), ("3.cls", b"9")])
    assert open_dataset(tmp_path).get_batch(range(3))["cls"] == ["7", "cat", "9"]


def test_links_folders_and_names_without_suffix_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in [("folder", tarfile.DIRTYPE), ("1.lnk", tarfile.SYMTYPE), ("README", tarfile.REGTYPE)]:
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
        info = tarfile.TarInfo("1.txt")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    dataset = open_dataset(tmp_path)
    assert [sample["txt"] for sample in dataset] == ["x"]
    assert dataset.schema.names == ["__key__", "txt"]


def test_what_is_about_the_archive_is_no_sample(tmp_path: Path) -> None:
    about = [("__meta__/a.json", b"{}"), ("__a.b__", b"")]
    samples = [("__a.txt", b"0"), ("__a__.txt", b"1"), ("__a/b__.txt", b"2"), ("x/__a__/b.txt", b"3")]
    path = put(tmp_path / "a.tar", [about[0], *samples[:2], about[1], *samples[2:]])
    dataset = open_dataset(tmp_path)
    assert dataset.schema.names == ["__key__", "txt"]
    assert [sample["txt"] for sample in dataset] == ["0", "1", "2", "3"]
    with path.open("rb") as file:
        read = [member["fname"] for member in webdataset.tariterators.tar_file_iterator(file)]
    assert read == [name for name, _ in samples]


def test_a_hard_link_whose_content_lies_elsewhere_is_refused(tmp_path: Path) -> None:
    with tarfile.open(put(tmp_path / "a.tar", [("1.txt", b"x")]), "a") as tar:
        info = tarfile.TarInfo("2.txt")
        info.type, info.linkname = tarfile.LNKTYPE, "1.txt"
        tar.addfile(info)
    with pytest.raises(BadInputError, match=r"a\.tar has a hard link, 2\.txt.*--hard-dereference"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("members", [[], [("README", b"no sample")]])
def test_an_archive_without_samples_adds_none(tmp_path: Path, members: list[tuple[str, bytes]]) -> None:
    put(tmp_path / "a.tar", members)
    assert len(open_dataset(tmp_path)) == 0
    put(tmp_path / "b.tar", [("1.txt", b"x")])
    assert [sample["txt"] for sample in open_dataset(tmp_path)] == ["x"]


@pytest.mark.parametrize("name", [b"\xff.txt", b"1.\xff"])
def test_a_member_whose_name_is_no_text_is_named(tmp_path: Path, name: bytes) -> None:
    put(tmp_path / "a.tar", [(os.fsdecode(name), b"x")], tarfile.GNU_FORMAT)
    with pytest.raises(BadInputError, match=r"a\.tar has the name '.*udcff.*', which is not UTF-8"):
        open_dataset(tmp_path)


def test_two_files_of_one_suffix_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "a.tar", [("1.txt", b"a"), ("1.TXT", b"b")])
    with pytest.raises(BadInputError, match=r"a\.tar has two files 1\.txt in one sample"):
        open_dataset(tmp_path)


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    put(tmp_path / "a.tar", [("1.txt", b"\xff")])
    with pytest.raises(CorruptError, match=r"field 'txt' of a sample in .*a\.tar"):
        open_dataset(tmp_path)[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated", "the member at offset 7680 is cut off"),
        ("header", "the header at offset 7680 is damaged: its checksum is wrong"),
        ("cut", "no end mark at offset 7680"),
    ],
)
def test_a_damaged_archive_is_named_with_the_offset(tmp_path: Path, damage: str, message: str) -> None:
    path = put(tmp_path / "a.tar", [(f"{number}.txt", b"x" * 600) for number in range(20)])
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        del content[5 * 1536 + 700 :]
    elif damage == "cut":
        del content[5 * 1536 :]
    else:
        content[5 * 1536 + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.tar.*{message}"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_archives_that_were_joined_by_cat_lose_no_samples_in_silence(tmp_path: Path, packed: str) -> None:
    parts = [put(tmp_path / f"{number}.tar", [(f"{number}.txt", b"x")]) for number in range(2)]
    joined = b"".join(part.read_bytes() for part in parts)
    path = tmp_path / "in" / f"a.tar{packed}"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(joined) if packed else joined)
    with pytest.raises(BadInputError, match=r"a\.tar.* goes on behind its end mark at offset 1024, .*--concatenate"):
        open_dataset(tmp_path / "in")


def test_archives_convert_to_native_shards(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_samples(tmp_path / "in" / "a.tar", range(COUNT))
    convert(tmp_path / "in", tmp_path / "out", shard_size_bytes=20_000, block_size_bytes=1000)
    for expected, actual in zip(open_dataset(tmp_path / "in"), open_dataset(tmp_path / "out"), strict=True):
        np.testing.assert_array_equal(actual.pop("png"), expected.pop("png"))
        assert actual == expected


def test_images_come_as_they_are_encoded(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(pixels(5)).save(file, "jpeg")
    put(tmp_path / "a.tar", [("1.jpg", file.getvalue())])
    dataset = open_dataset(tmp_path)
    data = dataset.reader.read_blocks([dataset.index.block_ref(0)])[0]
    assert dataset.source.decode(0, data.view).column("jpg").to_pylist() == [file.getvalue()]
