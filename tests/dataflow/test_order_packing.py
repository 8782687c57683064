import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.errors import BadInputError
from dataflow.order import Epoch, PackedBatches, Shuffle, first_fit_decreasing, lay_out_pack


def one_by_one(lengths: list[int], capacity: int) -> list[int]:
    """First-fit decreasing as the textbook has it."""
    room: list[int] = []
    packs = [0] * len(lengths)
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        pack = next((pack for pack, left in enumerate(room) if left >= lengths[item]), len(room))
        room[pack:] = room[pack:] or [capacity]
        room[pack] -= lengths[item]
        packs[item] = pack
    return packs


@given(capacity=st.integers(1, 60), data=st.data())
def test_packing_all_items_of_a_length_at_once_is_the_textbook_algorithm(capacity: int, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=80))
    assert first_fit_decreasing(np.array(lengths, dtype=np.int64), capacity).tolist() == one_by_one(lengths, capacity)


@given(
    lengths=st.lists(st.integers(1, 50), max_size=150),
    packs_per_step=st.integers(1, 7),
    window=st.integers(1, 80),
)
def test_packs_hold_every_sample_once_and_never_too_much(lengths: list[int], packs_per_step: int, window: int) -> None:
    array = np.array(lengths, dtype=np.int16)
    batching = PackedBatches(array, capacity=64, packs_per_step=packs_per_step, window_samples=window, seed=5)
    found = list(Epoch(Shuffle(len(lengths), None, "full", 1, 1), batching, 0).batches())
    assert sorted(n for batch in found for n in batch.samples().tolist()) == list(range(len(lengths)))
    for batch in found:
        sums = batch.unit_sums(array[batch.samples()].astype(np.int64))
        assert sums.min() > 0
        assert sums.max() <= 64
    short = sum(batch.num_units != packs_per_step for batch in found)
    assert short <= -(-len(lengths) // window)


def test_packing_leaves_almost_nothing_empty_on_realistic_lengths() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1, 50_000).astype(np.int64), 1, 2048)
    packs = first_fit_decreasing(lengths, 2048)
    fill = lengths.sum() / ((packs.max() + 1) * 2048)
    assert fill > 0.999
    assert lengths.sum() / (len(lengths) * 2048) < 0.3  # one sample a row


def test_packs_do_not_come_in_the_order_in_which_they_were_filled() -> None:
    lengths = np.arange(1, 501)
    batching = PackedBatches(lengths, capacity=500, packs_per_step=1, window_samples=500, seed=5)
    longest = [int(lengths[b.samples()].max()) for b in Epoch(Shuffle(500, None, "full", 1, 1), batching, 0).batches()]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.3


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6), slack=st.integers(0, 5))
def test_a_pack_knows_where_its_documents_are(lengths: list[int], slack: int) -> None:
    documents = [np.arange(length, dtype=np.uint16) + 100 for length in lengths]
    pack = lay_out_pack(documents, sum(lengths) + slack, filling=7)
    assert pack.tokens.dtype == np.uint16
    assert pack.boundaries.tolist() == [0, *np.cumsum(lengths).tolist()]
    for number, (start, stop) in enumerate(zip(pack.boundaries, pack.boundaries[1:], strict=False)):
        assert pack.tokens[start:stop].tolist() == documents[number].tolist()
        assert pack.position_ids[start:stop].tolist() == list(range(lengths[number]))
        assert set(pack.document_ids[start:stop].tolist()) <= {number}
    end = sum(lengths)
    assert pack.tokens[end:].tolist() == [7] * slack
    assert pack.document_ids[end:].tolist() == [-1] * slack
    assert pack.position_ids[end:].tolist() == [0] * slack


def test_documents_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BadInputError, match="pack of 4"):
        lay_out_pack([np.arange(3), np.arange(2)], 4, filling=0)
    with pytest.raises(BadInputError, match="pack of 4"):
        lay_out_pack([], 4, filling=0)
    with pytest.raises(BadInputError, match="sample 1 has length 9"):
        PackedBatches(np.array([3, 9]), capacity=8, packs_per_step=1, window_samples=4, seed=0)
    with pytest.raises(BadInputError, match="packs_per_step"):
        PackedBatches(np.array([3]), capacity=8, packs_per_step=0, window_samples=4, seed=0)
