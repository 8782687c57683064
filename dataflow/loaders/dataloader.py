"""The drop-in `DataLoader`."""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

import torch
import torch.utils.data
from torch.utils.data import Dataset, Sampler, default_collate

from connectors.errors import BadInputError
from dataflow.dataset import Dataset as NativeDataset
from dataflow.loaders.bad_samples import BadSamples, Rejects
from dataflow.loaders.collate import _gathers_columns
from dataflow.loaders.generators import generators_kept
from dataflow.loaders.inline import InlineIterator
from dataflow.loaders.order_state import is_elastic, sampler_parts
from dataflow.loaders.process_iterator import ProcessIterator
from dataflow.loaders.schedule_sampler import find_rank
from dataflow.loaders.state import Ledger, goes_on, load_state, make_state, passes_end
from dataflow.loaders.stats import LoaderStats
from dataflow.loaders.thread_iterator import ThreadIterator
from dataflow.loaders.torch_private import DatasetKind, dataset_kind, index_sampler

__all__ = ["DataLoader"]

_T_co = TypeVar("_T_co", covariant=True)


class DataLoader(torch.utils.data.DataLoader[_T_co]):
    """torch's DataLoader, faster and resumable, which says where its time goes.

    Every argument of `torch.utils.data.DataLoader` keeps its place, default, meaning and errors; attributes, seeds,
    order and the behaviour of workers are torch's too. What is new:

    - Batches come from worker processes in shared memory that is reused. You may keep a batch as long as you like and
      write to it; its memory is reused only after the last tensor over it is gone.
    - `state_dict` and `load_state_dict`, at any moment.
    - A worker that dies or hangs is replaced, and its batches are made again.
    - `stats` says where the time went.

    Args:
        dataset: As in torch; also a dataset of `open_dataset`, which gives whole batches.
        batch_size: As in torch, and so are the other arguments up to `in_order`. One difference: while the caller waits
            for small batches, workers make more of them ahead than `prefetch_factor` says, up to 64 or 16 MiB by each
            worker. They do so if the sampler is torch's or ours and no worker that stays draws from the global random
            number generators.
        device: Where batches go, as a string (`"cuda"`, `"npu:0"`, ...) or `torch.device`; by default, and for `"cpu"`,
            they stay where they are.
        on_worker_failure: "restart" replaces a dead worker by one that continues after its last batch, with the global
            random number generators as they were then; the batches are the same. torch's `RuntimeError` is raised after
            four deaths over one batch, and at the first death with "raise" or if the worker had not yet begun.
        worker_deadline_s: How long a worker may take over one batch; its own start counts with its first one. A worker
            that takes longer is killed, which is a failure as above. By default there is no deadline, as in torch, nor
            without workers. (`timeout` limits the wait of the caller, and raises.)
        bad_samples: What to do about samples of a map-style dataset that cannot be read; by default their exception is
            raised, as in torch.
        workers: "process", as in torch, or "thread": threads of this process, for work that releases the interpreter's
            lock, with nothing to start, pickle or hand over. Batches, order and states are the same. What differs:
            threads share the global random number generators, so draws from them differ (transforms with an `rng` of
            their own do not use them), `get_worker_info()` is None, and one thread reads a stream. A thread that passes
            `worker_deadline_s` is left behind, and another makes its batch. "auto" takes threads for datasets of
            `open_dataset` that make whole batches, and processes for others.

    Raises:
        ValueError, TypeError: As torch does.
        BadInputError: `on_worker_failure` or `worker_deadline_s` is out of range, `bad_samples` cannot be followed, or
            `multiprocessing_context` makes no processes.
    """

    # Public attributes of an instance are arguments, as torch's are: frameworks build another loader from them.
    device: str | torch.device | None = None
    workers: str = "process"
    use_stateful_dataloader = True  # Accelerate asks for it, and keeps this loader's state

    def __init__(
        self,
        dataset: Dataset[_T_co] | NativeDataset,
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Sampler[Any] | Iterable[Any] | None = None,
        batch_sampler: Sampler[list[Any]] | Iterable[list[Any]] | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        generator: torch.Generator | None = None,
        *,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory_device: str = "",
        in_order: bool = True,
        device: str | torch.device | None = None,
        on_worker_failure: Literal["restart", "raise"] = "restart",
        worker_deadline_s: float | None = None,
        bad_samples: BadSamples | None = None,
        workers: Literal["process", "thread", "auto"] = "process",
    ) -> None:
        if on_worker_failure not in ("restart", "raise"):
            raise BadInputError(f'on_worker_failure must be "restart" or "raise", got {on_worker_failure!r}')
        if worker_deadline_s is not None and not worker_deadline_s > 0:
            raise BadInputError(f"worker_deadline_s must be a time above 0, got {worker_deadline_s!r}")
        _check_workers(workers, worker_init_fn, multiprocessing_context)
        # Subclasses written for torch's may have attributes of these names already.
        if device is not None:
            self.device = torch.device(device)
        if workers != "process":
            self.workers = workers
        self.on_worker_failure = on_worker_failure
        self.worker_deadline_s = worker_deadline_s
        self.bad_samples = bad_samples
        self._ledger = Ledger(rejects=None if bad_samples is None else Rejects(bad_samples))
        newer = {"in_order": in_order} if _KNOWS_IN_ORDER else {}
        super().__init__(
            dataset,  # type: ignore[arg-type]  # torch declares its own class and asks for items only
            batch_size,
            shuffle,
            sampler,
            batch_sampler,
            num_workers,
            collate_fn,
            pin_memory,
            drop_last,
            timeout,
            worker_init_fn,
            multiprocessing_context,
            generator,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
            pin_memory_device=pin_memory_device,
            **newer,
        )
        self.in_order = in_order
        _check_bad_samples(self)
        # Accelerate asks for it, and takes this loader as it is where batches are dealt to the ranks already: it would
        # deal each part to all ranks once more, and lose the rest.
        self._is_accelerate_prepared = is_elastic(self.batch_sampler)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made of, also by pickle: it stands where this loader does and has its own workers."""
        return {**self.__dict__, "_ledger": self._ledger.copied(), "_iterator": None}

    def __iter__(self) -> Any:
        """Begin an epoch, or continue where a loaded state says."""
        if passes_end(self, self._ledger):
            return iter(())
        meter = self._ledger.meter
        meter.enter(begins=True)
        try:
            # Going on draws what was drawn before, and nothing from the generators as they are now.
            with generators_kept() if goes_on(self, self._ledger) else contextlib.nullcontext():
                return super().__iter__()
        finally:
            meter.leave(in_loop=False)

    def _get_iterator(self) -> Any:
        if self.num_workers == 0:
            return InlineIterator(self, self._ledger)
        if not self.has_worker_processes:
            return ThreadIterator(self, self._ledger)
        self.check_worker_number_rationality()
        return ProcessIterator(self, self._ledger)

    @property
    def has_worker_processes(self) -> bool:
        """Whether other processes make the batches."""
        if self.num_workers == 0 or self.workers != "auto":
            return self.num_workers > 0 and self.workers != "thread"
        plain = self.collate_fn is default_collate and self.worker_init_fn is None
        return not (plain and self.multiprocessing_context is None and _gathers_columns(self.dataset))

    @property
    def num_stream_readers(self) -> int:
        """Among how many readers a stream is dealt out."""
        return self.num_workers if self.has_worker_processes else 1

    @property
    def has_lasting_workers(self) -> bool:
        """Whether there are workers that make the next epoch's batches, too."""
        return self._iterator is not None

    def set_epoch(self, epoch: int) -> None:
        """Let the next `iter()` walk this epoch; frameworks that count epochs tell their loaders.

        Samplers with `set_epoch` get the number; with other samplers, only transforms do.
        """
        for part in sampler_parts(index_sampler(self)):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        self._ledger.next_epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Return where the newest iterator stands, counted in batches that the caller received.

        Legal at any time. After the last batch of an epoch, the state is the beginning of the next epoch; who then sets
        the one that is over, by `set_epoch`, gets the nothing that is left of it. It is plain JSON, except what foreign
        samplers and datasets return from their own `state_dict`. It fits a loader with any number of workers; for an
        iterable dataset, which is dealt out by worker, with the same number.

        Random order: the epoch continues exactly. So do the next ones if the order is drawn from a `generator`, from a
        generator of torch, Python or numpy in an attribute of the sampler, from a seed and epoch, or by
        `ElasticBatchSampler`. If it is drawn from the global generators of the process, save those as well.
        """
        state, rejects = make_state(self, self._ledger), self._ledger.rejects
        return state if rejects is None else {**state, "bad_samples": sorted(rejects.samples, key=str)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Let the next `iter()` continue where the state was taken. That reads no sample of a map-style dataset.

        An iterable dataset continues by its own `load_state_dict`, or by that of what its `iter()` returns; if there is
        none, the loader reads again what it gave out, and drops it. The `state_dict` of a map-style dataset (with a
        generator of its transforms, say) is kept for each worker, and continues on the same number of workers. Between
        epochs, that and the `state_dict` of a stream is kept where a copy of the dataset goes on to the next one:
        without workers, with `persistent_workers`, and in a stream that a thread reads. A map-style dataset that worker
        threads share is not asked for it.

        Raises:
            BadInputError: Not a state of a loader, or one of another dataset, order or version; says what differs. The
                next `iter()` raises it if the sampler draws another order than it did, for a reason that no state
                holds.
        """
        self._ledger.resume = load_state(self, state_dict)
        # Workers that stay draw on from their generators, and a loader that goes on in another process has none.
        self._iterator = None
        self._ledger.is_told = self._ledger.resume is None
        self._ledger.is_seeded = bool(state_dict.get("seeded", False))
        self._ledger.next_epoch = state_dict.get("next_epoch", 0)
        self._ledger.over = state_dict.get("over")
        self._ledger.kept = copy.deepcopy([*state_dict.get("datasets", ())])
        self._ledger.progress = None
        if self._ledger.rejects is not None:
            self._ledger.rejects.samples = set(state_dict.get("bad_samples", ()))

    def stats(self) -> LoaderStats:
        """Return where the time of the loop went, since this loader was made."""
        return self._ledger.meter.stats(self.num_workers, _find_rank(self.batch_sampler))


