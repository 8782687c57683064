"""Cleaning rules, one small class each. Pure: what a rule does follows from a column and facts measured before.

A missing value is the business of `Missing` alone; the other rules let it pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from connectors.errors import BadInputError
from dataflow.convert.expression import compare, constant, length
from dataflow.formats.fields import field_kind
from dataflow.media import decodes, insist_on_decoder

__all__ = [
    "RULES",
    "Control",
    "Duplicates",
    "Empty",
    "Facts",
    "Iqr",
    "Length",
    "Missing",
    "Range",
    "Rule",
    "Undecodable",
    "Verdict",
    "Zscore",
]

# Of one numeric field: mean, standard deviation, and the quartiles.
Facts: TypeAlias = dict[str, float]

_BINARY = (pa.types.is_binary, pa.types.is_large_binary)
_TEXT = (pa.types.is_string, pa.types.is_large_string)
# What no text needs: C0 and C1 controls and DEL, but for tab, line feed and carriage return.
_CONTROLS = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x{80}-\x{9f}]"


class Verdict(NamedTuple):
    """What a rule says of a batch.

    Attributes:
        drop: Samples to leave out, bool.
        change: Samples that have another value now, bool.
        column: The values after the change; None where the rule changes nothing.
    """

    drop: npt.NDArray[np.bool_]
    change: npt.NDArray[np.bool_]
    column: pa.Array | None = None


class Rule(Protocol):
    """One rule over one field."""

    name: ClassVar[str]

    @property
    def field(self) -> str:
        """The field that it looks at."""
        ...

    @property
    def measures(self) -> bool:
        """Whether `judge` needs facts."""
        ...

    @property
    def changes(self) -> bool:
        """Whether it changes values rather than drop samples."""
        ...

    def check(self, entry: pa.Field) -> None:
        """Insist that the rule makes sense for the field.

        Raises:
            BadInputError: It does not.
        """
        ...

    def judge(self, column: pa.Array, facts: Facts) -> Verdict:
        """Look at the values of a batch."""
        ...


@dataclass(frozen=True, slots=True)
class Missing:
    """Nulls and NaN: dropped, or filled with a value, the mean or the median."""

    field: str
    fill: Any = None
    name: ClassVar[str] = "missing"

    @property
    def measures(self) -> bool:
        """Whether the fill is measured."""
        return self.fill in ("mean", "median")

    @property
    def changes(self) -> bool:
        """Whether values are filled in."""
        return self.fill is not None

    def check(self, entry: pa.Field) -> None:
        """See `Rule`."""
        if self.measures:
            _insist_on_number(self, entry)
        elif self.fill is not None:
            try:
                fits = pa.scalar(self.fill, entry.type).as_py() == self.fill or not pa.types.is_integer(entry.type)
            except (pa.ArrowException, TypeError, ValueError, OverflowError):
                fits = False
            if not fits:
                raise BadInputError(
                    f"rule missing cannot fill field {entry.name!r}, which is {entry.type}, with {self.fill!r}"
                )

    def judge(self, column: pa.Array, facts: Facts) -> Verdict:
        """See `Rule`."""
        missing = pc.is_null(column, nan_is_null=pa.types.is_floating(column.type))
        mask = _mask(missing)
        if self.fill is None:
            return _drop(mask)
        value = facts[self.fill] if self.measures else self.fill
        if self.measures and pa.types.is_integer(column.type):
            value = round(value)
        filled = pc.if_else(missing, pa.scalar(value, column.type), column)
        return Verdict(np.zeros_like(mask), mask, filled)


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers below `min` or above `max` are dropped."""

    field: str
    min: float | None = None
    max: float | None = None
    name: ClassVar[str] = "range"
    measures: ClassVar[bool] = False
    changes: ClassVar[bool] = False

    def check(self, entry: pa.Field) -> None:
        """See `Rule`."""
        _insist_on_number(self, entry)
        _insist_on_bounds(self, self.min, self.max)

    def judge(self, column: pa.Array, facts: Facts) -> Verdict:
        """See `Rule`."""
        return _drop(_outside(column, self.min, self.max))


@dataclass(frozen=True, slots=True)
class Zscore:
    """Numbers farther than `limit` standard deviations from the mean are dropped."""

    field: str
    limit: float = 3.0
    name: ClassVar[str] = "zscore"
    measures: ClassVar[bool] = True
    changes: ClassVar[bool] = False

    def check(self, entry: pa.Field) -> None:
        """See `Rule`."""
        _insist_on_number(self, entry)
        if not self.limit > 0:
            raise BadInputError(f"rule zscore needs a limit above 0, got {self.limit}")

    def judge(self, column: pa.Array, facts: Facts) -> Verdict:
        """See `Rule`."""
        width = self.limit * facts["deviation"]
        return _drop(_outside(pc.cast(column, pa.float64(), safe=False), facts["mean"] - width, facts["mean"] + width))


@dataclass(frozen=True, slots=True)
class Iqr:
    """Numbers farther than `factor` interquartile ranges outside the quartiles are dropped (Tukey's fences)."""

    field: str
    factor: float = 1.5
    name: ClassVar[str] = "iqr"
    measures: ClassVar[bool] = True
    changes: ClassVar[bool] = False

    def check(self, entry: pa.Field) -> None:
        """See `Rule`."""
        _insist_on_number(self, entry)
        if not self.factor >= 0:
            raise BadInputError(f"rule iqr needs a factor of at least 0, got {self.factor}")

    def judge(self, column: pa.Array, facts: Facts) -> Verdict:
        """See `Rule`."""
        width = self.factor * (facts["upper"] - facts["lower"])
        return _drop(
            _outside(pc.cast(column, pa.float64(), safe=False), facts["lower"] - width, facts["upper"] + width)
        )


