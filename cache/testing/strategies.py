"""Hypothesis strategies for blocks."""

from __future__ import annotations

from hypothesis import strategies as st

from cache.block import CHUNK_BYTES

__all__ = ["block_contents"]


def block_contents() -> st.SearchStrategy[bytes]:
    """Contents of blocks: short ones, and lengths around the border of a checksummed chunk."""
    repeated = st.builds(
        lambda pattern, length: (pattern * (length // len(pattern) + 1))[:length],
        st.binary(min_size=1, max_size=7),
        st.integers(CHUNK_BYTES - 2, 2 * CHUNK_BYTES + 2),
    )
    return st.binary(min_size=1, max_size=300) | repeated
