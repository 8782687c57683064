import io
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from connectors.errors import BadInputError, CorruptError
from dataflow.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    CenterCrop,
    Draws,
    ImageTransform,
    RandomResizedCrop,
    Region,
    WholeImage,
)


def picture(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    waves = [128 + 90 * np.sin(x / (19 + 4 * channel)) * np.cos(y / (17 + 3 * channel)) for channel in range(3)]
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8))


def jpeg(width: int = 200, height: int = 150, **options) -> bytes:
    file = io.BytesIO()
    picture(width, height).save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def draws(*samples: int) -> Draws:
    return Draws(0, 0, np.array(samples, np.int64))


def allocate(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.zeros(shape, dtype)


def reference(file: bytes, transform: ImageTransform, rng: np.random.Generator) -> np.ndarray:
    """What Pillow makes of the whole image, in the usual order: decode, crop, resize, flip."""
    image = Image.open(io.BytesIO(file)).convert("RGB")
    left, top, width, height = transform.crop.choose(*image.size, rng)
    rows, columns = transform.crop.output_size
    part = image.crop((left, top, left + width, top + height)).resize((columns, rows), Image.Resampling.BILINEAR)
    pixels = np.asarray(part)
    return pixels[:, ::-1] if rng.random() < transform.flip else pixels


@given(
    width=st.integers(20, 200),
    height=st.integers(20, 200),
    size=st.integers(8, 60),
    sample=st.integers(0, 1000),
)
@settings(max_examples=40)
def test_pixels_are_those_of_a_full_decode_resized_by_pillow_within_one_level(
    width: int, height: int, size: int, sample: int
) -> None:
    transform = ImageTransform(RandomResizedCrop(size), flip=0.5, dtype="uint8", layout="HWC", scaled=False)
    file = jpeg(width, height)
    made = transform({"image": file}, draws(sample)[0])["image"]
    expected = reference(file, transform, draws(sample)[0])
    assert made.shape == expected.shape
    assert np.abs(made.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
@pytest.mark.parametrize("size", [16, 31, 64])
def test_a_scaled_decode_stays_close_to_the_full_one(size: int, subsampling: str) -> None:
    file = jpeg(640, 480, subsampling=subsampling)
    whole, scaled = (
        ImageTransform(RandomResizedCrop(size), dtype="uint8", scaled=scaled)({"image": file}, draws(3)[0])["image"]
        for scaled in (False, True)
    )
    assert not np.array_equal(whole, scaled)  # it was scaled
    assert np.abs(whole.astype(int) - scaled).mean() < 6  # of 255, mostly from edges of the crop that moved


@given(samples=st.lists(st.integers(0, 50), min_size=1, max_size=5), dtype=st.sampled_from(["float32", "float16"]))
@settings(max_examples=20)
def test_a_batch_holds_what_its_samples_are_alone(samples: list[int], dtype: str) -> None:
    transform = ImageTransform(RandomResizedCrop(24), flip=0.5, mean=IMAGENET_MEAN, std=IMAGENET_STD, dtype=dtype)
    files = [jpeg(60 + sample, 50) for sample in samples]
    columns = transform.transform_columns({"image": files, "label": samples}, draws(*samples), allocate)
    assert columns["label"] == samples
    for place, file in enumerate(files):
        alone = transform({"image": file}, draws(samples[place])[0])["image"]
        assert np.array_equal(columns["image"][place], alone)


def test_levels_are_normalised_and_laid_out() -> None:
    plain = ImageTransform(CenterCrop(20, 20), dtype="uint8")
    levels = plain({"image": jpeg()}, draws(0)[0])["image"]
    mean, std = np.array(IMAGENET_MEAN)[:, None, None], np.array(IMAGENET_STD)[:, None, None]
    for layout in ("CHW", "HWC"):
        transform = ImageTransform(CenterCrop(20, 20), mean=IMAGENET_MEAN, std=IMAGENET_STD, layout=layout)
        made = transform({"image": jpeg()}, draws(0)[0])["image"]
        planes = made if layout == "CHW" else made.transpose(2, 0, 1)
        assert made.dtype == np.float32
        np.testing.assert_allclose(planes, (levels / 255 - mean) / std, atol=1e-5)
    unscaled = ImageTransform(CenterCrop(20, 20))({"image": jpeg()}, draws(0)[0])["image"]
    assert np.array_equal(unscaled, levels)


def test_a_flip_mirrors_left_and_right() -> None:
    made = [
        ImageTransform(WholeImage(30, 40), flip=flip, dtype="uint8", layout="HWC")({"image": jpeg()}, draws(0)[0])
        for flip in (0.0, 1.0)
    ]
    assert np.array_equal(made[0]["image"], made[1]["image"][:, ::-1])


def test_results_go_where_the_batch_is() -> None:
    place = np.zeros((2, 3, 8, 8), np.float32)
    transform = ImageTransform(CenterCrop(8, 8))
    columns = transform.transform_columns({"image": [jpeg(), jpeg()]}, draws(0, 1), lambda *array: place)
    assert columns["image"] is place
    assert place.any()


def test_it_travels_to_spawned_workers() -> None:
    transform = ImageTransform(RandomResizedCrop(8), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert pickle.loads(pickle.dumps(transform)) == transform


def test_errors_name_field_and_sample() -> None:
    transform = ImageTransform(CenterCrop(8, 8), field="photo")
    with pytest.raises(CorruptError, match=r"sample 7: field 'photo' is not a readable image"):
        transform.transform_columns({"photo": [jpeg(), b"no"]}, draws(4, 7), allocate)
    deep = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(deep, "PNG")
    with pytest.raises(CorruptError, match=r"^field 'photo' is an image of mode I;16, more than 8 bits a channel; "):
        transform({"photo": deep.getvalue()}, draws(0)[0])
    with pytest.raises(BadInputError, match=r"encoded=\['photo'\]"):
        transform({"photo": np.zeros((3, 3, 3), np.uint8)}, draws(0)[0])
    with pytest.raises(CorruptError, match="sample 7: field 'photo' is null"):
        transform.transform_columns({"photo": [jpeg(), None]}, draws(4, 7), allocate)
    with pytest.raises(BadInputError, match="no field 'photo'"):
        transform.transform_columns({"image": []}, draws(), allocate)
    with pytest.raises(BadInputError, match="no field 'photo', only image"):
        transform({"image": jpeg()}, draws(0)[0])


@pytest.mark.parametrize("region", [(-4, 0, 20, 20), (0, -4, 20, 20), (190, 0, 20, 20), (0, 140, 20, 20), (0, 0, 0, 9)])
def test_a_crop_that_leaves_the_image_is_an_error(region: tuple[int, int, int, int]) -> None:
    class Padding(WholeImage):
        def choose(self, width: int, height: int, rng: np.random.Generator) -> Region:
            return Region(*region)

    with pytest.raises(BadInputError, match=r"sample 3: the crop chose Region\(.* of an image of 200 x 150 pixels"):
        ImageTransform(Padding(8, 8)).transform_columns({"image": [jpeg()]}, draws(3), allocate)


@pytest.mark.parametrize(
    "options",
    [
        {"flip": 1.5},
        {"mean": IMAGENET_MEAN},
        {"mean": IMAGENET_MEAN, "std": (0.0, 1.0, 1.0)},
        {"mean": IMAGENET_MEAN, "std": (1.0, float("nan"), 1.0)},
        {"mean": (0.5,), "std": (0.5,)},
        {"mean": (0.0,) * 4, "std": (1.0,) * 4},
        {"mean": 0.5, "std": 0.5},
        {"layout": "NCHW"},
        {"dtype": "int64"},
        {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "dtype": "uint8"},
    ],
)
def test_what_does_not_fit_together_is_refused(options: dict) -> None:
    with pytest.raises(BadInputError, match=r"flip|mean|std|layout|dtype|normalised"):
        ImageTransform(CenterCrop(8, 8), **options)


def test_a_number_is_no_crop() -> None:
    with pytest.raises(BadInputError, match=r"crop must be one such as RandomResizedCrop\(224\), got 224"):
        ImageTransform(224)
