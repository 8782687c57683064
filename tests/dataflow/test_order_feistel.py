import itertools
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.errors import BadInputError
from dataflow.order.feistel import MAX_ELEMENTS, ROUNDS, Permutation


def whole(permutation: Permutation, n: int, variant: int = 0) -> np.ndarray:
    return permutation.apply(np.arange(n), n, variant)


def excess(observed: np.ndarray, expected: float, freedom: int) -> float:
    """Chi-square in standard deviations above its mean: random data stays near 0, and below 5 in practice."""
    chi_square = ((observed - expected) ** 2 / expected).sum()
    return (chi_square - freedom) / math.sqrt(2 * freedom)


def neighbour_excess(images: np.ndarray, lag: int) -> float:
    """How far the joint distribution of elements `lag` apart is from uniform on a 16 x 16 grid."""
    n, cells = len(images), 16
    cell = images * cells // n
    pairs = np.bincount(cell[:-lag] * cells + cell[lag:], minlength=cells * cells)
    return excess(pairs, (n - lag) / cells**2, cells**2 - 1)


def with_rounds(permutation: Permutation, rounds: int) -> Permutation:
    permutation._keys = permutation._keys[:rounds]
    return permutation


@given(n=st.integers(0, 5000), seed=st.integers(), epoch=st.integers(), variant=st.integers(0, 2**62))
def test_every_element_has_exactly_one_image(n: int, seed: int, epoch: int, variant: int) -> None:
    images = whole(Permutation(seed, epoch, "test"), n, variant)
    assert np.array_equal(np.sort(images), np.arange(n))


@pytest.mark.parametrize("power", range(14))
@pytest.mark.parametrize("off", [-1, 0, 1])
def test_domains_around_powers_of_two_are_permuted_whole(power: int, off: int) -> None:
    n = 2**power + off
    assert np.array_equal(np.sort(whole(Permutation(0, 0, "test"), n)), np.arange(n))


@pytest.mark.parametrize("n", [2**62, 2**62 - 1, 2**60 + 1, 10**18])
def test_huge_domains_stay_inside_and_never_collide(n: int) -> None:
    some = np.concatenate([np.arange(5000), np.arange(n - 5000, n)])
    images = Permutation(1, 2, "test").apply(some, n)
    assert images.min() >= 0
    assert images.max() < n
    assert len(np.unique(images)) == len(some)


def test_more_than_2_to_the_62_elements_are_refused() -> None:
    with pytest.raises(BadInputError, match=r"2\*\*62"):
        Permutation(0, 0, "test").apply(np.array([0]), MAX_ELEMENTS + 1)
    assert MAX_ELEMENTS == 2**62


@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=8),
    data=st.data(),
)
def test_a_mix_of_sets_and_variants_equals_one_call_for_each(sizes: list[int], data: st.DataObject) -> None:
    variants = data.draw(st.lists(st.integers(0, 9), min_size=len(sizes), max_size=len(sizes)))
    permutation = Permutation(3, 4, "test")
    alone = np.concatenate([whole(permutation, n, v) for n, v in zip(sizes, variants, strict=True)])
    mixed = permutation.apply(
        np.concatenate([np.arange(n) for n in sizes]), np.repeat(sizes, sizes), np.repeat(variants, sizes)
    )
    assert np.array_equal(alone, mixed)


