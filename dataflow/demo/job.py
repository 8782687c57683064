"""What one run of the demo's training job is told: written by the showcase, read by every rank."""

from __future__ import annotations

import msgspec

__all__ = ["Job"]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What one run of the training job is told.

    Attributes:
        name: Prefix of the traces and of the result.
        train_url: Dataset to learn from.
        test_url: Dataset to be measured on.
        cache: Address of a daemon, or None for the embedded cache described by `tiers`.
        tiers: JSON of a `CacheConfig`, used when `cache` is None.
        folder: Where traces, checkpoints and results go.
        epochs: Number of passes over the training set.
        global_batch_size: Samples per optimizer step over all ranks.
        window_blocks: Blocks whose samples are shuffled together.
        buffer_bytes: Limit on the decoded blocks that each loader process keeps.
        num_workers: Loader processes per rank.
        checkpoint_every: Steps between checkpoints.
        die_at_step: Rank 1 kills itself (SIGKILL) after this many steps of the run; -1 for never.
        resume: Whether to go on from the newest checkpoint in `folder`.
    """

    name: str
    train_url: str
    test_url: str
    cache: str | None
    tiers: str
    folder: str
    epochs: int
    global_batch_size: int
    window_blocks: int
    buffer_bytes: int
    num_workers: int
    checkpoint_every: int
    die_at_step: int = -1
    resume: bool = False
