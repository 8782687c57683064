"""What a conversion did, for its caller and for people."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Conversion", "RuleCount", "SplitResult"]


@dataclass(frozen=True, slots=True)
class RuleCount:
    """What one cleaning rule did with the samples that the rules before it had left.

    Attributes:
        rule: Its name and field.
        kept: Samples that it left as they were.
        changed: Samples that it changed.
        dropped: Samples that it dropped.
    """

    rule: str
    kept: int
    changed: int
    dropped: int


@dataclass(frozen=True, slots=True)
class SplitResult:
    """One of several datasets that a conversion wrote.

    Attributes:
        name: Of the part.
        url: Where it is.
        num_samples: Samples in it.
        num_shards: Shards in it.
        size_bytes: Bytes of the shards.
    """

    name: str
    url: str
    num_samples: int
    num_shards: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion did. `num_source` = written + filtered + dropped by rules + errors + not drawn.

    Attributes:
        url: Where the dataset is, or the folder of its parts.
        format: Its format.
        num_samples: Samples written.
        num_shards: Shards written.
        num_resumed: Shards that an earlier run had finished.
        source_bytes: Bytes of the source's blocks.
        size_bytes: Bytes of the shards.
        num_source: Samples in the source.
        num_filtered: Samples that the filter left out.
        num_not_drawn: Good samples that `sample_fraction` left out.
        num_errors: Samples left out because they could not be read, judged or mapped.
        errors: The first of those, one sentence each.
        rules: What the cleaning rules did, in their order.
        splits: The parts, where there are some.
        quarantine: Where rejected samples are; None where there is none.
        num_compared: Samples that were read again and are what was to be written; None without `verify`.
        not_compared: Fields of them that the format holds in a way that cannot be compared.
    """

    url: str
    format: str
    num_samples: int
    num_shards: int
    num_resumed: int
    source_bytes: int
    size_bytes: int
    num_source: int
    num_filtered: int = 0
    num_not_drawn: int = 0
    num_errors: int = 0
    errors: tuple[str, ...] = ()
    rules: tuple[RuleCount, ...] = ()
    splits: tuple[SplitResult, ...] = ()
    quarantine: str | None = None
    num_compared: int | None = None
    not_compared: tuple[str, ...] = ()
