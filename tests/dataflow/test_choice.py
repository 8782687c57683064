"""Which samples are written: exact parts that never overlap, whatever the order."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.errors import BadInputError
from dataflow.convert.choice import check_choice, choose
from dataflow.index import Blocks, Index, Shards
from dataflow.order import Selection


def index_of(sizes: list[int]) -> Index:
    count = len(sizes)
    blocks = Blocks(
        np.zeros(count, np.int32),
        np.arange(count, dtype=np.int64),
        np.ones(count, np.int64),
        np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
    )
    return Index("file:///x", "f", Shards(pa.array(["s"]), np.array([count]), pa.array(["v"])), blocks)


SIZES = st.lists(st.integers(0, 7), min_size=1, max_size=12)


@given(
    SIZES,
    st.floats(0.01, 1),
    st.lists(st.floats(0.1, 5), min_size=1, max_size=4),
    st.sampled_from([None, "full", "block"]),
    st.integers(0, 9),
    st.data(),
)
def test_parts_have_their_sizes_and_share_no_sample(
    sizes: list[int], fraction: float, weights: list[float], shuffle: str | None, seed: int, data: st.DataObject
) -> None:
    index = index_of(sizes)
    keep = data.draw(st.none() | st.lists(st.booleans(), min_size=sum(sizes), max_size=sum(sizes)))
    kept = None if keep is None else Selection(np.array(keep, bool))
    names = [f"part{number}" for number in range(len(weights))]
    choices = choose(
        index,
        kept,
        sample_fraction=fraction,
        split=dict(zip(names, weights, strict=True)),
        shuffle=shuffle,
        seed=seed,
    )
    good = set(range(sum(sizes))) if keep is None else set(np.flatnonzero(keep).tolist())
    parts = [choice.samples(0, len(choice.order)).tolist() for choice in choices]
    assert [len(part) for part in parts] == [len(choice) for choice in choices]
    chosen = [sample for part in parts for sample in part]
    assert len(chosen) == len(set(chosen)) == int(len(good) * fraction + 0.5)
    assert set(chosen) <= good
    for part, weight in zip(parts, weights, strict=True):
        assert abs(len(part) - len(chosen) * weight / sum(weights)) <= 1
    if shuffle is None:
        assert parts == [sorted(part) for part in parts]


@given(SIZES, st.sampled_from([None, "full", "block"]), st.integers(0, 50))
def test_any_run_of_positions_is_found_alone(sizes: list[int], shuffle: str | None, cut: int) -> None:
    (choice,) = choose(index_of(sizes), None, sample_fraction=0.6, split={}, shuffle=shuffle, seed=3)
    total = len(choice.order)
    cut = min(cut, total)
    whole = choice.samples(0, total).tolist()
    assert choice.samples(0, cut).tolist() + choice.samples(cut, total).tolist() == whole


def test_membership_does_not_depend_on_the_order() -> None:
    parts = {
        shuffle: [
            set(choice.samples(0, 100).tolist())
            for choice in choose(
                index_of([10] * 10), None, sample_fraction=1, split={"a": 3, "b": 1}, shuffle=shuffle, seed=1
            )
        ]
        for shuffle in (None, "full", "block")
    }
    assert parts[None] == parts["full"] == parts["block"]
    assert [len(part) for part in parts[None]] == [75, 25]


def test_another_seed_draws_others() -> None:
    drawn = [
        choose(index_of([100]), None, sample_fraction=0.5, split={}, shuffle=None, seed=seed)[0].samples(0, 100)
        for seed in (1, 2)
    ]
    assert drawn[0].tolist() != drawn[1].tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"sample_fraction": 0},
        {"sample_fraction": 1.5},
        {"sample_fraction": float("nan")},
        {"shuffle": "some"},
        {"split": {"": 1}},
        {"split": {"a/b": 1}},
        {"split": {"..": 1}},
        {"split": {"a": 0}},
        {"split": {"a": float("inf")}},
        {"split": {"a": 0.9}},
        {"split": {"a": 0.7, "b": 0.15}},
    ],
    ids=str,
)
def test_what_cannot_be_chosen_is_refused(settings: dict) -> None:
    with pytest.raises(BadInputError):
        check_choice(**({"sample_fraction": 1.0, "split": {}, "shuffle": None} | settings))


@pytest.mark.parametrize("split", [{"a": 0.33, "b": 0.33, "c": 0.33}, {"a": 0.1, "b": 0.9}, {"a": 8, "b": 1}, {"a": 1}])
def test_weights_and_rounded_shares_are_taken(split: dict) -> None:
    check_choice(sample_fraction=1.0, split=split, shuffle=None)
