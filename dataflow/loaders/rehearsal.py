"""What a sampler that is not ours will yield: a copy of it is drawn from ahead of time.

The copy draws from generators of its own, which begin as copies of the real ones at the moment before torch touches
them and are swapped in while it draws. So the order, the generators and the state of the loader are what they would be
without. At the end of an epoch the copy repeats what torch does to begin the next one.

What the sampler really yields is compared with what the copy yielded. Where they differ inside an epoch, its order
depends on something else (on generators that the model draws from as well, on measurements), and nothing more of this
epoch is announced; after a few such epochs, nothing at all. Where only the next epoch differs, another copy begins it,
and after a few of those none goes past the end.

A sampler that is no iterator of its own and can be copied is rehearsed. In a job of several processes only torch's own
samplers are: others may ask the other ranks, who would not answer. So it is where threads of this process make the
batches: while they are at work no generator is swapped, and an epoch that needs one is not foretold before it begins.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
import torch.distributed
from torch.utils.data import (
    BatchSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from connectors.errors import BadInputError
from dataflow.loaders.announcer import Announcer, Step
from dataflow.loaders.generators import GeneratorStates, generators_kept
from dataflow.loaders.order_state import sampler_parts

if TYPE_CHECKING:
    from dataflow.dataset import Dataset

__all__ = ["INLINE_OPENING", "REOPENING", "WORKERS_OPENING", "Rehearsal", "RehearsedForesight", "Setting"]

_log = logging.getLogger(__name__)

_Opening: TypeAlias = tuple[Literal["iter", "seed"], ...]

# Drawn at once: enough that swapping generators vanishes.
_CHUNK_SAMPLES = 8192
_CHUNK_STEPS = 256
# Next epochs foretold wrongly before no more are, and epochs in which the copy went astray.
_MAX_WRONG_EPOCHS = 2
_MAX_ASTRAY = 3

# These change nothing of themselves while they are drawn from, so a shallow copy does.
# They draw from the global generators, if at all, for their first index.
_GENERATED = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_TORCH = (BatchSampler, SequentialSampler, DistributedSampler, *_GENERATED)
_CONSTANT = (list, tuple, range)

INLINE_OPENING: _Opening = ("iter", "seed")
"""What torch does to begin an epoch without workers."""

WORKERS_OPENING: _Opening = ("iter", "seed", "iter")
"""What it does to begin one with new workers."""

REOPENING: _Opening = ("iter",)
"""What it does to begin one with workers that are there already, or to go on in one."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How an epoch begins.

    Attributes:
        sampler: What yields the indices.
        generator: The loader's own, if it has one.
        opening: What torch does to begin this epoch: `iter` of the sampler, `seed` of the workers drawn.
        next_opening: And the epochs after it.
        first_step: Steps of the epoch that a loaded state has passed already.
        has_threads: Threads of this process, who share its generators, make the batches once the epoch has begun.
    """

    sampler: Any
    generator: torch.Generator | None
    opening: _Opening
    next_opening: _Opening
    first_step: int = 0
    has_threads: bool = False

    @property
    def next_is_private(self) -> bool:
        """Whether the epochs to come draw from generators that nobody else uses."""
        random_parts = (part for part in sampler_parts(self.sampler) if type(part) in _GENERATED)
        return all(part.generator is not None for part in random_parts) and (
            self.generator is not None or "seed" not in self.next_opening
        )


class Rehearsal:
    """A copy of a sampler, ahead of the real one.

    Args:
        setting: How the epoch begins; copied now.
        dataset: Shared by the copy, not copied.
        epoch: A number for the epoch; those that follow count on.
        epoch_stride: By how much the sampler's own epoch grows from one to the next; None not to go past the end.

    Attributes:
        expected: Of steps drawn and not asked about yet, by epoch and step: what they yielded, as a hash.

    Raises:
        TypeError: It cannot be copied.
        BadInputError: It must not be.
    """

    def __init__(self, setting: Setting, dataset: Any, *, epoch: int, epoch_stride: int | None) -> None:
        memo: dict[int, Any] = {id(dataset): dataset}
        self.expected: dict[tuple[int, int], int] = {}
        self._sampler = _copied(setting.sampler, memo, has_threads=setting.has_threads)
        self._generator = copy.deepcopy(setting.generator, memo)
        self._states = GeneratorStates.now()
        self._setting = setting
        self._num_samples = len(dataset)
        self._epoch = epoch
        self._epoch_stride = epoch_stride if setting.next_is_private or not setting.has_threads else None
        self._may_swap = True

    def steps(self) -> Iterator[Step]:
        """Yield the steps to come; what fails ends it, since the real sampler will say so itself."""
        epoch, opening, first = self._epoch, self._setting.opening, self._setting.first_step
        try:
            while True:
                indices, step = self._open(opening), 0
                while chunk := self._draw(indices):
                    for batch in chunk:
                        if step >= first:
                            self.expected[epoch, step] = hash(batch)
                            yield epoch, step, self._samples(batch)
                        step += 1
                if not step or self._epoch_stride is None:
                    return
                _set_epoch(self._sampler, self._epoch_stride)
                epoch, opening, first = epoch + 1, self._setting.next_opening, 0
        except Exception as error:
            _log.info("a rehearsal of %s ends: %r", type(self._sampler).__qualname__, str(error))

    def _open(self, opening: _Opening) -> Iterator[Any]:
        indices: Iterator[Any] = iter(())
        with self._own_generators():
            for deed in opening:
                if deed == "iter":
                    indices = iter(self._sampler)
                else:
                    torch.empty((), dtype=torch.int64).random_(generator=self._generator)
        return indices

    def _draw(self, indices: Iterator[Any]) -> list[tuple[int, ...]]:
        drawn: list[tuple[int, ...]] = []
        num_samples = 0
        with self._own_generators():
            while num_samples < _CHUNK_SAMPLES and len(drawn) < _CHUNK_STEPS:
                batch = next(indices, None)
                if batch is None:
                    break
                drawn.append(_numbers(batch))
                num_samples += len(drawn[-1])
        # The first indices are drawn before the epoch begins.
        self._may_swap = not self._setting.has_threads
        return drawn

    def _samples(self, batch: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.int64]]:
        samples = np.array(batch, np.int64)
        samples[samples < 0] += self._num_samples
        # A number out of range is the real sampler's error to make.
        return samples[(samples >= 0) & (samples < self._num_samples)]

    @contextlib.contextmanager
    def _own_generators(self) -> Iterator[None]:
        if not self._may_swap:
            yield
            return
        with generators_kept():
            self._states.restore()
            try:
                yield
            finally:
                self._states = GeneratorStates.now()


class RehearsedForesight:
    """See `dataflow.loaders.foresight.Foresight`: the future of a sampler that is not ours.

    Args:
        dataset: Gives the block table and the reader.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._announcer = Announcer(dataset)
        self._epoch = -1
        self._current: Rehearsal | None = None
        # Made at the beginning of an epoch that was announced already, in case that it is another one.
        self._instead: Rehearsal | None = None
        self._first_step = 0
        self._wrong_epochs = 0
        self._stride = 1
        self._own_epoch: int | None = None
        self._astray = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return RehearsedForesight, (self._dataset,)

    def prepare(self, setting: Setting) -> None:
        """See `Foresight.prepare`."""
        self._instead = None
        if self._astray == _MAX_ASTRAY:
            return
        goes_on = not setting.first_step and self._announcer.expects(self._epoch + 1, 0)
        self._epoch += 1
        self._first_step = setting.first_step
        self._learn_stride(setting.sampler)
        stride = self._stride if self._wrong_epochs < _MAX_WRONG_EPOCHS else None
        try:
            rehearsal = Rehearsal(setting, self._dataset, epoch=self._epoch, epoch_stride=stride)
        except Exception as error:
            self._astray = _MAX_ASTRAY
            self._stand_back(error)
            return
        if goes_on:
            self._instead = rehearsal
        else:
            self._current = rehearsal

    def begin(self) -> None:
        """See `Foresight.begin`."""
        if self._current is not None and self._instead is None:
            self._announce()

    def drew(self, step: int, indices: Any) -> None:
        """See `Foresight.drew`."""
        if self._current is None or self._agrees(step, indices):
            self._instead = None
        elif self._instead is not None:
            # The next epoch is not what it looked like at the end of the last one.
            self._wrong_epochs += 1
            self._current, self._instead = self._instead, None
            self._announce()
            self.drew(step, indices)
        else:
            self._astray += 1
            self._stand_back("its order depends on more than its generators")

    def passed(self, steps: int) -> None:
        """See `Foresight.passed`."""
        if self._current is None:
            return
        self._announcer.passed(steps)
        expected = self._current.expected
        while expected and (oldest := next(iter(expected))) < (self._epoch, steps):
            del expected[oldest]

    def close(self) -> None:
        """See `Foresight.close`."""
        self._announcer.close()

    def _announce(self) -> None:
        assert self._current is not None
        self._announcer.begin(self._epoch, self._first_step, self._current.steps())

    def _agrees(self, step: int, indices: Any) -> bool:
        assert self._current is not None
        # Workers may be asked for more steps than fit the plan; those are not looked at.
        expected = self._current.expected.pop((self._epoch, step), None)
        try:
            return expected is None or expected == hash(_numbers(indices))
        except TypeError:
            return False

    def _learn_stride(self, sampler: Any) -> None:
        """Take note of the sampler's own epoch: not everybody calls `set_epoch`, and some epochs are left out."""
        own_epoch = next((part.epoch for part in sampler_parts(sampler) if _has_epoch(part)), None)
        if own_epoch is not None and self._own_epoch is not None and own_epoch - self._own_epoch != self._stride:
            self._stride = own_epoch - self._own_epoch
            self._wrong_epochs = 0
        self._own_epoch = own_epoch

    def _stand_back(self, reason: object) -> None:
        _log.info("no longer announcing the batches of the sampler to the cache: %s", str(reason))
        self._current = self._instead = None
        self._announcer.close()


