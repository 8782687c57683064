"""A repeated order is trusted once it has proved itself, and random order never is."""

import random

import pytest

from cache.keys import BlockRef, block_key
from cache.laps import Laps

REFS = [BlockRef("s3://b/o", "1", number, 1, crc32c=0) for number in range(5000)]
KEYS = [block_key(ref) for ref in REFS]


def follow(laps: Laps, order: list[int]) -> list[bool]:
    trusted = []
    for number in order:
        laps.observe(KEYS[number], REFS[number])
        trusted.append(laps.trusted)
    return trusted


def overtaking(order: list[int], readers: int, rng: random.Random) -> list[int]:
    """The order as several readers bring it about, each a little ahead of or behind the others."""
    return [number for _, number in sorted((place + rng.random() * readers, n) for place, n in enumerate(order))]


@pytest.mark.parametrize("readers", [1, 8])
def test_the_third_epoch_of_a_repeated_order_is_foretold(readers: int) -> None:
    rng = random.Random(readers)
    order = rng.sample(range(1000), 1000)
    laps = Laps()
    assert not any(follow(laps, overtaking(order, readers, rng)))
    follow(laps, overtaking(order, readers, rng))
    foretold = 0
    for number in overtaking(order, readers, rng):
        foretold += KEYS[number] in {key for _, key, _ in laps.after(laps.front - 16, 64)}
        follow(laps, [number])
        assert laps.trusted
    assert foretold > 950


def test_what_was_read_meanwhile_is_not_foretold() -> None:
    laps = Laps()
    follow(laps, [*range(100), *range(50), 52, 51])
    assert [REFS.index(ref) for _, _, ref in laps.after(laps.front, 4)] == [53, 54, 55, 56]
    assert laps.after(laps.front, 0) == []


@pytest.mark.parametrize("blocks", [5, 20, 64, 1000, 5000])
def test_random_order_is_not_trusted(blocks: int) -> None:
    rng = random.Random(blocks)
    laps = Laps()
    order = [number for _ in range(max(4, 10_000 // blocks)) for number in rng.sample(range(blocks), blocks)]
    assert not any(follow(laps, order))


def test_favourites_are_not_trusted() -> None:
    order = random.Random(4).choices(range(1000), [1 / rank for rank in range(1, 1001)], k=10_000)
    assert not any(follow(Laps(), order))


def test_an_order_that_changes_loses_its_trust_and_can_earn_it_again() -> None:
    rng = random.Random(3)
    first, second = rng.sample(range(1000), 1000), rng.sample(range(1000), 1000)
    laps = Laps()
    assert follow(laps, first * 2)[-1]
    assert not follow(laps, second)[-1]
    assert follow(laps, second)[-1]


def test_memory_is_bounded_and_larger_data_sets_are_not_followed() -> None:
    laps = Laps(max_blocks=300)
    assert follow(laps, [*range(200)] * 2)[-1]
    assert not follow(laps, [*range(1000)] * 3)[-1]
    assert len(laps._reads) == 300
    assert len(laps._place) <= 300


def test_a_block_that_is_read_again_is_held_once_and_its_names_too() -> None:
    laps = Laps(max_blocks=300)
    for number in [*range(50)] * 10:
        # As they arrive with each request.
        uri, version = "".join(["s3://b/", "o"]), "".join(["1", "2"])
        laps.observe(bytes(bytearray(KEYS[number])), BlockRef(uri, version, number, 1, crc32c=0))
    assert len(laps._reads) == 300
    assert len({id(key) for key, _ in laps._reads}) == 50
    assert len({id(ref) for _, ref in laps._reads}) == 50
    assert len({id(ref.uri) for _, ref in laps._reads} | {id(ref.version) for _, ref in laps._reads}) == 2