@dataclass(frozen=True, slots=True)
class Length:
    """Texts (in characters), binaries (in bytes) and lists that are too short or too long are dropped."""

    field: str
    min: float | None = None
    max: float | None = None
    name: ClassVar[str] = "length"
    measures: ClassVar[bool] = False
    changes: ClassVar[bool] = False

    def check(self, entry: pa.Field) -> None:
        """See `Rule`."""
        _insist_on_bounds(self, self.min, self.max)
        try:
            length(pa.array([], entry.type))
        except TypeError as error:
            raise BadInputError(f"rule length does not fit field {entry.name!r}: {error}") from error

    def judge(self, column: pa.Array, facts: Facts) -> Verdict:
        """See `Rule`."""
        return _drop(_outside(length(column), self.min, self.max))


@dataclass(frozen=True, slots=True)
class Empty:
    """Texts without any character but white space are dropped."""

    field: str
    name: ClassVar[str] = "empty"
    measures: ClassVar[bool] = False
    changes: ClassVar[bool] = False

    def check(self, entry: pa.Field) -> None:
        """See `Rule`."""
        _insist_on_text(self, entry)

    def judge(self, column: pa.Array, facts: Facts) -> Verdict:
        """See `Rule`."""
        return _drop(_mask(pc.equal(pc.utf8_trim_whitespace(column), "")))


@dataclass(frozen=True, slots=True)
class Control:
    """Texts with control characters (but tabs and line breaks) are dropped, or rid of them."""

    field: str
    action: str = "drop"
    name: ClassVar[str] = "control"
    measures: ClassVar[bool] = False

    @property
    def changes(self) -> bool:
        """Whether texts are changed."""
        return self.action == "strip"

    def check(self, entry: pa.Field) -> None:
        """See `Rule`."""
        _insist_on_text(self, entry)
        if self.action not in ("drop", "strip"):
            raise BadInputError(f"rule control has the actions drop and strip, got {self.action!r}")

    def judge(self, column: pa.Array, facts: Facts) -> Verdict:
        """See `Rule`."""
        found = _mask(pc.match_substring_regex(column, _CONTROLS))
        if self.action == "drop":
            return _drop(found)
        return Verdict(np.zeros_like(found), found, pc.replace_substring_regex(column, _CONTROLS, ""))


@dataclass(frozen=True, slots=True)
class Undecodable:
    """Images, sound and video that cannot be decoded to the end are dropped; the last two need the extra `media`.

    What the files are is said by `kind`, or by the field where `fit` has asked it.
    """

    field: str
    kind: str | None = None
    name: ClassVar[str] = "undecodable"
    measures: ClassVar[bool] = False
    changes: ClassVar[bool] = False

    def check(self, entry: pa.Field) -> None:
        """See `Rule`."""
        kind = self.fit(entry).kind
        if kind is None or not any(fits(entry.type) for fits in _BINARY):
            raise BadInputError(
                f"rule undecodable needs a field of media, {entry.name!r} is {entry.type}; where it has the bytes of "
                "such files, say kind=image, kind=audio or kind=video"
            )
        insist_on_decoder(kind)

    def fit(self, entry: pa.Field) -> Undecodable:
        """Return the rule with its kind."""
        return self if self.kind else replace(self, kind=field_kind(entry))

    def judge(self, column: pa.Array, facts: Facts) -> Verdict:
        """See `Rule`."""
        kind = self.kind or "image"
        return _drop(
            np.array([value.is_valid and not decodes(kind, memoryview(value.as_buffer())) for value in column], bool)
        )


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Samples equal to one before them are dropped: in all fields, or in those named; the first one stays."""

    fields: tuple[str, ...] = ()
    name: ClassVar[str] = "duplicates"


RULES = {rule.name: rule for rule in (Control, Duplicates, Empty, Iqr, Length, Missing, Range, Undecodable, Zscore)}


def _drop(mask: npt.NDArray[np.bool_]) -> Verdict:
    return Verdict(mask, np.zeros_like(mask))


def _mask(values: Any) -> npt.NDArray[np.bool_]:
    mask: npt.NDArray[np.bool_] = pc.fill_null(values, False).to_numpy(zero_copy_only=False)
    return mask


def _outside(column: pa.Array, low: float | None, high: float | None) -> npt.NDArray[np.bool_]:
    mask = np.zeros(len(column), np.bool_)
    if low is not None:
        mask |= _mask(compare("less", column, constant(low)))
    if high is not None:
        mask |= _mask(compare("greater", column, constant(high)))
    return mask


def _insist_on_number(rule: Any, entry: pa.Field) -> None:
    if not (pa.types.is_integer(entry.type) or pa.types.is_floating(entry.type)):
        raise BadInputError(f"rule {rule.name} needs a field of numbers, {entry.name!r} is {entry.type}")


def _insist_on_text(rule: Any, entry: pa.Field) -> None:
    if not any(fits(entry.type) for fits in _TEXT):
        raise BadInputError(f"rule {rule.name} needs a field of text, {entry.name!r} is {entry.type}")


def _insist_on_bounds(rule: Any, low: float | None, high: float | None) -> None:
    if (low is None and high is None) or (low is not None and high is not None and low > high):
        raise BadInputError(f"rule {rule.name} needs min, max or both, in this order, got min={low}, max={high}")
    if any(isinstance(bound, int) and not -(1 << 63) <= bound < 1 << 64 for bound in (low, high)):
        raise BadInputError(f"rule {rule.name} needs bounds of at most 64 bits, got min={low}, max={high}")
