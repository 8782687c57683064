"""What guesses remember is bounded, whatever is read and whenever the store answers."""

from cache.guesses import _MAX_SIZES, Guesses
from cache.keys import BlockRef, block_key
from cache.plan import Futures

BLOCK = 100
ENOUGH = 5


def walk(guesses: Guesses, uri: str, numbers: range) -> list[bytes]:
    wanted: list[bytes] = []
    for number in numbers:
        ref = BlockRef(uri, "1", number * BLOCK, BLOCK)
        wanted += guesses.observe(block_key(ref), ref)[0]
    return wanted


def test_answers_about_objects_that_are_forgotten_meanwhile_are_not_kept() -> None:
    asked: list[str] = []
    guesses = Guesses(
        Futures(), has=lambda _: False, measure=asked.append, max_ahead_bytes=64 * BLOCK, clock=lambda: 0.0
    )
    uris = [f"s3://b/{number}" for number in range(3 * _MAX_SIZES)]
    for uri in uris:
        assert walk(guesses, uri, range(ENOUGH)) == []
    assert asked == uris
    for uri in uris:
        guesses.measured(uri, "1", 1000 * BLOCK)
    assert len(guesses._sizes) == _MAX_SIZES
    assert walk(guesses, uris[-1], range(ENOUGH, ENOUGH + 1)) != []


def test_a_walk_over_what_is_here_asks_the_store_nothing_until_a_block_is_not() -> None:
    asked: list[str] = []
    here = {block_key(BlockRef("s3://b/x", "1", number * BLOCK, BLOCK)) for number in range(20)}
    guesses = Guesses(
        Futures(), has=here.__contains__, measure=asked.append, max_ahead_bytes=64 * BLOCK, clock=lambda: 0.0
    )
    walk(guesses, "s3://b/x", range(20))
    assert asked == []
    walk(guesses, "s3://b/x", range(20, 22))
    assert asked == ["s3://b/x"]
