"""What a loader does about samples that cannot be read: leave them out, or read others in their place.

What happens to a batch is a function of the samples in it alone, so all ranks, workers and restarts see the same. No
step is ever lost: a rank that leaves a sample out has a shorter batch, not fewer batches than the others.

    worker   batch fails -> each sample alone, to find the bad ones -> the batch without them, or with others
    trainer  batch is handed out -> its bad samples are noted, once each, and held against the budget
"""

from __future__ import annotations

import json
import logging
import operator
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import xxhash

from connectors.errors import BadInputError, CorruptError, DataError

__all__ = ["BadSample", "BadSamples", "Rejects", "Sieve"]

_log = logging.getLogger(__name__)

# Tries to find a good sample in the place of a bad one, before the dataset is taken to be bad as a whole.
_MAX_TRIES = 8


@dataclass(frozen=True, slots=True)
class BadSamples:
    """A policy for samples whose reading, decoding or transforming raises an exception.

    A sample is not bad because of its store or machine: any `DataError` except `CorruptError`, and `MemoryError`, are
    raised as usual. Nor is it bad if it raises nothing when it is read alone, as where the collate function failed.

    Attributes:
        action: "skip" leaves bad samples out of their batch, which gets shorter; a batch of bad samples only is an
            error. "substitute" reads another sample instead of each, always the same one.
        budget: How many different samples may be bad on this rank, over all epochs and resumes. One more is an error.
        quarantine: A folder, made if need be, where each bad sample leaves a file `<number>.json` that says why. Ranks
            may share it.

    Raises:
        BadInputError: An attribute is out of range.
    """

    action: Literal["skip", "substitute"]
    budget: int = 100
    quarantine: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.action not in ("skip", "substitute"):
            raise BadInputError(f'action must be "skip" or "substitute", got {self.action!r}')
        if type(self.budget) is not int or self.budget < 0:
            raise BadInputError(f"budget must be a whole number of samples >= 0, got {self.budget!r}")


class BadSample(NamedTuple):
    """A sample that was found to be bad. Travels by pickle.

    Attributes:
        sample: What the sampler says: its number; as text, if that is no number.
        error: What went wrong, and the notes of the exception.
    """

    sample: int | str
    error: str


class Sieve:
    """Makes batches without their bad samples.

    Args:
        policy: What to do.
        make: Makes a batch of what the sampler says.
        probe: Reads one sample.
        num_samples: Length of the dataset, to choose substitutes from.

    Attributes:
        found: The bad samples of the batches made since somebody took them.
    """

    def __init__(
        self, policy: BadSamples, *, make: Callable[[Any], Any], probe: Callable[[Any], Any], num_samples: int
    ) -> None:
        self._policy = policy
        self._make = make
        self._probe = probe
        self._num_samples = num_samples
        self.found: list[BadSample] = []

    def make_batch(self, items: Sequence[Any]) -> Any:
        """Return the batch of some samples.

        Raises:
            Exception: No sample is to blame, none is good, or what stands for the batch does not say which they are.
        """
        try:
            return self._make(items)
        except Exception as error:
            if not _blames_sample(error) or not isinstance(items, Iterable):
                raise
            kept = [other for item in items for other in self._sift(item)]
            if not kept or kept == list(items):
                raise
        return self._make(kept)

    def make_sample(self, item: Any) -> Any:
        """Return one sample that is no part of a batch, or its substitute."""
        try:
            return self._make(item)
        except Exception as error:
            if not _blames_sample(error) or not (kept := self._sift(item)) or kept == [item]:
                raise
        return self._make(kept[0])

    def take_found(self) -> list[BadSample]:
        """Return the bad samples since the last call."""
        found, self.found = self.found, []
        return found

    def _sift(self, item: Any) -> list[Any]:
        """Return a sample if it is good; else what takes its place."""
        error = self._fault_of(item)
        if error is None:
            return [item]
        sample = _name(item)
        notes = getattr(error, "__notes__", ())
        self.found.append(BadSample(sample, "; ".join([f"{type(error).__name__}: {error}", *notes])))
        if self._policy.action == "skip":
            return []
        if isinstance(sample, str):
            raise BadInputError(
                f'{sample} is no sample number, so nothing can take its place: use BadSamples("skip")'
            ) from error
        for number in range(_MAX_TRIES):
            other = xxhash.xxh3_64_intdigest(f"{sample}:{number}".encode()) % self._num_samples
            if self._fault_of(other) is None:
                return [other]
        raise error

    def _fault_of(self, item: Any) -> Exception | None:
        try:
            self._probe(item)
        except Exception as error:
            if not _blames_sample(error):
                raise
            return error
        return None


class Rejects:
    """The bad samples of a loader so far. Used by the thread that iterates.

    Args:
        policy: What the loader does about them.

    Attributes:
        samples: All of them, once each.
    """

    def __init__(self, policy: BadSamples) -> None:
        self._policy = policy
        self.samples: set[int | str] = set()

    def add(self, found: Iterable[BadSample]) -> int:
        """Note the bad samples of a batch; return how many are new.

        Raises:
            CorruptError: They are more than the budget allows.
            OSError: The quarantine cannot be written.
        """
        new = {bad.sample: bad for bad in found if bad.sample not in self.samples}
        for bad in new.values():
            _log.warning("sample %s is bad (%s): %s", bad.sample, self._policy.action, bad.error)
            self.samples.add(bad.sample)
            if self._policy.quarantine is not None:
                _quarantine(bad, Path(self._policy.quarantine))
        if new and len(self.samples) > self._policy.budget:
            raise CorruptError(
                f"{len(self.samples)} samples are bad and the budget is {self._policy.budget}: sample "
                f"{bad.sample} is the last one ({bad.error}); mend the dataset or raise the budget"
            )
        return len(new)


def _quarantine(bad: BadSample, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = str(bad.sample) if isinstance(bad.sample, int) else xxhash.xxh3_64_hexdigest(bad.sample.encode())
    # Ranks may find the same sample; whole files replace each other, and say the same.
    partial = folder / f".{name}.{os.getpid()}"
    partial.write_text(json.dumps({"sample": bad.sample, "error": bad.error}))
    partial.replace(folder / f"{name}.json")


def _name(item: Any) -> int | str:
    try:
        return operator.index(item)
    except TypeError:
        return str(item)


def _blames_sample(error: Exception) -> bool:
    return isinstance(error, CorruptError) or not isinstance(error, (DataError, MemoryError, StopIteration))
