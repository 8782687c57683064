from collections.abc import Sequence

import numpy as np
import pytest
from torch.utils.data import DataLoader

from connectors.errors import BadInputError
from dataflow.loaders.packs import PackedDataset
from dataflow.loaders.schedule_sampler import ScheduleSampler
from dataflow.order import PackedBatches, Schedule, Shuffle

LENGTHS = np.random.default_rng(0).integers(1, 30, 120)


class Documents:
    """Document `n` is its own number, as often as it has tokens."""

    def __init__(self) -> None:
        self.calls = 0

    def __getitems__(self, numbers: Sequence[int]) -> list[dict]:
        self.calls += 1
        return [{"text": np.full(LENGTHS[number], number, dtype=np.int32)} for number in numbers]


def packed() -> PackedDataset:
    return PackedDataset(Documents(), "text", capacity=32, filling=-5)


def test_every_token_of_every_document_arrives_once_on_some_rank() -> None:
    schedule = Schedule(
        Shuffle(120, None, "full", 0, 1), PackedBatches(LENGTHS, 32, packs_per_step=8, window_samples=50, seed=0)
    )
    tokens, steps = [], []
    for rank in range(2):
        sampler = ScheduleSampler(schedule, fingerprint="documents", rank=rank, world_size=2)
        batches = list(DataLoader(packed(), batch_sampler=sampler))
        steps.append(len(batches))
        for batch in batches:
            real = batch["document_ids"] >= 0
            assert (batch["tokens"][~real] == -5).all()
            tokens.append(batch["tokens"][real].numpy())
    assert np.array_equal(np.bincount(np.concatenate(tokens), minlength=120), LENGTHS)
    assert steps[0] == steps[1]


def test_a_batch_of_packs_is_one_request() -> None:
    dataset = packed()
    batch = dataset.__getitems__([[3, 4], [5]])
    assert dataset._dataset.calls == 1
    assert batch[0]["tokens"].tolist() == packed()[[3, 4]]["tokens"].tolist()
    ends = np.cumsum(LENGTHS[[3, 4]])
    assert batch[0]["document_ids"].tolist() == [0] * ends[0] + [1] * LENGTHS[4] + [-1] * (32 - ends[1])
    assert batch[0]["position_ids"][ends[0]] == 0
    assert len(dataset.__getitems__([])) == 0


def test_documents_longer_than_was_planned_are_refused() -> None:
    with pytest.raises(BadInputError, match="pack of 32"):
        packed()[list(range(20))]