@pytest.mark.parametrize(
    ("elements", "n", "computed"),
    [
        (np.arange(17), 17, [64]),
        (np.arange(5000), 5000, [2**14]),
        (np.arange(2**14 + 1), 2**14 + 1, None),
        (np.array([0, 7]), 2**62, [2]),
    ],
    ids=["small", "the largest looked up", "larger than what is asked", "huge"],
)
def test_small_domains_are_computed_once_and_large_ones_never_whole(
    elements: np.ndarray, n: int, computed: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds, found = Permutation._rounds, []

    def counted(self: Permutation, some: np.ndarray, *rest: np.ndarray) -> np.ndarray:
        found.append(len(some))
        return rounds(self, some, *rest)

    monkeypatch.setattr(Permutation, "_rounds", counted)
    Permutation(0, 0, "test").apply(elements, n)
    assert found == computed if computed else max(found) == len(elements)


def test_the_permutation_never_changes_between_releases() -> None:
    # A saved state is a position in this very sequence; new numbers here would silently break every checkpoint.
    assert whole(Permutation(0, 0, "samples"), 10).tolist() == [4, 3, 2, 8, 7, 9, 0, 6, 1, 5]
    assert whole(Permutation(42, 7, "blocks"), 10, variant=3).tolist() == [0, 9, 2, 3, 6, 1, 4, 5, 8, 7]


def test_shape_is_kept_and_pickling_keeps_the_permutation() -> None:
    permutation = pickle.loads(pickle.dumps(Permutation(5, 6, "test")))
    grid = np.arange(12).reshape(3, 4)
    assert np.array_equal(permutation.apply(grid, 12).ravel(), whole(Permutation(5, 6, "test"), 12))


@pytest.mark.parametrize(
    "other",
    [Permutation(1, 0, "test"), Permutation(0, 1, "test"), Permutation(0, 0, "other")],
    ids=["seed", "epoch", "purpose"],
)
def test_seed_epoch_and_purpose_each_give_an_unrelated_permutation(other: Permutation) -> None:
    n = 10_000
    mine = whole(Permutation(0, 0, "test"), n)
    theirs = whole(other, n)
    assert (mine == theirs).sum() < 10  # one fixed point expected
    cell = mine * 16 // n * 16 + theirs * 16 // n
    assert abs(excess(np.bincount(cell, minlength=256), n / 256, 225)) < 5


def test_neighbouring_variants_are_unrelated() -> None:
    n, permutation = 10_000, Permutation(0, 0, "test")
    cell = whole(permutation, n, 0) * 16 // n * 16 + whole(permutation, n, 1) * 16 // n
    assert abs(excess(np.bincount(cell, minlength=256), n / 256, 225)) < 5


def small_set_excess(n: int, permutation: Permutation) -> float:
    """Over many variants: how far the frequencies of all n! orders are from equal."""
    trials = 6000
    images = permutation.apply(np.tile(np.arange(n), trials), n, np.repeat(np.arange(trials), n)).reshape(trials, n)
    codes = images @ (n ** np.arange(n))
    known = sorted(np.array(order) @ (n ** np.arange(n)) for order in itertools.permutations(range(n)))
    counts = np.bincount(np.searchsorted(known, codes), minlength=len(known))
    return excess(counts, trials / len(known), len(known) - 1)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_all_orders_of_a_small_set_are_equally_likely(n: int) -> None:
    assert small_set_excess(n, Permutation(7, 0, "test")) < 5


def test_four_rounds_would_fail_on_small_sets() -> None:
    assert small_set_excess(5, with_rounds(Permutation(7, 0, "test"), 4)) > 50


@pytest.mark.parametrize("n", [7, 16, 17, 100])
def test_an_element_lands_everywhere_equally_often(n: int) -> None:
    trials, permutation = 4000, Permutation(11, 0, "test")
    start = np.tile(np.arange(n), trials)
    images = permutation.apply(start, n, np.repeat(np.arange(trials), n))
    counts = np.bincount(start * n + images, minlength=n * n)
    assert excess(counts, trials / n, (n - 1) ** 2) < 5


@pytest.mark.parametrize("n", [3000, 300_007, 2**18])
@pytest.mark.parametrize("lag", [1, 2, 64])
def test_neighbours_are_not_correlated(n: int, lag: int) -> None:
    assert neighbour_excess(whole(Permutation(13, 1, "test"), n), lag) < 5


def test_two_rounds_would_fail_on_neighbours() -> None:
    assert neighbour_excess(whole(with_rounds(Permutation(13, 1, "test"), 2), 2**18), 1) > 50


def test_round_count_is_what_the_measurement_asked_for() -> None:
    assert len(Permutation(0, 0, "test")._keys) == ROUNDS >= 10
