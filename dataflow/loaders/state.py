"""Where a loader stands, and how to go on from there.

A state counts the batches handed to the caller, never those drawn ahead, so it fits any number of workers. What lies
before that position is not read again: a sampler that can be asked for a position (`state_at`, as
`ElasticBatchSampler`) continues there; for any other the random number generators, its own state and its epoch are put
back to what they were when the epoch began, and the indices already used are drawn and dropped; the last of them is
compared with what it was (`landmark`), since a sampler may depend on more than a state can hold. An iterable dataset
continues by its own `state_dict`, or else by reading and dropping what was handed out.

States are JSON, except for what foreign samplers and datasets put into theirs.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from connectors.errors import BadInputError
from dataflow.loaders.bad_samples import Rejects
from dataflow.loaders.dataset_state import is_state, keep_state
from dataflow.loaders.landmark import Landmark
from dataflow.loaders.order_state import (
    check_generators,
    check_order,
    is_at,
    is_elastic,
    is_stateful,
    is_told,
    load_samplers,
    raise_unknown,
    sampler_length,
    sampler_parts,
    snapshot_order,
    take_rank,
)
from dataflow.loaders.stats import Meter
from dataflow.loaders.torch_private import DatasetKind, ExceptionWrapper, dataset_kind, index_sampler

if TYPE_CHECKING:
    from dataflow.loaders.dataloader import DataLoader
    from dataflow.loaders.foresight import Foresight

__all__ = [
    "STATE_VERSION",
    "Ledger",
    "Progress",
    "Tail",
    "asks_dataset",
    "goes_on",
    "kept_here",
    "kept_states",
    "load_state",
    "make_state",
    "passes_end",
    "read_state",
]

STATE_VERSION = 1


class Tail(Iterator[Any]):
    """What a sampler yields behind an epoch's last index: nothing, but it may draw or count its epochs then.

    torch's loader has it do that when the caller asks for another batch, if there are no workers, and before the last
    one if there are. A state of the next epoch comes after it, so who wants one has it done, too.

    Args:
        indices: That iterator, which has yielded as many as an epoch has.
    """

    def __init__(self, indices: Iterator[Any]) -> None:
        self._indices = indices
        self._is_drawing = False

    def __next__(self) -> Any:
        self._is_drawing = True
        try:
            return next(self._indices)
        finally:
            self._is_drawing = False

    def is_empty(self) -> bool:
        """Draw what is there; it is not lost by that. A sampler that is about to say it has no more is believed."""
        if self._is_drawing:  # this is a signal handler that wants a state
            return True
        try:
            self._indices = itertools.chain([next(self)], self._indices)
        except StopIteration:
            return True
        except Exception as error:  # the fault of no batch that was handed out
            self._indices = map(_raise, [error])
        return False


@dataclass
class Progress:
    """How far the newest iterator of a loader is in its epoch.

    Attributes:
        order: What determines the order of this epoch, as it was when the epoch began (`snapshot_order`).
        base_seed: What the workers' seeds are derived from.
        batches: All batches before this one were handed out. Counts from the beginning of the epoch.
        ahead: Batches handed out beyond that, where the loader does not keep the order.
        shards: For iterable datasets: batches handed out by each worker.
        shard_states: For iterable datasets with a state: each worker's, after the last batch of it that was handed out;
            the wrapped exception, if it could not be had.
        next_shard: For iterable datasets: the worker whose turn it is.
        epoch: The epoch's number: the sampler's own where it has one, else counted by the loader.
        shared_seed: For data pipes: what they shuffle by.
        finished: The epoch is over.
        ended: The caller has asked for one more batch, and was told so.
        tail: What the sampler has behind the last batch, once that was handed out.
        underway: A batch that is counted and has not reached the caller: it is being handed out, or raised instead.
        arriving: Where workers have datasets of their own: whose batch that is, and the state behind it.
        live_state: Where the dataset iterates in this process: returns its state.
        newest: The newest batch that was handed out in its turn, and what the sampler said is in it.
        landmark: Where there is no such batch: what a loaded state says of it.
    """

    order: dict[str, Any]
    base_seed: int
    batches: int = 0
    ahead: set[int] = field(default_factory=set)
    shards: list[int] = field(default_factory=list)
    shard_states: list[Any] = field(default_factory=list)
    next_shard: int = 0
    epoch: int = 0
    shared_seed: int | None = None
    finished: bool = False
    ended: bool = False
    tail: Tail | None = None
    underway: int | None = None
    arriving: tuple[int, Any] | None = None
    live_state: Callable[[], Any] | None = None
    newest: tuple[int, Any] | None = None
    landmark: Landmark | None = None

    def hand_out(self, number: int, index: Any) -> None:
        """Count a batch of which the sampler said that `index` is in it; None of a stream."""
        if number != self.batches:
            self.ahead.add(number)
            return
        self.newest = None if index is None else (number, index)
        self.batches += 1
        while self.batches in self.ahead:
            self.ahead.remove(self.batches)
            self.batches += 1

    def arrived(self) -> None:
        """Count what is under way as the caller's, who has it or goes past it. Ctrl-C may come at any line."""
        arriving, self.arriving = self.arriving, None
        if arriving is not None:
            worker_id, state = arriving
            self.shards[worker_id] += 1
            self.shard_states[worker_id] = state
            self.next_shard = (worker_id + 1) % len(self.shards)
        self.underway = None

    def find_landmark(self) -> Landmark | None:
        """Return a batch that was handed out, or is under way, by which the order can be known again."""
        return self.landmark if self.newest is None else Landmark.of(*self.newest)

    def is_over(self) -> bool:
        """Whether the epoch has no more batches. May have the sampler draw once more."""
        if self.tail is not None:
            self.finished, self.tail = self.tail.is_empty(), None
        return self.finished

    def reached(self) -> Progress:
        """Return how far the caller is, who has not got what is under way."""
        if self.underway is None:
            return self
        batches = min(self.batches, self.underway)
        ahead = {*self.ahead, *range(batches, self.batches)} - {self.underway}
        return replace(self, batches=batches, ahead=ahead, finished=False, tail=None, underway=None, arriving=None)

    def copied(self) -> Progress:
        """Return one that no iterator moves on."""
        states = self.shard_states
        if self.live_state is not None:
            try:
                states = [copy.deepcopy(self.live_state())]
            except Exception:  # is raised where somebody asks for the loader's state
                states = [ExceptionWrapper(where="in a dataset")]
        reached = self.reached()
        reached.is_over()
        # An index need not be one that can be pickled.
        reached = replace(reached, ahead={*reached.ahead}, newest=None, landmark=self.find_landmark())
        return replace(reached, shards=[*self.shards], shard_states=[*states], live_state=None)

    def as_dict(self) -> dict[str, Any]:
        """Return what a state keeps of it."""
        raise_unknown(part.get("state") for part in self.order["parts"])
        state = {"order": self.order, "base_seed": self.base_seed, "batches": self.batches, "ahead": sorted(self.ahead)}
        state["epoch"] = self.epoch
        if self.shared_seed is not None:
            state["shared_seed"] = self.shared_seed
        if self.shards:
            states = self.shard_states if self.live_state is None else [self.live_state()]
            raise_unknown(states)
            state |= {"shards": self.shards, "shard_states": states, "next_shard": self.next_shard}
        if (landmark := self.find_landmark()) is not None:
            state["landmark"] = landmark.as_dict()
        return copy.deepcopy(state)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Progress:
        """Rebuild it.

        Raises:
            TypeError, ValueError, KeyError: It is damaged.
        """
        values = copy.deepcopy(dict(state))
        progress = cls(**values | {"ahead": set(values["ahead"])})
        counts = [progress.batches, *progress.ahead, *progress.shards, progress.next_shard]
        if min(map(operator.index, counts)) < 0 or operator.index(progress.next_shard) >= max(1, len(progress.shards)):
            raise ValueError("a number is out of range")
        for number in (progress.epoch, progress.base_seed, progress.shared_seed or 0):
            operator.index(number)
        if len(progress.shards) != len(progress.shard_states):
            raise ValueError("there are not as many states as workers")
        if not all(map(is_state, progress.shard_states)):
            raise ValueError("what is kept of a dataset is not a state")
        if "landmark" in values:
            progress.landmark = Landmark.from_dict(values["landmark"], batches=progress.batches)
        return progress


