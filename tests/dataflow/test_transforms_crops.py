import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.errors import BadInputError
from dataflow.transforms import CenterCrop, Crop, RandomResizedCrop, Region, WholeImage

SIDES = st.integers(1, 5000)
CROPS = [
    RandomResizedCrop(224),
    RandomResizedCrop(32, (0.9, 1.0), (3.0, 4.0)),
    CenterCrop(224, 256),
    WholeImage(10, 20),
]


@pytest.mark.parametrize("crop", CROPS)
@given(width=SIDES, height=SIDES, seed=st.integers(0, 2**32))
def test_a_region_lies_inside_the_image(crop: Crop, width: int, height: int, seed: int) -> None:
    region = crop.choose(width, height, np.random.default_rng(seed))
    assert 0 <= region.left < region.left + region.width <= width
    assert 0 <= region.top < region.top + region.height <= height


@given(seed=st.integers(0, 2**32))
def test_a_random_crop_keeps_to_its_area_and_ratio(seed: int) -> None:
    crop = RandomResizedCrop(224, (0.2, 0.5), (0.5, 2.0))
    region = crop.choose(1000, 1000, np.random.default_rng(seed))
    assert 0.198 <= region.width * region.height / 1e6 <= 0.502
    assert 0.49 <= region.width / region.height <= 2.02


def test_areas_are_uniform_and_places_cover_the_image() -> None:
    regions = [RandomResizedCrop(8).choose(640, 640, np.random.default_rng(seed)) for seed in range(400)]
    shares = np.array([region.width * region.height for region in regions]) / 640**2
    assert 0.4 < shares.mean() < 0.6
    assert min(region.left for region in regions) == 0
    assert max(region.left + region.width for region in regions) == 640


def test_a_ratio_that_does_not_fit_gives_the_largest_central_part() -> None:
    crop = RandomResizedCrop(224, (1.0, 1.0), (1.0, 1.0))
    assert crop.choose(100, 40, np.random.default_rng(0)) == Region(30, 0, 40, 40)


def test_the_middle_and_the_whole() -> None:
    rng = np.random.default_rng(0)
    assert CenterCrop(224, 256).choose(512, 256, rng) == Region(144, 16, 224, 224)
    assert WholeImage(5, 7).choose(512, 256, rng) == Region(0, 0, 512, 256)
    assert WholeImage(5, 7).output_size == (5, 7)


def test_a_random_part_may_become_a_rectangle_as_in_torchvision() -> None:
    assert RandomResizedCrop((5, 7)).output_size == (5, 7)
    assert RandomResizedCrop([5, 7]).output_size == (5, 7)  # type: ignore[arg-type]
    assert RandomResizedCrop(5).output_size == (5, 5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RandomResizedCrop(0),
        lambda: RandomResizedCrop(2.5),  # type: ignore[arg-type]
        lambda: RandomResizedCrop("8"),  # type: ignore[arg-type]
        lambda: RandomResizedCrop((8, 0)),
        lambda: RandomResizedCrop((8, 8, 8)),  # type: ignore[arg-type]
        lambda: RandomResizedCrop(8, ratio=(1.0, math.inf)),
        lambda: RandomResizedCrop(8, (0.5, 1.5)),
        lambda: RandomResizedCrop(8, (0.5, 0.2)),
        lambda: RandomResizedCrop(8, ratio=(0.0, 1.0)),
        lambda: CenterCrop(8, 7),
        lambda: WholeImage(8, 0),
    ],
)
def test_what_cannot_be_cropped_is_refused(make) -> None:
    with pytest.raises(BadInputError, match=r"size|scale|ratio|resize|width"):
        make()
