"""What guesses remember is bounded, whatever is read and whenever the store answers."""

from cache.guesses import _MAX_AHEAD, _MAX_SIZES, _PEACE_READS, Guesses
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
        guesses.missed()
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


def test_guesses_rest_where_a_lap_missed_nothing_and_go_on_with_the_next_miss() -> None:
    futures = Futures()
    guesses = Guesses(
        futures, has=lambda _: True, measure=lambda _: None, max_ahead_bytes=64 * BLOCK, clock=lambda: 0.0
    )
    refs = [BlockRef(f"s3://b/{number}", "1", 0, BLOCK) for number in range(256)]
    blocks = [(block_key(ref), ref) for ref in refs]
    laps_in_peace = _PEACE_READS // len(blocks)
    for _ in range(laps_in_peace):
        for key, ref in blocks:
            guesses.observe(key, ref)
    assert futures
    assert guesses.observe(*blocks[0]) != ([], [])
    wanted, unwanted = guesses.observe(*blocks[1])
    assert not wanted
    assert unwanted
    assert not futures
    for block in blocks[2:]:
        assert guesses.observe(*block) == ([], [])
    guesses.missed()
    assert {key for block in blocks for key in guesses.observe(*block)[0]} == {key for key, _ in blocks}


def test_a_lap_of_many_blocks_is_no_peace_before_its_end() -> None:
    futures = Futures()
    guesses = Guesses(
        futures, has=lambda _: True, measure=lambda _: None, max_ahead_bytes=64 * BLOCK, clock=lambda: 0.0
    )
    blocks = [
        (block_key(ref), ref) for ref in (BlockRef(f"s3://b/{n}", "1", 0, BLOCK) for n in range(2 * _PEACE_READS))
    ]
    for block in blocks:
        guesses.observe(*block)
    guesses.missed()
    for block in blocks[: _PEACE_READS + 100]:
        guesses.observe(*block)
    assert futures


def test_a_block_that_a_lap_skips_is_given_up_once_its_reader_is_well_past() -> None:
    guesses = Guesses(Futures(), has=lambda _: True, measure=lambda _: None, max_ahead_bytes=1 << 30, clock=lambda: 0.0)
    refs = [BlockRef(f"s3://b/{number}", "1", 0, BLOCK) for number in range(4 * _MAX_AHEAD)]
    lap = [(block_key(ref), ref) for ref in refs]
    for block in (*lap, *lap[:_MAX_AHEAD]):
        guesses.observe(*block)
    skipped, _ = lap[_MAX_AHEAD]
    for block in lap[_MAX_AHEAD + 1 : 2 * _MAX_AHEAD + 1]:
        assert skipped not in guesses.observe(*block)[1], "another reader may still come to it"
    assert skipped in guesses.observe(*lap[2 * _MAX_AHEAD + 1])[1]