@dataclass
class Ledger:
    """What a loader shares with its iterators, so that neither needs the other to be alive.

    Attributes:
        meter: Where the time goes.
        progress: Of the newest iterator; None before the first and after a state was loaded.
        resume: Where the next iterator is to go on.
        next_epoch: Number of the epoch that begins next.
        is_told: Whether a state between epochs was loaded, and none has begun since.
        kept: What each copy of the dataset keeps between epochs, by a loaded state.
        over: The epoch at whose end that state was saved, by a loop that had not asked for more yet.
        is_seeded: Whether that was the state of a loader whose workers stay: no epoch draws seeds for them any more.
        foresight: Tells the cache what comes, where the order and the cache allow it.
        rejects: The bad samples so far, where there is a policy for them.
    """

    meter: Meter = field(default_factory=Meter)
    progress: Progress | None = None
    resume: Progress | None = None
    next_epoch: int = 0
    is_told: bool = False
    kept: list[Any] = field(default_factory=list)
    over: int | None = None
    is_seeded: bool = False
    foresight: Foresight | None = None
    rejects: Rejects | None = None

    def copied(self) -> Ledger:
        """Return that of another loader which stands where this one does: its times and its foresight are its own."""
        return Ledger(
            progress=None if self.progress is None else self.progress.copied(),
            resume=None if self.resume is None else self.resume.copied(),
            next_epoch=self.next_epoch,
            is_told=self.is_told,
            kept=copy.deepcopy(self.kept),
            over=self.over,
            is_seeded=self.is_seeded,
            rejects=copy.deepcopy(self.rejects),
        )


