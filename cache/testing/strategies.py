"""Hypothesis strategies for blocks."""

from __future__ import annotations

from hypothesis import strategies as st

from cache.block import CHUNK_BYTES
from cache.keys import KEY_BYTES

__all__ = ["block_contents", "sizes_by_key"]


def block_contents() -> st.SearchStrategy[bytes]:
    """Contents of blocks: short ones, and lengths around the border of a checksummed chunk."""
    repeated = st.builds(
        lambda pattern, length: (pattern * (length // len(pattern) + 1))[:length],
        st.binary(min_size=1, max_size=7),
        st.integers(CHUNK_BYTES - 2, 2 * CHUNK_BYTES + 2),
    )
    return st.binary(min_size=1, max_size=300) | repeated


def sizes_by_key(*, max_blocks: int, max_bytes: int) -> st.SearchStrategy[dict[bytes, int]]:
    """Distinct keys, each with a size on the medium."""
    keys = st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES)
    return st.dictionaries(keys, st.integers(1, max_bytes), min_size=1, max_size=max_blocks)
