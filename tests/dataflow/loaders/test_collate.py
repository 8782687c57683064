"""Tests of what becomes of samples where the collate function is torch's default."""

import enum

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from dataflow.loaders.collate import collate_into
from dataflow.loaders.recycling import Recycler
from dataflow.loaders.torch_private import default_collate_fn_map


class Kind(enum.IntEnum):
    CAT = 3


class Metres(float):
    pass


def collate(samples):
    return collate_into(Recycler())(samples)


@pytest.mark.parametrize(
    "numbers",
    [
        [3, -1, 2**63 - 1, -(2**63)],
        [1.5, -0.0, float("inf"), 5e-324],
        [True, False],
        [1, True],
        [True, 1],
        [1, 2.5],
        [2.5, 1],
        [Kind.CAT, 1],
        [1, Kind.CAT],
        [Metres(2.5), 1.5],
        [7],
    ],
    ids=repr,
)
def test_numbers_become_the_tensor_that_torch_makes(numbers):
    expected, found = default_collate(numbers), collate(numbers)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    assert torch.equal(collate([(number,) for number in numbers])[0], expected)


@pytest.mark.parametrize("numbers", [[1, 2**63], [-(2**63) - 1], [1, "2"], [1, None], [1.5, "2"]], ids=repr)
def test_numbers_that_torch_refuses_are_refused_in_its_words(numbers):
    with pytest.raises((RuntimeError, TypeError, ValueError)) as expected:
        default_collate(numbers)
    with pytest.raises(type(expected.value)) as found:
        collate(numbers)
    assert str(found.value) == str(expected.value)


def test_numbers_go_to_the_device_that_the_caller_has_set():
    with torch.device("meta"):
        assert collate([1, 2]).is_meta


def test_a_tensor_of_numbers_can_grow():
    numbers = collate([1, 2])
    assert numbers.resize_(1000).shape == (1000,)


@pytest.mark.parametrize("numbers", [[np.True_, np.False_], [np.False_]], ids=repr)
def test_booleans_of_numpy_become_a_tensor_of_booleans_with_any_torch(numbers):
    expected = torch.tensor(list(map(bool, numbers)))
    for found in (collate(numbers), collate([(number,) for number in numbers])[0]):
        assert found.dtype == torch.bool
        assert torch.equal(found, expected)
        assert found.resize_(1000).shape == (1000,)
    with torch.device("meta"):
        assert collate(numbers).is_meta


def test_numbers_of_numpy_keep_the_dtype_that_torch_gives_them():
    for numbers in ([np.float32(1), np.float32(2)], [np.uint16(1), np.uint16(2)], [np.int64(1), np.float64(2.5)]):
        expected, found = default_collate(numbers), collate(numbers)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_what_torch_was_taught_about_numbers_holds(monkeypatch):
    monkeypatch.setitem(default_collate_fn_map, int, lambda batch, *, collate_fn_map: sum(batch))
    assert collate([(1, 2.5), (3, 4.5)])[0] == 4


def test_what_torch_was_taught_about_numbers_of_numpy_holds(monkeypatch):
    kind = next(kind for kind in default_collate_fn_map if isinstance(kind, tuple) and np.bool_ in kind)
    monkeypatch.setitem(default_collate_fn_map, kind, lambda batch, *, collate_fn_map: sum(batch))
    assert collate([(np.int64(1), 2.5), (np.int64(3), 4.5)])[0] == 4
    assert collate([np.True_, np.True_]) == 2