def goes_on(loader: DataLoader[Any], ledger: Ledger) -> bool:
    """Whether the next iterator goes on in an epoch of which something was drawn from the process's generators.

    Nothing was before the first batch, if nobody has drawn ahead: where they are as they were, they are drawn from.
    """
    resume, sampler = ledger.resume, index_sampler(loader)
    if resume is None or not is_elastic(sampler):
        return resume is not None and (resume.batches > 0 or not is_at(resume.order))
    return bool(sampler.epoch == resume.epoch)  # else set_epoch() has moved it on


def passes_end(loader: DataLoader[Any], ledger: Ledger) -> bool:
    """Pass the end of the epoch that a state was saved at, if the caller says by `set_epoch` that it is still in it.

    So says a script that counts epochs: nothing is left of that one. Who counts steps says the next one.
    """
    over, sampler = ledger.over, index_sampler(loader)
    if over is None:
        return False
    said = sampler.epoch == over if is_elastic(sampler) else ledger.next_epoch == over or is_told(sampler, over)
    if said:
        ledger.over = None
        loader.set_epoch(over + 1)
    return bool(said)


def asks_dataset(loader: DataLoader[Any]) -> bool:
    """Whether a place in the epoch is also one in each copy of the dataset, of as many as there are readers.

    It is in a stream, and in a map-style dataset that keeps something beside its samples, such as a generator, and
    tells it, unless threads share it.
    """
    dataset = loader.dataset
    if dataset_kind(loader) == DatasetKind.Iterable:
        return True
    if is_elastic(index_sampler(loader)) or (loader.num_workers > 0 and not loader.has_worker_processes):
        return False
    return is_stateful(dataset) and not isinstance(dataset, torch.nn.Module)  # which tells its parameters


def kept_states(loader: DataLoader[Any], ledger: Ledger) -> list[Any]:
    """Return what each copy of the dataset kept at the end of the last epoch, for those that are made anew.

    Nothing where workers end with their epoch, or where the one copy is in this process and goes on by itself.
    """
    if not asks_dataset(loader) or (loader.has_worker_processes and not loader.persistent_workers):
        return []
    last, kept = ledger.progress, ledger.kept
    if loader.has_worker_processes and last is not None:
        kept = last.shard_states if last.finished else []
    if dataset_kind(loader) == DatasetKind.Iterable:  # may have nothing to say when it is not being read
        kept = [None if isinstance(state, ExceptionWrapper) else state for state in kept]
    return kept if any(state is not None for state in kept) else []


def kept_here(loader: DataLoader[Any], ledger: Ledger) -> list[Any]:
    """Ask the one copy of the dataset, where it is in this process: a stream, once it was read to its end."""
    if not asks_dataset(loader) or loader.has_worker_processes:
        return []
    if dataset_kind(loader) != DatasetKind.Iterable:
        return [keep_state(loader.dataset)]
    last = ledger.progress
    with contextlib.suppress(Exception):  # it may have nothing to say when it is not being read
        if last is not None and last.finished and (kept := keep_state(loader.dataset)) is not None:
            return [copy.deepcopy(kept)]
    return []


def make_state(loader: DataLoader[Any], ledger: Ledger) -> dict[str, Any]:
    """Return where a loader stands."""
    state, sampler = _identity(loader), index_sampler(loader)
    progress, over = ledger.progress or ledger.resume, ledger.over
    if progress is not None and (progress := progress.reached()).is_over():
        comes = sampler.state_dict()["epoch"] if is_elastic(sampler) else ledger.next_epoch
        is_next = comes == progress.epoch + 1  # else the caller has set another one since
        over, progress = progress.epoch if is_next and not progress.ended else None, None
    if over is not None:
        state["over"] = over
    if not is_elastic(sampler):
        if progress is None:
            order = snapshot_order(loader, between_epochs=True)
            raise_unknown(part.get("state") for part in order["parts"])
            state |= {"epoch": None, "next_epoch": ledger.next_epoch, "order": order}
            if kept := kept_states(loader, ledger) or kept_here(loader, ledger):
                raise_unknown(kept)
                state["datasets"] = copy.deepcopy(kept)
            return {**state, "seeded": True} if ledger.is_seeded or loader.has_lasting_workers else state
        return {**state, "epoch": progress.as_dict()}
    if progress is None or sampler.epoch != progress.epoch:  # set_epoch() has moved it on
        return {**state, "sampler": sampler.state_dict(), "ahead": []}
    return {**state, "sampler": sampler.state_at(progress.batches), "ahead": sorted(progress.ahead)}


