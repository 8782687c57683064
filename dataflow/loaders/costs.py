"""What each sample costs to decode, measured where it is decoded and kept in a file.

    workers -> file of the node -> `agreed` -> the same numbers on every rank -> BalancedParts, `dataflow plan`

Costs are whole microseconds of processor time: foreign load does not count, and sums of them are exact, so ranks on
unlike processors come to the same parts. Workers write single numbers into a mapping of the file; two that write the
same one at once leave either. A process that is killed loses nothing that it measured, and a file is never seen half
made, since it gets its name when it is whole.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed

from connectors.errors import BadInputError

__all__ = ["MeasuredCosts", "TimedDataset"]


class MeasuredCosts:
    """One cost per sample, in a `.npy` file that the processes of a node share and that outlives them.

    May be inherited by a fork and pickled.

    Args:
        path: The file, on a local file system; made if it is not there.
        num_samples: Length of the dataset.

    Attributes:
        microseconds: uint32 per sample, 0 where nothing was measured yet; a mapping of the file.

    Raises:
        BadInputError: The file is not one of costs, or has another number of samples.
    """

    def __init__(self, path: str | os.PathLike[str], num_samples: int) -> None:
        self.path = Path(path)
        if not self.path.exists():
            _make(self.path, num_samples)
        try:
            self.microseconds = np.lib.format.open_memmap(self.path, mode="r+")
        except ValueError as error:
            raise BadInputError(f"{self.path} holds no measured costs: {error}; remove it or name another") from error
        if self.microseconds.shape != (num_samples,) or self.microseconds.dtype != np.uint32:
            raise BadInputError(
                f"{self.path} holds {self.microseconds.dtype} of shape {self.microseconds.shape}, not the costs of "
                f"{num_samples} samples; remove it or name another"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return MeasuredCosts, (self.path, len(self.microseconds))

    @property
    def num_measured(self) -> int:
        """How many samples were measured."""
        return int(np.count_nonzero(self.microseconds))

    def agreed(self, *, device: str | torch.device = "cpu") -> npt.NDArray[np.int64]:
        """Return the costs that all ranks know together, the same on every rank, for `BalancedParts`.

        A collective where torch.distributed is initialised: every rank calls it, such as between two epochs. Where
        nodes differ the least counts; what nobody measured is taken for the median of the others.

        Args:
            device: Where the backend wants tensors: "cpu" for gloo, the accelerator for others.
        """
        unknown = np.iinfo(np.int64).max
        costs = np.where(self.microseconds == 0, unknown, self.microseconds.astype(np.int64))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            shared = torch.from_numpy(costs).to(device)
            torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MIN)
            costs = shared.cpu().numpy()
        known = costs[costs != unknown]
        median = np.partition(known, len(known) // 2)[len(known) // 2] if len(known) else 1
        return np.where(costs == unknown, median, costs)


def _make(path: Path, num_samples: int) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-") as file:
        np.lib.format.open_memmap(file.name, mode="w+", dtype=np.uint32, shape=(num_samples,))
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.link(file.name, path)


class _MapStyle(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> Any: ...


class TimedDataset:
    """A dataset that notes what each sample costs when it is read for the first time.

    It reads samples that were not measured yet one by one, all others as the dataset does. So the first epoch is a
    little slower, and once all are measured you can use the dataset itself. It has all attributes of the dataset except
    `get_batch`.

    Args:
        dataset: Map-style; what its `__getitem__` computes is the cost, waiting left out.
        costs: Where to note it.
        clock_ns: What costs are differences of: nanoseconds of this thread on a processor.
    """

    def __init__(
        self, dataset: _MapStyle, costs: MeasuredCosts, *, clock_ns: Callable[[], int] = time.thread_time_ns
    ) -> None:
        if len(dataset) != len(costs.microseconds):
            raise BadInputError(
                f"the costs are of {len(costs.microseconds)} samples and the dataset has {len(dataset)}"
            )
        self._dataset = dataset
        self._costs = costs
        self._clock_ns = clock_ns

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "get_batch":
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __getitem__(self, number: int) -> Any:
        """Return one sample."""
        if self._costs.microseconds[number]:
            return self._dataset[number]
        began_ns = self._clock_ns()
        sample = self._dataset[number]
        spent_us = (self._clock_ns() - began_ns) // 1000
        self._costs.microseconds[number] = min(max(spent_us, 1), np.iinfo(np.uint32).max)
        return sample

    def __getitems__(self, numbers: Sequence[int]) -> list[Any]:
        """Return many samples, in the order asked."""
        wanted = np.asarray(numbers, dtype=np.int64)
        is_known = self._costs.microseconds[wanted] > 0
        if not is_known.all() or not hasattr(self._dataset, "__getitems__"):
            return [self[number] for number in wanted.tolist()]
        return list(self._dataset.__getitems__(numbers))