def _check_bad_samples(loader: DataLoader[Any]) -> None:
    policy = loader.bad_samples
    if policy is None:
        return
    if dataset_kind(loader) == DatasetKind.Iterable:
        raise BadInputError("bad_samples needs a map-style dataset: a stream that has raised cannot go on behind it")
    if policy.action == "skip" and loader.batch_sampler is None:
        raise BadInputError('without batches there is nothing to leave a sample out of: use BadSamples("substitute")')
    if policy.action == "substitute" and not hasattr(loader.dataset, "__len__"):
        raise BadInputError(
            'a substitute is one of all samples of the dataset, and this dataset has no length: use BadSamples("skip")'
        )


def _check_workers(workers: str, worker_init_fn: Callable[[int], None] | None, context: Any) -> None:
    if workers not in ("process", "thread", "auto"):
        raise BadInputError(f'workers must be "process", "thread" or "auto", got {workers!r}')
    if workers == "thread" and worker_init_fn is not None:
        raise BadInputError("worker_init_fn sets up a process of its own, which a worker thread is not")
    process = getattr(context, "Process", None)
    if isinstance(process, type) and issubclass(process, threading.Thread):  # as MONAI's `use_thread_workers` passes
        raise BadInputError(
            f"multiprocessing_context makes threads ({process.__qualname__}), not processes: leave it out, and ask for "
            'them by workers="thread"'
        )


def _find_rank(sampler: Any) -> int:
    """Return the rank that a sampler deals to, or else that of this process."""
    rank = getattr(sampler, "rank", None)
    return rank if isinstance(rank, int) else find_rank()[0]


# torch has it since 2.6; before that, batches always come in order and so they do here unless asked otherwise.
_KNOWS_IN_ORDER = "in_order" in inspect.signature(torch.utils.data.DataLoader.__init__).parameters
