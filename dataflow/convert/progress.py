"""How far a conversion is."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Progress"]


@dataclass(frozen=True, slots=True)
class Progress:
    """What is done, of how much; counts shards that an earlier run had finished.

    Attributes:
        shards: Shards in place.
        num_shards: Shards in all.
        samples: Samples in them.
        num_samples: Samples in all.
        source_bytes: About as many bytes of the source are in them.
        num_source_bytes: Bytes of the source in all.
    """

    shards: int
    num_shards: int
    samples: int
    num_samples: int
    source_bytes: int
    num_source_bytes: int
