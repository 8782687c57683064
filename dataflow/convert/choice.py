"""Which samples a conversion writes, and in which order. Pure.

    samples of the source -> kept ones, numbered anew -> order (stored or shuffled) -> those of this part

Every step is a function of the numbers and the seed, so any run of positions is found alone and nothing is kept per
sample but one bit where samples were left out. What belongs to a part is decided by a permutation of the kept samples
of its own: parts of one seed never overlap, have exactly the sizes asked for, and do not depend on the order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from connectors.errors import BadInputError
from dataflow.order import BlockOrder, FullOrder, Order, Permutation, Selection, SequentialOrder

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from dataflow.index import Index

__all__ = ["SHUFFLES", "Choice", "check_choice", "choose"]

SHUFFLES = ("full", "block")
# Blocks that `block` mixes with each other: as many as a job holds without trouble.
WINDOW_BLOCKS = 64
# Shares that are rounded to two digits, such as three of .33, still are the whole.
_ROUNDING = 0.02
# Numbers that are looked at together: about 100 MB while they are.
AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """The samples of one dataset to be written.

    Attributes:
        name: Of the part; empty where there is one only.
        order: Over all kept samples.
        shuffled: Whether `order` is another than that of the source.
        kept: The kept samples; None for all.
        low: Of all kept samples, ranked by the seed, this part has those from `low` on ...
        high: ... to before `high`.
        seed: Of the ranks.
    """

    name: str
    order: Order
    shuffled: bool
    kept: Selection | None
    low: int
    high: int
    seed: int

    def __len__(self) -> int:
        """The number of samples."""
        return self.high - self.low

    @property
    def share(self) -> float:
        """The part of all kept samples that this is."""
        return len(self) / max(1, len(self.order))

    @property
    def prefix(self) -> str:
        """What names of objects begin with."""
        return f"{self.name}/" if self.name else ""

    def samples(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Return the chosen samples among positions `[first, last)` of the order, as numbers of the source."""
        parts = [self._samples(start, min(last, start + AT_ONCE)) for start in range(first, last, AT_ONCE)]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def bounds(self, count: int) -> list[int]:
        """Return positions of the order, from 0 to its end, with `count` chosen samples between each two but the last.

        Looks at every position where samples are drawn.
        """
        total = len(self.order)
        if len(self) == total:
            return [*range(0, total, count), total] if total else []
        ends, seen = [np.zeros(1, np.int64)], 0
        for start in range(0, total, AT_ONCE):
            chosen = start + np.flatnonzero(self._is_drawn(self.order.take(start, min(total, start + AT_ONCE))))
            # The position after every sample whose number among the chosen ones is a multiple of `count`.
            ends.append(chosen[count - 1 - seen % count :: count] + 1)
            seen += len(chosen)
        inner = np.concatenate(ends)[: -(-seen // count)]
        return [*inner.tolist(), total] if seen else []

    def _samples(self, first: int, last: int) -> npt.NDArray[np.int64]:
        numbers = self.order.take(first, last)
        if len(self) < len(self.order):
            numbers = numbers[self._is_drawn(numbers)]
        return numbers if self.kept is None else self.kept.numbers(numbers)

    def _is_drawn(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return which of some kept samples belong to this part."""
        ranks = Permutation(self.seed, 0, "convert").apply(numbers, len(self.order))
        return (self.low <= ranks) & (ranks < self.high)


def choose(
    index: Index,
    kept: Selection | None,
    *,
    sample_fraction: float,
    split: Mapping[str, float],
    shuffle: str | None,
    seed: int,
) -> list[Choice]:
    """Return what each dataset gets: one, or one for every name of `split`.

    Args:
        index: Of the source.
        kept: Samples that were not left out; None for all.
        sample_fraction: The part of the kept samples that is written at all, in (0, 1].
        split: Names and weights; sizes are exact to the sample, the rounding falls to the later ones.
        shuffle: One of `SHUFFLES`, or None for the order of the source.
        seed: Any integer.
    """
    first_sample = index.blocks.first_sample
    if kept is not None:
        first_sample = kept.count_before(first_sample)
    count = int(first_sample[-1])
    order: Order = SequentialOrder(count)
    if shuffle == "full":
        order = FullOrder(count, seed, 0)
    elif shuffle == "block":
        order = BlockOrder(first_sample, seed, 0, WINDOW_BLOCKS)
    total = math.floor(count * sample_fraction + 0.5)
    weights = list(split.values()) or [1.0]
    shares = [math.fsum(weights[: place + 1]) / math.fsum(weights) for place in range(len(weights))]
    ends = [math.floor(total * share + 0.5) for share in shares]
    return [
        Choice(name, order, shuffle is not None, kept, low, high, seed)
        for name, low, high in zip(split or [""], [0, *ends], ends, strict=False)
    ]


def check_choice(*, sample_fraction: float, split: Mapping[str, float], shuffle: str | None) -> None:
    """Refuse what cannot be chosen.

    Raises:
        BadInputError: Names the argument and the value found.
    """
    if not 0 < sample_fraction <= 1:
        raise BadInputError(f"sample_fraction must be above 0 and at most 1, got {sample_fraction}")
    if shuffle is not None and shuffle not in SHUFFLES:
        raise BadInputError(f"shuffle must be one of {', '.join(SHUFFLES)}, got {shuffle!r}")
    for name, weight in split.items():
        if not name or not name.replace("-", "").replace("_", "").isalnum():
            raise BadInputError(f"a part's name consists of letters, digits, - and _, got {name!r}")
        if not 0 < weight < math.inf:
            raise BadInputError(f"the weight of part {name!r} must be above 0, got {weight}")
    if split and (total := sum(split.values())) < 1 - _ROUNDING:
        raise BadInputError(
            f"the parts of the split are {total:.3g} in all, but every sample goes to one of them: name another "
            f"part for the rest ({1 - total:.3g}), or write fewer samples by sample_fraction"
        )
