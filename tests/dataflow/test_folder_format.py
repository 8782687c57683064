"""Folders of images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from connectors.errors import BadInputError, ChangedError, CorruptError
from dataflow.dataset import open_dataset
from dataflow.formats import class_names


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


def test_a_file_that_is_no_image_names_its_sample(tmp_path: Path) -> None:
    put(tmp_path / "c" / "1.png", 1)
    (tmp_path / "c" / "2.png").write_bytes(b"not a picture")
    (tmp_path / "c" / "3.png").write_bytes((tmp_path / "c" / "1.png").read_bytes()[:60])
    dataset = open_dataset(tmp_path)
    for number in (1, 2):
        with pytest.raises(CorruptError, match=f"field 'image' of sample {number} is not a readable image"):
            dataset.get_batch([0, number])


def test_an_empty_file_is_named_when_the_folder_is_opened(tmp_path: Path) -> None:
    put(tmp_path / "c" / "1.png", 1)
    (tmp_path / "c" / "2.png").touch()
    with pytest.raises(CorruptError, match=r"2\.png is empty"):
        open_dataset(tmp_path)


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
