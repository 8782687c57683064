"""How far a conversion is."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Progress"]


@dataclass(frozen=True, slots=True)
class Progress:
    """What is done of the stage at hand, of how much; counts what an earlier run had finished.

    Attributes:
        stage: `measure` or `clean`, where filter or rules ask for it, then `write`.
        shards: Shards in place, or parts of the source looked at.
        num_shards: How many there are in all.
        samples: Samples in them.
        num_samples: Samples in all.
        source_bytes: About as many bytes of the source are in them.
        num_source_bytes: Bytes of the source in all.
    """

    stage: str
    shards: int
    num_shards: int
    samples: int
    num_samples: int
    source_bytes: int
    num_source_bytes: int
