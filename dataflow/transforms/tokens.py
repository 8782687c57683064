"""The token road: windows of documents, and casts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from connectors.errors import BadInputError
from dataflow.dataset.columns import Allocate
from dataflow.transforms.columns import Columns
from dataflow.transforms.draws import Draws

__all__ = ["Cast", "TokenWindow", "fitting", "numbers_of"]


@dataclass(frozen=True, slots=True)
class Cast:
    """Changes the type of a field's numbers, such as stored uint16 tokens to the int64 that embeddings take.

    Attributes:
        field: Which one.
        dtype: Name of a numpy type.

    Raises:
        BadInputError: There is no such type.
    """

    field: str
    dtype: str

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Return the sample with the field cast.

        Raises:
            BadInputError: A number does not fit the type, or the field holds no numbers.
        """
        values = numbers_of(self.field, sample.get(self.field))
        return {**sample, self.field: fitting(self.field, values, np.dtype(self.dtype)).astype(self.dtype)}

    def transform_columns(self, columns: Columns, draws: Draws, allocate: Allocate) -> Columns:
        """Do the same for a batch; a column that has the type already is left as it is."""
        column, dtype = columns.get(self.field), np.dtype(self.dtype)
        if isinstance(column, np.ndarray):
            if column.dtype == dtype and dtype.kind in "biuf":
                return columns
            out = allocate(self.field, column.shape, dtype)
            np.copyto(out, fitting(self.field, column, dtype), casting="unsafe")
            return {**columns, self.field: out}
        values = [numbers_of(self.field, value) for value in ([None] if column is None else column)]
        return {**columns, self.field: [fitting(self.field, value, dtype).astype(dtype) for value in values]}


@dataclass(frozen=True, slots=True)
class TokenWindow:
    """Cuts a window of fixed length out of a document, so that documents of any length make batches.

    Attributes:
        length: Tokens in the window.
        field: The field, of one dimension, that holds a document's tokens.
        start: "random" (every window inside the document is equally likely) or "first".
        filling: Token that fills up shorter documents; None refuses them.
        dtype: Type of the result; that of the document by default.

    Raises:
        BadInputError: A value is out of range.
    """

    length: int
    field: str = "tokens"
    start: Literal["random", "first"] = "random"
    filling: int | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.length < 1:
            raise BadInputError(f"length must be at least 1 token, got {self.length}")
        if self.start not in ("random", "first"):
            raise BadInputError(f'start must be "random" or "first", got {self.start!r}')
        if self.dtype is not None:
            _check_dtype(self.dtype)

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Return the sample with the window in place of the document.

        Raises:
            BadInputError: The document is too short and there is no filling, or a token does not fit the type.
        """
        document = numbers_of(self.field, sample.get(self.field))
        out = np.empty(self.length, self.dtype or document.dtype)
        self._cut(document, rng, out)
        return {**sample, self.field: out}

    def transform_columns(self, columns: Columns, draws: Draws, allocate: Allocate) -> Columns:
        """Do the same for a batch; the windows become one array."""
        column = columns.get(self.field)
        documents = [numbers_of(self.field, value) for value in (column if column is not None else [None])]
        stored = np.result_type(*{document.dtype for document in documents}) if documents else np.dtype(np.int64)
        out = allocate(self.field, (len(documents), self.length), np.dtype(self.dtype or stored))
        for place, document in enumerate(documents):
            # A generator is only made where there is something to choose.
            choice = self.start == "random" and len(document) > self.length
            try:
                self._cut(document, draws[place] if choice else None, out[place])
            except BadInputError as error:
                raise BadInputError(f"{draws.name_of(place)}: {error}") from error
        return {**columns, self.field: out}

    def _cut(self, document: npt.NDArray[Any], rng: np.random.Generator | None, out: npt.NDArray[Any]) -> None:
        if document.ndim != 1:
            raise BadInputError(f"field {self.field!r} has {document.ndim} dimensions; a document has one")
        spare = len(document) - self.length
        if spare < 0 and self.filling is None:
            raise BadInputError(
                f"field {self.field!r} has {len(document)} tokens, fewer than the window of {self.length}: give a "
                "filling, or leave short documents out"
            )
        first = int(rng.integers(spare + 1)) if rng is not None and spare > 0 and self.start == "random" else 0
        window = document[first : first + self.length]
        out[: len(window)] = fitting(self.field, window, out.dtype)
        if spare < 0:
            out[len(window) :] = fitting(self.field, np.array([self.filling]), out.dtype)


def _check_dtype(name: str) -> None:
    try:
        np.dtype(name)
    except TypeError:
        raise BadInputError(f"there is no type {name!r}; use a name of numpy's, such as int64") from None


def numbers_of(field: str, value: Any) -> npt.NDArray[Any]:
    """Return a field's value as an array; `BadInputError` where it holds no numbers."""
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise BadInputError(f"field {field!r} must hold numbers, got {type(value).__name__}")
    return array


def fitting(field: str, values: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Return the values if the type can hold them: a token that wraps round is another token."""
    if values.dtype.kind not in "biuf":
        raise BadInputError(f"field {field!r} must hold numbers, got {values.dtype}")
    if np.can_cast(values.dtype, dtype, "safe") or not values.size:
        return values
    if dtype.kind == "f" and values.dtype.kind in "iuf":
        return values  # less precise, never another number
    limits = np.iinfo(dtype) if dtype.kind in "iu" and values.dtype.kind in "iu" else None
    if limits is None or values.min() < limits.min or values.max() > limits.max:
        raise BadInputError(
            f"field {field!r} of {values.dtype}, from {values.min()} to {values.max()}, does not fit {dtype}"
        )
    return values
