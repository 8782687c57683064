"""Packs of documents as a dataset: what `PackedBatches` plans, laid out in rows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from dataflow.dataset.batch import Batch, Sample
from dataflow.order import lay_out_pack

__all__ = ["PackedDataset"]


class _Documents(Protocol):
    def __getitems__(self, numbers: Sequence[int]) -> Sequence[Sample]: ...


class PackedDataset:
    """Maps a pack, a list of sample numbers, to one row of tokens.

    Give it to a `DataLoader` together with a `ScheduleSampler` over `PackedBatches`. It has no length, since the
    sampler decides which packs there are. A sample has three int or token arrays of `capacity` entries, so any collate
    stacks them: `tokens`, `position_ids` (the place in the document) and `document_ids` (-1 after the last document;
    attention must not cross from one number to another).

    Args:
        dataset: Documents, fetched by `__getitems__`, all of a batch's packs in one call.
        field: The one-dimensional field that holds a document's tokens.
        capacity: Tokens in a row; as in `PackedBatches`.
        filling: Token that fills the row after the last document.
    """

    def __init__(self, dataset: _Documents, field: str, *, capacity: int, filling: int) -> None:
        self._dataset = dataset
        self._field = field
        self._capacity = capacity
        self._filling = filling

    def __getitem__(self, pack: Sequence[int]) -> Sample:
        """Return one pack.

        Raises:
            BadInputError: Its documents are longer than the capacity: the lengths given to the batching were wrong.
        """
        return self.__getitems__([pack])[0]

    def __getitems__(self, packs: Sequence[Sequence[int]]) -> Batch:
        """Return many packs at once, as columns."""
        documents = iter(self._dataset.__getitems__([number for pack in packs for number in pack]))
        rows = [
            lay_out_pack(
                [np.asarray(next(documents)[self._field]) for _ in pack], capacity=self._capacity, filling=self._filling
            )
            for pack in packs
        ]
        columns: dict[str, Any] = {
            name: np.stack([getattr(row, name) for row in rows]) if rows else []
            for name in ("tokens", "position_ids", "document_ids")
        }
        return Batch(columns, len(rows))
