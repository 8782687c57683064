"""Batches as sequences of samples."""

import numpy as np
import pytest

from dataflow.dataset import Batch


@pytest.fixture
def batch() -> Batch:
    return Batch({"x": np.arange(6).reshape(3, 2), "name": ["a", "b", "c"]}, 3)


def test_a_batch_is_a_sequence_of_samples(batch: Batch) -> None:
    assert len(batch) == 3
    assert [sample["name"] for sample in batch] == ["a", "b", "c"]
    assert batch[-1]["x"].tolist() == [4, 5]
    assert [sample["name"] for sample in batch[1:]] == ["b", "c"]


def test_a_sample_is_a_view_of_its_batch(batch: Batch) -> None:
    assert np.shares_memory(batch[1]["x"], batch.columns["x"])


def test_reading_past_the_end_is_an_index_error(batch: Batch) -> None:
    with pytest.raises(IndexError):
        batch[3]


def test_torch_collates_a_batch_as_a_list_of_samples(batch: Batch) -> None:
    collate = pytest.importorskip("torch.utils.data").default_collate
    collated = collate(batch)
    assert collated["x"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert collated["name"] == ["a", "b", "c"]