def load_state(loader: DataLoader[Any], state: Any) -> Progress | None:
    """Prepare a loader's samplers to go on from `state`; return where in an epoch that is.

    Raises:
        BadInputError: Not a state of a loader, or of another dataset, order or version; says what differs.
    """
    own, sampler = _identity(loader), index_sampler(loader)
    if not isinstance(state, Mapping) or "version" not in state or not {"epoch", "sampler"} & state.keys():
        raise BadInputError(
            f"this is not the state of a dataflow DataLoader: {_describe(state)}; pass what its state_dict() returned"
        )
    for name, value in own.items():
        if state.get(name) != value:
            raise BadInputError(
                f"the loader state was saved with {name}={state.get(name)!r} and this loader has {value!r}: it would "
                "go on with other batches; build the loader as it was, or begin without the state"
            )
    try:
        operator.index(state.get("over", 0))
        if is_elastic(sampler):
            ahead = set(map(operator.index, state["ahead"]))
            sampler.load_state_dict(state["sampler"])
            place = Progress({}, 0, sampler.first_step, ahead, epoch=sampler.epoch)
            return place if place.batches or ahead else None
        progress, order = read_state(state)
        check_order(loader, order)
        if progress is not None:
            _take_place(loader, progress)
        load_samplers(loader, order, generators=progress is None)
    except BadInputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise BadInputError(f"the loader state is damaged: {error!r} while reading it") from error
    return progress


def read_state(state: Mapping[str, Any]) -> tuple[Progress | None, dict[str, Any]]:
    """Return where in an epoch a loader stood, None between epochs, and what the order depends on.

    Args:
        state: Of a loader whose sampler has none of its own.

    Raises:
        LookupError, TypeError, ValueError: It is damaged.
    """
    operator.index(state.get("next_epoch", 0))
    set(state.get("bad_samples", ()))
    if not all(map(is_state, iter(state.get("datasets", ())))):
        raise ValueError("what is kept of a dataset is not a state")
    progress = None if state["epoch"] is None else Progress.from_dict(state["epoch"])
    order = state["order"] if progress is None else progress.order
    return progress, {**order, "parts": [{**part} for part in order["parts"]]}


def _take_place(loader: DataLoader[Any], progress: Progress) -> None:
    """Make a place in an epoch this rank's; refuse that of another order, or of a stream dealt out otherwise."""
    is_stream = dataset_kind(loader) == DatasetKind.Iterable
    if is_stream and len(progress.shards) not in (0, loader.num_stream_readers):
        raise BadInputError(
            f"the loader state was saved with {len(progress.shards)} workers and this loader has "
            f"{loader.num_stream_readers}: an iterable dataset is dealt out by worker, so only the same number of them "
            "goes on with the same samples"
        )
    check_generators(loader, progress.order)
    if take_rank(loader, progress.order):
        progress.landmark = None  # is a batch of that rank


def _identity(loader: DataLoader[Any]) -> dict[str, Any]:
    """What a state must agree on with the loader that goes on from it."""
    state = {"version": STATE_VERSION, "batch_size": loader.batch_size, "drop_last": loader.drop_last}
    sampler = index_sampler(loader)
    if is_elastic(sampler):
        return state  # the sampler checks its own state, which may come from another number of ranks
    fingerprint = getattr(loader.dataset, "fingerprint", None)
    return {
        **state,
        "samplers": [type(part).__qualname__ for part in sampler_parts(sampler)],
        "length": None if dataset_kind(loader) == DatasetKind.Iterable else sampler_length(sampler),
        "fingerprint": fingerprint if isinstance(fingerprint, str) else None,
    }


def _describe(state: Any) -> str:
    if isinstance(state, Mapping):
        return f"a mapping with the keys {', '.join(sorted(map(str, state))[:8]) or '(none)'}"
    return f"a {type(state).__qualname__}"


def _raise(error: Exception) -> NoReturn:
    raise error
