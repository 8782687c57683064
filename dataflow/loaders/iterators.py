"""What `iter(loader)` returns: the part that all kinds share.

It derives from torch's own base class, which draws seeds, checks pinning and walks the sampler, so that all of that is
as in torch.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import graph_settings

from connectors.errors import BadInputError
from dataflow.loaders.bad_samples import BadSample
from dataflow.loaders.collate import Fetch, is_gathered
from dataflow.loaders.device import Staging
from dataflow.loaders.foresight import Foresight, foresee
from dataflow.loaders.landmark import advanced
from dataflow.loaders.order_state import (
    describe_other_order,
    drawn_or_again,
    draws_undone,
    draws_unseen,
    is_elastic,
    is_set_elsewhere,
    keeps_state,
    restore_order,
    sampler_epoch,
    sampler_length,
    snapshot_order,
)
from dataflow.loaders.recycling import Recycler, keep_freed_memory
from dataflow.loaders.rehearsal import INLINE_OPENING, REOPENING, Setting
from dataflow.loaders.rereading import warn_of_rereading
from dataflow.loaders.state import Ledger, Progress, Tail, asks_dataset, kept_here, kept_states
from dataflow.loaders.torch_private import BaseIterator, DatasetKind, index_sampler, profiler_is_on
from dataflow.observe.stages import Recorder

if TYPE_CHECKING:
    from dataflow.loaders.dataloader import DataLoader

__all__ = ["LoaderIterator"]

_log = logging.getLogger(__name__)

_TORN = (
    "Ctrl-C, or another exception from outside, came while this iterator was at work, and it may have lost a batch; "
    "call iter() on the loader again: for a new epoch, or after load_state_dict(state_dict()) for the batches left"
)
# Odd, and far from small: no worker of one part of an epoch is seeded as one of another part.
_SEED_STRIDE = 0x9E3779B97F4A7C15
# Of an epoch, by all workers of a rank together.
_AHEAD_SHARE = 1 / 64


class LoaderIterator(BaseIterator):  # type: ignore[misc]
    """What all kinds have in common: the metering of `next`, the beginning of an epoch, and counting.

    It does not refer to its loader, so dropping either of them ends what it owns.

    Args:
        loader: The loader, whose attributes it reads.
        ledger: What it shares with the loader.
    """

    _base_seed: int
    _dataset: Any
    _shared_seed: int | None
    _staging: Staging | None = None  # also where torch's part of __init__ fails
    # What each copy of the dataset is told before it is read.
    _told: list[Any]
    # Whether it is in the middle of work that cannot be taken up again where an interrupt leaves it.
    _is_torn = False
    # Whether the sampler is asked for what lies behind its last index before the caller asks for it.
    _draws_tail = True
    # What torch does to begin an epoch in a new iterator.
    _opening = INLINE_OPENING
    # The loader, until the first batch is asked for.
    _opener: weakref.ref[DataLoader[Any]] | None = None

    def __init__(self, loader: DataLoader[Any], ledger: Ledger) -> None:
        self._ledger = ledger
        keep_freed_memory()
        undoes_seed = ledger.is_seeded and self._draws_later(loader)
        self._prepare(loader, REOPENING if undoes_seed else self._opening)
        with draws_undone(loader) if undoes_seed else contextlib.nullcontext():
            super().__init__(loader)
        self._meter = ledger.meter
        # Of its own: several threads may have an iterator each.
        self._recorder = Recorder()
        self._batch_size = loader.batch_size
        self._bad_samples = loader.bad_samples
        self._is_iterable = self._dataset_kind == DatasetKind.Iterable
        is_native = is_gathered(self._dataset_kind, self._dataset, self._auto_collation, self._collate_fn)
        self._takes_arrays = is_native and self._bad_samples is None
        self._staging = Staging.for_loader(loader.device, pins=self._pin_memory, pin_device=self._pin_memory_device)

    def __next__(self) -> Any:
        meter, progress = self._meter, self._progress
        if self._is_torn:
            raise RuntimeError(_TORN)
        meter.enter()
        progress.arrived()  # who asks for another batch goes past one that raised
        try:
            if self._opener is not None:
                self._follow_sampler()
                progress = self._progress
            # Recording a range costs as much as all the rest of a small batch, so it is done when somebody looks.
            with self._recorder:
                if self._IterableDataset_len_called is not None or profiler_is_on():
                    batch = super().__next__()
                else:
                    batch = self._next_data()
                    self._num_yielded += 1
        except BaseException as error:
            self._is_torn = self._is_torn and not isinstance(error, Exception)
            progress.ended = isinstance(error, StopIteration)
            meter.leave(in_loop=False)
            meter.take(self._recorder)
            raise
        meter.leave()
        meter.take(self._recorder)
        self._is_torn = False
        progress.arrived()
        return batch

    def _draws_later(self, loader: DataLoader[Any]) -> bool:
        """Whether torch's part of a new iterator draws nothing yet that this epoch consists of."""
        return True

    def _follow_sampler(self) -> None:
        """Begin anew if the sampler was set to another epoch behind `iter()`, as Lightning does when it resumes."""
        loader, self._opener = None if self._opener is None else self._opener(), None
        is_newest = self._ledger.progress is self._progress
        if loader is not None and is_newest and is_set_elsewhere(self._index_sampler, self._progress.epoch):
            self._reset(loader)
            self._opener = None

    def _prepare(self, loader: DataLoader[Any], opening: tuple[Any, ...], first_step: int = 0) -> None:
        """Let the cache foresee an epoch that is about to begin; `opening` is what torch does from here on."""
        ledger, sampler = self._ledger, index_sampler(loader)
        if ledger.foresight is None:
            ledger.foresight = foresee(loader.dataset, sampler)
            if ledger.foresight is not None:
                warn_of_rereading(loader.dataset, sampler)
        if ledger.foresight is not None and ledger.resume is None:
            later = REOPENING if loader.persistent_workers else self._opening
            has_threads = loader.num_workers > 0 and not loader.has_worker_processes
            ledger.foresight.prepare(Setting(sampler, loader.generator, opening, later, first_step, has_threads))

    def _begin(self, loader: DataLoader[Any], indices: Iterator[Any], order: dict[str, Any] | None = None) -> None:
        """Begin an epoch, or go on in one that a loaded state names.

        Args:
            loader: The loader.
            indices: A new iterator of the sampler.
            order: What determines the order, if it had to be taken down before `indices` was made.
        """
        sampler, resume, self._ledger.resume = self._index_sampler, self._ledger.resume, None
        self._sampler_iter = getattr(indices, "arrays", indices) if self._takes_arrays else indices
        if is_elastic(sampler):
            goes_on = resume is not None and resume.epoch == sampler.epoch  # else set_epoch() has moved it on
            if goes_on:  # the seed is put back, and the next epoch's workers have it
                self._base_seed = (self._base_seed + (sampler.first_step + 1) * _SEED_STRIDE) % 2**63
            ahead = resume.ahead if resume is not None and goes_on else set()
            progress = Progress({}, self._base_seed, sampler.first_step, ahead, epoch=sampler.epoch)
        elif resume is None:
            epoch = sampler_epoch(sampler, self._ledger.next_epoch)
            if order is None or self._is_iterable:  # torch may have drawn a seed for a data pipe since
                order = snapshot_order(loader)
            progress = Progress(order, self._base_seed, epoch=epoch, shared_seed=self._shared_seed)
            if self._ledger.is_told and keeps_state(sampler):
                self._sampler_iter = drawn_or_again(self._sampler_iter, sampler)
        else:
            progress = resume
            self._base_seed = progress.base_seed
            self._shuffle_by(progress.shared_seed)
            restore_order(loader, progress.order)
            self._prepare(loader, REOPENING, progress.batches)
            self._sampler_iter = self._draw_again(loader, progress)
        shards = loader.num_stream_readers if asks_dataset(loader) else 0
        states = progress.shard_states if progress is resume else kept_states(loader, self._ledger)
        goes_on_here = kept_here(loader, self._ledger) if self._is_iterable and not states else []
        if len(progress.shards) != shards:
            progress.shards, progress.next_shard = [0] * shards, 0
        self._told = [*states] if len(states) == shards else [None] * shards
        progress.shard_states = goes_on_here or [*self._told]
        if states and len(states) != shards:
            _log.warning(
                "the state of %s was kept by %d workers and this loader has another number: its samples continue where "
                "they were, and what it keeps besides starts over",
                type(self._dataset).__qualname__,
                len(states),
            )
        self._ledger.kept = []
        self._ledger.progress, self._ledger.is_told, self._ledger.is_seeded = progress, False, False
        self._ledger.over = None
        self._opener = None if self._is_iterable else weakref.ref(loader)
        self._progress = progress
        self._ledger.next_epoch = progress.epoch + 1
        if self._ledger.foresight is not None:
            self._ledger.foresight.begin()
        self._position = progress.batches
        self._skip = frozenset(progress.ahead)
        self._length = None if self._is_iterable else sampler_length(sampler)

    def _draw_again(self, loader: DataLoader[Any], progress: Progress) -> Iterator[Any]:
        """Return the indices of the epoch that were not handed out yet.

        Raises:
            BadInputError: The sampler draws another order than it did, or has fewer.
        """
        if self._is_iterable:
            return advanced(iter(self._index_sampler), 0, None)[0]
        self._ledger.resume = progress  # until it is followed: who iterates once more is refused again
        may_be_told = keeps_state(self._index_sampler)
        try:
            indices, is_same = advanced(iter(self._index_sampler), progress.batches, progress.landmark)
        except BadInputError:
            if not may_be_told:
                raise
            is_same = False
        if not is_same and may_be_told:
            # It was told where the epoch before was left, which holds for one iteration: the next one is a whole epoch.
            restore_order(loader, progress.order)
            indices, is_same = advanced(iter(self._index_sampler), progress.batches, progress.landmark)
        if not is_same:
            raise BadInputError(describe_other_order(self._index_sampler, progress.order))
        self._ledger.resume = None
        return indices

    def _shuffle_by(self, shared_seed: int | None) -> None:
        """Let a data pipe shuffle as it did before; torch's part has seeded it for a new epoch."""
        if shared_seed is not None:
            self._shared_seed = shared_seed
            self._dataset = graph_settings.apply_random_seed(self._dataset, torch.Generator().manual_seed(shared_seed))

    def _draw(self) -> tuple[int, Any]:
        """Return the next batch's number in the epoch and what the sampler says is in it.

        Raises:
            StopIteration: The sampler has no more.
        """
        while True:
            index = next(self._sampler_iter)
            if type(index) is list:
                index = index.copy()  # a sampler may fill the same one for the next batch, before this one is made
            number, self._position = self._position, self._position + 1
            if (foresight := self._foresight()) is not None:
                foresight.drew(number, index)
            if number not in self._skip:
                return number, index

    def _foresight(self) -> Foresight | None:
        """What to tell of progress: nobody, where a newer iterator of the same loader does that."""
        return self._ledger.foresight if self._ledger.progress is self._progress else None

    def _hand_out(self, number: int, index: Any) -> None:
        """Count a batch that goes to the caller, also one that went wrong: this iterator does not make it again.

        It stays under way until the caller has it, or goes past it: till then, a state begins with it.
        """
        progress, meter = self._progress, self._meter
        progress.underway = number  # first: Ctrl-C may come between any two lines
        progress.hand_out(number, None if self._is_iterable else index)
        meter.batches += 1
        if (foresight := self._foresight()) is not None:
            foresight.passed(progress.batches)
        if self._is_iterable:
            return
        # What stands for a batch may be anything that the dataset understands: a slice, a key, an iterator.
        meter.samples += operator.length_hint(index, 1) if self._auto_collation else 1
        if progress.batches == self._length:
            self._sampler_iter = progress.tail = Tail(self._sampler_iter)
            if self._draws_tail:
                progress.is_over()

    def _most_ahead(self, batches: int) -> int:
        """Return how many batches a worker may make ahead that nobody asked for, at most so many.

        None of streams, and of samplers that are seen to be drawn from. Through a cache a part of the epoch: the
        further apart ranks read, the more of its ring their blocks take.
        """
        if self._is_iterable or not draws_unseen(self._index_sampler):
            return 0
        if self._ledger.foresight is None:
            return batches
        epoch = sampler_length(self._index_sampler) or 0
        return min(batches, int(_AHEAD_SHARE * epoch / max(1, self._num_workers)))

    def _fetch_maker(self, *, may_join: bool = False) -> Callable[[], Fetch]:
        """Return what makes fetches for threads of this process, one for each; it does not refer to the iterator."""
        kind, dataset = self._dataset_kind, self._dataset
        options = {
            "auto_collation": self._auto_collation,
            "collate_fn": self._collate_fn,
            "drop_last": self._drop_last,
            "epoch": self._progress.epoch,
            "bad_samples": self._bad_samples,
            "may_join": may_join,
        }
        return lambda: Fetch(kind, dataset, memory=Recycler(), **options)

    def _note(self, found: list[BadSample]) -> None:
        """Note the bad samples of the batch that goes to the caller.

        Raises:
            CorruptError: They are more than the budget allows.
        """
        if found and self._ledger.rejects is not None:
            self._meter.add({}, {"samples.bad": self._ledger.rejects.add(found)})