def _numbers(indices: Any) -> tuple[int, ...]:
    """A batch as plain numbers; a single index, where batches are not made, is a batch of one."""
    try:
        return (operator.index(indices),)
    except TypeError:
        return tuple(map(operator.index, indices))


def _has_epoch(part: Any) -> bool:
    return hasattr(part, "set_epoch") and isinstance(getattr(part, "epoch", None), int)


def _set_epoch(sampler: Any, stride: int) -> None:
    for part in sampler_parts(sampler):
        if _has_epoch(part):
            part.set_epoch(part.epoch + stride)


def _copied(sampler: Any, memo: dict[int, Any], *, has_threads: bool) -> Any:
    kind = type(sampler)
    if kind in _CONSTANT:
        return sampler
    if kind in _TORCH:
        twin = copy.copy(sampler)
        if hasattr(twin, "sampler"):
            twin.sampler = _copied(twin.sampler, memo, has_threads=has_threads)
        if hasattr(twin, "generator"):
            twin.generator = copy.deepcopy(twin.generator, memo)
        return twin
    if has_threads:
        raise BadInputError(f"{kind.__qualname__} may draw from generators that the worker threads use")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise BadInputError(f"{kind.__qualname__} may ask other ranks while it is drawn from")
    return copy.deepcopy(sampler, memo)
