"""The batch sampler whose global batches do not depend on how many ranks or workers read them.

Step `k` of an epoch is positions `[k * G, (k + 1) * G)` of the epoch's order for a global batch of `G` samples; a rank
reads its contiguous part of them. So a state is a position, and any other number of ranks or workers goes on from it.
"""

from __future__ import annotations

import hashlib
import logging
import operator
import os
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch.distributed
from torch.utils.data import Sampler

from connectors.errors import BadInputError
from dataflow.order import BlockOrder, FullOrder, Order, SequentialOrder, part_bounds, rank_from_environment

__all__ = ["ElasticBatchSampler"]

_log = logging.getLogger(__name__)

_STATE_VERSION = 1
# Positions looked up at once: large enough that numpy's cost per call vanishes, small enough to stay in the L2 cache.
_LOOK_AHEAD_SAMPLES = 8192


@dataclass
class _Run:
    """One pass over an epoch: the step at which it begins, and how many steps of the epoch are drawn."""

    epoch: int
    first_step: int
    step: int


class ElasticBatchSampler(Sampler[list[int]]):
    """Deals each global batch to the ranks; give it to a `DataLoader` as `batch_sampler`.

    The sequence of global batches is a function of (dataset, global batch size, shuffle, window, seed, epoch). All
    ranks have the same number of steps. With `drop_last=False` the last global batch may be short: ranks get fewer
    samples in it, and, where it has fewer samples than there are ranks, some get an empty list.

    Every iterator walks the next epoch; the first walks epoch 0, or the one that `set_epoch` named, or goes on where a
    loaded state says. An iterator takes its epoch when it is drawn from first: torch's loader makes one that it never
    uses. Not thread-safe. Ranks are looked up once, here: initialise torch.distributed before.

    Args:
        dataset: Anything with a length. Block order needs `dataset.index.blocks.first_sample`, which the datasets of
            `open_dataset` have; without it "block" means "full".
        global_batch_size: Samples in one step over all ranks.
        seed: Any integer; the same on every rank.
        shuffle: "block" (blocks, and samples inside a window of blocks: each block is read once an epoch), "full" (a
            permutation of all samples) or False (as stored).
        window_blocks: Blocks that "block" mixes with each other. More mixes better and holds more blocks at a time.
        rank: This process; by default from torch.distributed when it is initialised, else from the launcher's
            environment (`dataflow.order.rank_from_environment`), else 0 of 1.
        world_size: The number of processes; given together with `rank` or not at all.
        drop_last: Leave out a last global batch that is not full.

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
        window_blocks: int = 64,
        rank: int | None = None,
        world_size: int | None = None,
        drop_last: bool = False,
    ) -> None:
        self.rank, self.world_size = _find_rank(rank, world_size)
        self.global_batch_size = operator.index(global_batch_size)
        if self.global_batch_size < 1:
            raise BadInputError(f"global_batch_size must be >= 1, got {global_batch_size}")
        if self.global_batch_size < self.world_size:
            raise BadInputError(
                f"a global batch of {global_batch_size} samples cannot feed {self.world_size} ranks: global_batch_size "
                "counts the samples of all ranks together; make it at least the number of ranks"
            )
        if shuffle is not False and shuffle not in ("block", "full"):
            raise BadInputError(f'shuffle must be "block", "full" or False, got {shuffle!r}')
        if window_blocks < 1:
            raise BadInputError(f"window_blocks must be >= 1, got {window_blocks}")
        self.seed = operator.index(seed)
        self.drop_last = bool(drop_last)
        self.window_blocks = operator.index(window_blocks)
        self._num_samples = len(dataset)
        self._first_sample = _first_sample_of_blocks(dataset) if shuffle == "block" else None
        if shuffle == "block" and self._first_sample is None:
            _log.info("%s has no block index; shuffling all samples", type(dataset).__qualname__)
            shuffle = "full"
        self.shuffle = shuffle
        self._fingerprint = _fingerprint(dataset)
        if not len(self) and self._num_samples:
            _log.warning(
                "no step at all: drop_last leaves out the %d samples, fewer than the global batch of %d",
                self._num_samples,
                self.global_batch_size,
            )
        self._run = self._next = _Run(epoch=0, first_step=0, step=0)

    def __len__(self) -> int:
        """The number of steps of a whole epoch, the same on every rank."""
        whole, rest = divmod(self._num_samples, self.global_batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[list[int]]:
        """Walk the next epoch."""
        self._run = self._next
        return self._draw()

    @property
    def epoch(self) -> int:
        """The epoch that the newest iterator walks; before there is one, the epoch that it will walk."""
        return self._run.epoch

    @property
    def first_step(self) -> int:
        """The step of its epoch at which the newest iterator begins: 0, unless a state was loaded."""
        return self._run.first_step

    def set_epoch(self, epoch: int) -> None:
        """Let the next iterator walk this epoch; a loaded position inside the same epoch is kept."""
        if self._next.epoch != operator.index(epoch):
            self._next = _Run(epoch=operator.index(epoch), first_step=0, step=0)
        self._run = self._next

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the steps that the newest iterator has yielded, as plain JSON.

        Whoever draws ahead of training wants `state_at` instead.
        """
        return self.state_at(self._run.step)

    def state_at(self, step: int) -> dict[str, Any]:
        """Return the state after the first `step` steps of the current epoch, counted from the epoch's beginning.

        After the last step that is the beginning of the next epoch. Rank and world size are not part of it: any number
        of ranks may load the same state.

        Raises:
            BadInputError: Not `0 <= step <= len(self)`.
        """
        if not 0 <= step <= len(self):
            raise BadInputError(f"step must lie in [0, {len(self)}], got {step}")
        epoch, done = self._run.epoch, step * self.global_batch_size
        if step and step == len(self):
            epoch, done = epoch + 1, 0
        return {**self._identity(), "epoch": epoch, "position": done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iterator go on from `state`, in constant time. Every rank loads the same state.

        Raises:
            BadInputError: The state is damaged or of another version, dataset, order or batch size; nothing changes.
        """
        if not isinstance(state, Mapping):
            raise BadInputError(f"a sampler state is a mapping, got {type(state).__qualname__}")
        missing = [name for name in (*self._identity(), "epoch", "position") if name not in state]
        if missing and state.get("version", _STATE_VERSION) == _STATE_VERSION:
            raise BadInputError(f"the sampler state lacks {', '.join(missing)}")
        for name, own in self._identity().items():
            if state[name] != own or type(state[name]) is not type(own):
                raise BadInputError(_MISFITS.get(name, _MISFIT).format(name=name, theirs=state[name], own=own))
        epoch, position = state["epoch"], state["position"]
        if type(epoch) is not int or type(position) is not int:
            raise BadInputError(f"epoch and position of a sampler state are integers, got {epoch!r} and {position!r}")
        step, rest = divmod(position, self.global_batch_size)
        if rest or not 0 <= step <= len(self):
            raise BadInputError(
                f"position {position} does not begin one of {len(self)} steps of {self.global_batch_size} samples"
            )
        self._run = self._next = _Run(epoch=epoch, first_step=step, step=step)

    def _identity(self) -> dict[str, Any]:
        """What a state must agree on with the sampler that goes on from it."""
        return {
            "version": _STATE_VERSION,
            "fingerprint": self._fingerprint,
            "global_batch_size": self.global_batch_size,
            "shuffle": self.shuffle,
            "window_blocks": self.window_blocks,
            "seed": self.seed,
            "drop_last": self.drop_last,
        }

    def _draw(self) -> Iterator[list[int]]:
        run = self._run = self._next
        self._next = _Run(epoch=run.epoch + 1, first_step=0, step=0)
        order = self._order(run.epoch)
        steps_at_once = max(1, _LOOK_AHEAD_SAMPLES * self.world_size // self.global_batch_size)
        for first in range(run.step, len(self), steps_at_once):
            bounds = [self._bounds(step) for step in range(first, min(first + steps_at_once, len(self)))]
            positions = np.concatenate([np.arange(start, stop, dtype=np.int64) for start, stop in bounds])
            samples = order.at(positions).tolist()
            end = 0
            for start, stop in bounds:
                begin, end = end, end + stop - start
                run.step += 1
                yield samples[begin:end]

    def _bounds(self, step: int) -> tuple[int, int]:
        """Where this rank's part of a step lies in the epoch's order."""
        first = step * self.global_batch_size
        length = min(self.global_batch_size, self._num_samples - first)
        start, stop = part_bounds(length, self.rank, self.world_size)
        return first + start, first + stop

    def _order(self, epoch: int) -> Order:
        if self.shuffle is False:
            return SequentialOrder(self._num_samples)
        if self._first_sample is None:
            return FullOrder(self._num_samples, self.seed, epoch)
        return BlockOrder(self._first_sample, self.seed, epoch, self.window_blocks)


_MISFIT = (
    "the sampler state was saved with {name}={theirs!r} and this sampler has {own!r}, which changes the "
    "order of samples: build the sampler as it was, or begin without the state"
)
_MISFITS = {
    "version": "the sampler state has version {theirs!r} and this release reads {own}; use the release that wrote it",
    "fingerprint": "the sampler state belongs to another dataset (fingerprint {theirs!r}, this one has {own!r})",
}


def _find_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise BadInputError(f"give rank and world_size together or neither, got rank={rank}, world_size={world_size}")
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return rank_from_environment(os.environ) or (0, 1)
    if not 0 <= rank < world_size:
        raise BadInputError(
            f"rank must lie in [0, world_size), got rank {rank} of world size {world_size}: ranks count from 0"
        )
    return operator.index(rank), operator.index(world_size)


def _first_sample_of_blocks(dataset: Sized) -> npt.NDArray[np.int64] | None:
    blocks = getattr(getattr(dataset, "index", None), "blocks", None)
    first_sample = getattr(blocks, "first_sample", None)
    if first_sample is None:
        return None
    first_sample = np.asarray(first_sample, dtype=np.int64)
    if not first_sample.size or first_sample[-1] != len(dataset):
        raise BadInputError(
            f"the index of {type(dataset).__qualname__} does not cover its {len(dataset)} samples; "
            'pass shuffle="full", or a dataset whose index fits'
        )
    return first_sample


def _fingerprint(dataset: Sized) -> str:
    """The dataset's own fingerprint, or a digest of type and length: all that a foreign dataset tells about itself."""
    own = getattr(dataset, "fingerprint", None)
    if isinstance(own, str):
        return own
    kind = type(dataset)
    return hashlib.blake2b(f"{kind.__module__}.{kind.__qualname__}:{len(dataset)}".encode(), digest_size=16).hexdigest()
