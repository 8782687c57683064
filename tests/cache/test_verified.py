import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.verified import VerifiedBlocks

BLOCKS = st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 1 << 40), st.integers(1, 9))


def in_a_child(action) -> None:
    child = os.fork()
    if not child:
        try:
            action()
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_what_is_claimed_and_noted_is_known_to_parents_and_children():
    verified = VerifiedBlocks(64)
    assert verified.claim("of both")
    verified.add("parent's")
    in_a_child(lambda: verified.add(("child's", verified.claim("of both"), "parent's" in verified)))
    assert ("child's", False, True) in verified
    assert "of both" not in verified


@pytest.mark.parametrize("block", ["claimed", "claimed and noted", "noted"])
def test_a_block_is_claimed_once_and_verified_when_that_is_noted(block):
    verified = VerifiedBlocks(64)
    if "claimed" in block:
        assert verified.claim(block)
    if "noted" in block:
        verified.add(block)
    assert not verified.claim(block)
    assert (block in verified) == ("noted" in block)


@given(st.lists(st.tuples(st.sampled_from(["claim", "add"]), BLOCKS), max_size=200))
def test_nothing_is_known_that_was_not_noted_and_the_newest_always_is(steps):
    verified = VerifiedBlocks(16)
    noted, claimed = set(), set()
    for step, block in steps:
        assert block in noted or block not in verified
        if step == "claim":
            assert verified.claim(block) or block in noted | claimed
            claimed.add(block)
        else:
            verified.add(block)
            noted.add(block)
            assert block in verified
        assert not verified.claim(block)


def test_a_table_forgets_no_more_than_does_not_fit():
    verified = VerifiedBlocks(1 << 12)
    for offset in range(1 << 9):
        verified.claim(("file", offset << 20))
        verified.add(("file", offset << 20))
    assert all(("file", offset << 20) in verified for offset in range(1 << 9))
