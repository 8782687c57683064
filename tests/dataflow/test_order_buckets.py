import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.errors import BadInputError
from dataflow.order import BucketBatches, Epoch, FixedBatches, GlobalBatch, Shuffle


def buckets(lengths: np.ndarray, **changed: object) -> BucketBatches:
    options = {"budget": 256, "multiple_of": 1, "max_samples": None, "edges": None, "window_samples": 50, "seed": 3}
    return BucketBatches(lengths, **{**options, **changed})


def batches_of(batching: object, num_samples: int, epoch: int = 0) -> list[GlobalBatch]:
    return list(Epoch(Shuffle(num_samples, None, "full", 1, 1), batching, epoch).batches())


def padded_tokens(lengths: np.ndarray, batches: list[GlobalBatch]) -> int:
    return sum(int(lengths[batch.samples()].max()) * batch.num_units for batch in batches)


@given(
    lengths=st.lists(st.integers(1, 40), max_size=200),
    multiple_of=st.integers(1, 6),
    max_samples=st.one_of(st.none(), st.integers(6, 20)),
    edges=st.one_of(st.none(), st.just((8, 16, 40))),
    window=st.integers(1, 90),
)
def test_batches_are_complete_and_within_budget(
    lengths: list[int], multiple_of: int, max_samples: int | None, edges: tuple[int, ...] | None, window: int
) -> None:
    array = np.array(lengths, dtype=np.int32)
    options = {"multiple_of": multiple_of, "max_samples": max_samples, "edges": edges, "window_samples": window}
    found = batches_of(buckets(array, **options), len(lengths))
    assert sorted(n for batch in found for n in batch.samples().tolist()) == list(range(len(lengths)))
    odd = 0
    for batch in found:
        longest = array[batch.samples()].max()
        padded = longest if edges is None else min(edge for edge in edges if edge >= longest)
        assert 0 < batch.num_units * padded <= 256
        assert batch.num_units <= (max_samples or 256)
        odd += batch.num_units % multiple_of != 0
    assert odd <= -(-len(lengths) // window)


def test_sorting_inside_windows_saves_most_of_the_padding() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1, 20_000).astype(np.int64), 1, 4096)
    plain = batches_of(FixedBatches(64, "short"), len(lengths))
    sorted_ = batches_of(buckets(lengths, budget=65_536, window_samples=8192), len(lengths))
    useful = lengths.sum()
    assert useful / padded_tokens(lengths, plain) < 0.25
    assert useful / padded_tokens(lengths, sorted_) > 0.9


def test_batches_do_not_come_in_order_of_length() -> None:
    lengths = np.arange(1, 201)
    found = [int(lengths[batch.samples()].max()) for batch in batches_of(buckets(lengths, window_samples=200), 200)]
    assert len(found) > 50
    assert abs(np.corrcoef(found, np.arange(len(found)))[0, 1]) < 0.3
    assert found != [int(lengths[b.samples()].max()) for b in batches_of(buckets(lengths, window_samples=200), 200, 1)]


@pytest.mark.parametrize(
    ("lengths", "change", "message"),
    [
        ([1, 300, 400], {}, "sample 1 has length 300, as one of 2 above 256"),
        ([100], {"multiple_of": 4}, "4 of them must fit into the budget of 256"),
        ([50], {"edges": (16, 32)}, "above 32"),
        ([200], {"edges": (16, 300)}, "above 16"),
        ([1], {"edges": (32, 16)}, "ascending"),
        ([1], {"edges": ()}, "ascending"),
        ([3, 0], {}, "sample 1 has 0"),
        ([1.5], {}, "float64"),
        ([[1]], {}, "shape"),
        ([1], {"budget": 0}, "budget"),
        ([1], {"multiple_of": 8, "max_samples": 4}, "max_samples 4"),
        ([1], {"window_samples": 0}, "window_samples"),
    ],
)
def test_what_cannot_be_batched_is_named(lengths: list, change: dict, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        buckets(np.array(lengths), **change)
