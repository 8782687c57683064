import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.errors import BadInputError
from dataflow.order.split import part_bounds, split_batch


@given(length=st.integers(0, 500), world_size=st.integers(1, 70))
def test_parts_are_disjoint_complete_and_near_equal(length: int, world_size: int) -> None:
    samples = np.arange(length)
    parts = [split_batch(samples, rank, world_size) for rank in range(world_size)]
    assert np.array_equal(np.concatenate(parts), samples)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_huge_lengths_do_not_overflow() -> None:
    assert part_bounds(2**62, 1023, 1024) == (2**62 - 2**52, 2**62)


@pytest.mark.parametrize(("rank", "world_size"), [(4, 4), (-1, 4), (0, 0)])
def test_a_rank_outside_the_world_is_refused(rank: int, world_size: int) -> None:
    with pytest.raises(BadInputError, match=f"rank {rank} of world size {world_size}"):
        part_bounds(8, rank, world_size)
