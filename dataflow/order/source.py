"""Sources: which samples an epoch consists of, and in which order each epoch presents them."""

from __future__ import annotations

import math
import operator
from collections.abc import Sized
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from connectors.errors import BadInputError
from dataflow.order.shuffle import BlockOrder, FullOrder, Order, SequentialOrder

__all__ = ["Shuffle", "Source"]


# A window as it is unless somebody says otherwise: so much data and so many samples, but no more blocks than that.
_WINDOW_BYTES = 64 << 20
_WINDOW_SAMPLES = 512
_WINDOW_BLOCKS = 64


class Source(Protocol):
    """Gives each epoch its order. Immutable; may be shared and pickled."""

    @property
    def num_samples(self) -> int:
        """Positions of an epoch, the same for every epoch."""
        ...

    def order(self, epoch: int) -> Order:
        """Return the order of one epoch."""
        ...

    def identity(self) -> dict[str, Any]:
        """Return as plain JSON what decides the order, for a state to be compared with."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Shuffle:
    """All samples of one dataset.

    Attributes:
        num_samples: Length of the dataset.
        first_sample: The block table (`BlockOrder`); None where the dataset has none, and "block" then means "full".
        shuffle: "block", "full" or False for the stored order.
        seed: Any integer.
        window_blocks: Blocks that "block" mixes with each other, at least 1.
    """

    num_samples: int
    first_sample: npt.NDArray[np.int64] | None
    shuffle: Literal["block", "full", False]
    seed: int
    window_blocks: int

    def __post_init__(self) -> None:
        if self.shuffle is not False and self.shuffle not in ("block", "full"):
            raise BadInputError(f'shuffle must be "block", "full" or False, got {self.shuffle!r}')
        if self.window_blocks < 1:
            raise BadInputError(f"window_blocks must be >= 1, got {self.window_blocks}")

    @classmethod
    def over(
        cls, dataset: Sized, *, shuffle: Literal["block", "full", False], seed: int, window_blocks: int | None = None
    ) -> Shuffle:
        """Take the length of a dataset, and the block table of its index where it has one.

        Args:
            dataset: Anything with a length; `dataset.index.blocks.first_sample` is the block table.
            shuffle: As the attribute.
            seed: As the attribute.
            window_blocks: As the attribute; by default as many as have 64 MiB and 512 samples, on average and as they
                are stored, up to 64.

        Raises:
            BadInputError: The table does not cover the dataset, or an argument is out of range.
        """
        index = getattr(dataset, "index", None)
        first_sample = getattr(getattr(index, "blocks", None), "first_sample", None)
        if first_sample is not None and (not len(first_sample) or first_sample[-1] != len(dataset)):
            raise BadInputError(
                f"the index of {type(dataset).__qualname__} does not cover its {len(dataset)} samples; "
                "use a dataset whose index fits"
            )
        window = _usual_window(index) if window_blocks is None else operator.index(window_blocks)
        return cls(len(dataset), first_sample, shuffle, operator.index(seed), window)

    @property
    def effective(self) -> Literal["block", "full", False]:
        """The kind of shuffle that is done: "full" where blocks were asked of a dataset that has none."""
        return "full" if self.shuffle == "block" and self.first_sample is None else self.shuffle

    def order(self, epoch: int) -> Order:
        """See `Source`."""
        if self.shuffle == "block" and self.first_sample is not None:
            return BlockOrder(self.first_sample, self.seed, epoch, self.window_blocks)
        return FullOrder(self.num_samples, self.seed, epoch) if self.shuffle else SequentialOrder(self.num_samples)

    def identity(self) -> dict[str, Any]:
        """See `Source`."""
        return {"shuffle": self.effective, "window_blocks": self.window_blocks, "seed": self.seed}


def _usual_window(index: Any) -> int:
    ranges = getattr(index, "ranges", None)
    if ranges is None or not index.num_blocks:
        return _WINDOW_BLOCKS
    size_bytes, num_samples = int(ranges.length.sum()), int(index.blocks.first_sample[-1])
    share = max(_WINDOW_BYTES / max(size_bytes, 1), _WINDOW_SAMPLES / max(num_samples, 1))
    return max(1, math.ceil(min(_WINDOW_BLOCKS, share * int(index.num_blocks))))
