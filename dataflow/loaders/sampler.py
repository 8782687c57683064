"""The batch sampler for global batches of a fixed size, whatever the number of ranks or workers that read them."""

from __future__ import annotations

import hashlib
import logging
import operator
from collections.abc import Sized
from typing import Literal

from connectors.errors import BadInputError
from dataflow.loaders.schedule_sampler import ScheduleSampler
from dataflow.order import Division, EqualParts, FixedBatches, Mesh, Schedule, Shuffle

__all__ = ["ElasticBatchSampler"]

_log = logging.getLogger(__name__)


class ElasticBatchSampler(ScheduleSampler):
    """Deals global batches of a fixed size to the ranks; give it to a `DataLoader` as `batch_sampler`.

    The sequence of global batches is a function of (dataset, global batch size, shuffle, window, seed, epoch). By
    default the last global batch may be short. If it has fewer samples than there are ranks, some ranks get an empty
    list, which native datasets accept and torch's own collate refuses: use `drop_last` or `pad_last` there. Everything
    else is as in `ScheduleSampler`.

    Args:
        dataset: Anything with a length. Block order needs `dataset.index.blocks.first_sample`, which the datasets of
            `open_dataset` have; without it "block" means "full".
        global_batch_size: Samples in one step over all ranks.
        seed: Any integer; the same on every rank.
        shuffle: "block" (blocks, and samples inside a window of blocks: each block is read once an epoch), "full" (a
            permutation of all samples) or False (as stored).
        window_blocks: Blocks that "block" mixes with each other; by default as many as have 64 MiB and 512 samples, up
            to 64. More blocks mix better and take more memory: if they exceed the dataset's `buffer_bytes`, batches
            decode the same blocks again and again.
        rank: As in `ScheduleSampler`.
        world_size: As in `ScheduleSampler`.
        drop_last: Leave out a last global batch that is not full.
        pad_last: Fill it instead with samples from the beginning of the epoch; `part_at` says which are padding.
        mesh: As in `ScheduleSampler`.
        division: As in `ScheduleSampler`.

    Attributes:
        shuffle: As given, or "full" where "block" was asked of a dataset without blocks.

    Raises:
        BadInputError: An argument is out of range or the arguments do not fit together.
    """

    def __init__(
        self,
        dataset: Sized,
        global_batch_size: int,
        *,
        seed: int = 0,
        shuffle: Literal["block", "full", False] = "block",
        window_blocks: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        drop_last: bool = False,
        pad_last: bool = False,
        mesh: Mesh | None = None,
        division: Division = EqualParts(),  # noqa: B008  frozen and empty
    ) -> None:
        if drop_last and pad_last:
            raise BadInputError("drop_last and pad_last are two answers to the same question; give one")
        source = Shuffle.over(dataset, shuffle=shuffle, seed=seed, window_blocks=window_blocks)
        batching = FixedBatches(
            operator.index(global_batch_size), "drop" if drop_last else "pad" if pad_last else "short"
        )
        super().__init__(
            Schedule(source, batching),
            fingerprint=_fingerprint(dataset),
            rank=rank,
            world_size=world_size,
            mesh=mesh,
            division=division,
        )
        self.global_batch_size = batching.global_batch_size
        self.drop_last = bool(drop_last)
        self.shuffle = source.effective
        if self.global_batch_size < self.num_replicas:
            raise BadInputError(
                f"a global batch of {global_batch_size} samples cannot feed {self.num_replicas} ranks: "
                "global_batch_size counts the samples of all ranks together; make it at least their number"
            )
        if self.shuffle != shuffle:
            _log.info("%s has no block index; shuffling all samples", type(dataset).__qualname__)
        if not len(self) and len(dataset):
            _log.warning(
                "no step at all: drop_last leaves out the %d samples, fewer than the global batch of %d",
                len(dataset),
                self.global_batch_size,
            )


def _fingerprint(dataset: Sized) -> str:
    """The dataset's own fingerprint, or a digest of type and length: all that a foreign dataset tells about itself."""
    own = getattr(dataset, "fingerprint", None)
    if isinstance(own, str):
        return own
    kind = type(dataset)
    return hashlib.blake2b(f"{kind.__module__}.{kind.__qualname__}:{len(dataset)}".encode(), digest_size=16).hexdigest()
