"""Small datasets, one behaviour each."""

from __future__ import annotations

import random
import threading
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

__all__ = [
    "Counter",
    "Draws",
    "Failing",
    "Hanging",
    "HangsOnce",
    "Noisy",
    "Numbers",
    "Point",
    "Records",
    "Stream",
    "WholeBatches",
    "WorkerReport",
]


_T_co = TypeVar("_T_co", covariant=True)


class Point(NamedTuple):
    """A sample or batch with named parts."""

    x: Any
    y: Any


class Numbers(Dataset[torch.Tensor]):
    """Sample i is `width` times i, so a batch says which samples are in it and any stray byte shows.

    Args:
        length: Number of samples.
        width: int64 values per sample; 512 and more make a sample large enough for a slot of its own.
    """

    def __init__(self, length: int, width: int = 1) -> None:
        self.length = length
        self.width = width

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return torch.full((self.width,), index)


class WholeBatches(Numbers):
    """Numbers that are fetched by the batch; the last column counts the samples that were asked for together."""

    def __getitems__(self, indices: Sequence[int]) -> list[torch.Tensor]:
        """Return samples with the size of their batch appended."""
        return [torch.cat([self[index], torch.tensor([len(indices)])]) for index in indices]


class Records(Dataset[dict[str, Any]]):
    """Samples of everything that torch's default collate knows."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "tensor": torch.arange(600, dtype=torch.float32) + index,
            "array": np.full((3, 400), index, np.int16),
            "scalar": np.float32(index / 2),
            "bool": torch.tensor(index % 2 == 0),
            "half": torch.full((4000,), index, dtype=torch.bfloat16),
            "int": index,
            "float": index / 4,
            "text": f"sample {index}",
            "bytes": bytes([index % 256]) * 9000,
            "nested": [(torch.tensor([index]), {"deep": index}), Point(index, torch.full((2, 2), index))],
        }


class Draws(Dataset[tuple[int, float, int, float]]):
    """Each sample is drawn from the global generators of random, numpy and torch, and says in which worker."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[int, float, int, float]:
        info = get_worker_info()
        drawn = (random.random(), int(np.random.randint(1 << 30)), torch.rand(()).item())
        return (-1 if info is None else info.id, *drawn)


class Noisy(Numbers):
    """Numbers whose order of work differs from worker to worker: some samples take longer."""

    def __getitem__(self, index: int) -> torch.Tensor:
        for _ in range(index % 7 * 3000):
            pass
        return super().__getitem__(index)


class Failing(Numbers):
    """Numbers of which some raise.

    Args:
        length: Number of samples.
        errors: The exception to raise, by sample.
    """

    def __init__(self, length: int, errors: dict[int, BaseException]) -> None:
        super().__init__(length)
        self.errors = errors

    def __getitem__(self, index: int) -> torch.Tensor:
        if index in self.errors:
            raise self.errors[index]
        return super().__getitem__(index)


class Hanging(Numbers):
    """Numbers of which one does not come for so many seconds; for ever if None."""

    def __init__(self, length: int, at: int, seconds: float | None = None) -> None:
        super().__init__(length)
        self.at = at
        self.seconds = seconds

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == self.at:
            threading.Event().wait(self.seconds)
        return super().__getitem__(index)


class HangsOnce(Dataset[_T_co]):
    """Another dataset of which some samples never come, the first time that they are asked for.

    Args:
        inner: The dataset.
        at: The samples.
        folder: An empty folder, where each that was asked for leaves a file.
    """

    def __init__(self, inner: Dataset[_T_co], at: Collection[int], folder: Path) -> None:
        self.inner = inner
        self.at = frozenset(at)
        self.folder = folder

    def __len__(self) -> int:
        return len(self.inner)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> _T_co:
        sample = self.inner[index]
        if index in self.at and not (mark := self.folder / str(index)).exists():
            mark.touch()
            threading.Event().wait()
        return sample


class WorkerReport(Dataset[dict[str, Any]]):
    """What a worker knows about itself."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.tag = 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        info = get_worker_info()
        if info is None:
            return {"id": -1, "num_threads": torch.get_num_threads()}
        return {
            "id": info.id,
            "num_workers": info.num_workers,
            "seed": info.seed,
            "torch_seed": torch.initial_seed(),
            "own_dataset": info.dataset is self,
            "tag": self.tag,
            "num_threads": torch.get_num_threads(),
        }


class Stream(IterableDataset[torch.Tensor]):
    """Numbers as a stream, dealt out to the workers one by one.

    Args:
        length: Number of samples over all workers.
        width: As for `Numbers`.
    """

    def __init__(self, length: int, width: int = 1) -> None:
        self.length = length
        self.width = width

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        for index in range(first, self.length, step):
            yield torch.full((self.width,), index)


class Counter(IterableDataset[torch.Tensor]):
    """A stream that can say where it is, and does not like to be read twice: the next pass begins where one is left.

    Args:
        length: Number of samples of each worker; those of worker i count from 1,000 i + 1.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.position = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        while self.position < self.length:
            self.position += 1
            yield torch.tensor([worker * 1000 + self.position])
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        """Return how many samples were read."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind so many samples."""
        self.position = state["position"]
