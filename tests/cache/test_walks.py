"""Walks are found in a stream, told apart, and never seen where there are none."""

import random

import pytest

from cache.keys import BlockRef
from cache.walks import Walk, Walks

BLOCK = 100


def ref(number: int, *, uri: str = "s3://b/o", version: str = "1") -> BlockRef:
    return BlockRef(uri, version, number * BLOCK, BLOCK)


def seen(numbers: list[int]) -> list[Walk | None]:
    walks = Walks()
    return [walks.observe(ref(number)) for number in numbers]


def test_neighbours_are_a_walk_from_the_fifth_on() -> None:
    found = seen([0, 1, 2, 3, 4, 5])
    assert found[:4] == [None] * 4
    assert found[4] is not None
    assert found[4] is found[5]
    assert found[5].kind == "sequential"


@pytest.mark.parametrize("step", [2, 8, 100])
def test_equal_steps_are_a_walk(step: int) -> None:
    found = seen([7 + step * place for place in range(6)])
    assert found[:4] == [None] * 4
    assert found[5] is not None
    assert (found[5].kind, found[5].step) == ("strided", step * BLOCK)


def test_several_readers_of_one_object_are_told_apart() -> None:
    found = seen([begin + place for place in range(6) for begin in (0, 100, 200)])
    assert len({id(walk) for walk in found if walk is not None}) == 3
    assert {walk.kind for walk in found if walk is not None} == {"sequential"}


def test_objects_do_not_mix() -> None:
    walks = Walks()
    for place in range(10):
        found = [walks.observe(ref(place, uri=f"s3://b/{name}")) for name in "ab"]
    assert None not in found
    assert found[0] is not found[1]


@pytest.mark.parametrize("blocks", [200, 10_000])
def test_random_order_is_no_walk(blocks: int) -> None:
    rng = random.Random(1)
    order = [number for _ in range(10_000 // blocks) for number in rng.sample(range(blocks), blocks)]
    assert sum(walk is not None for walk in seen(order)) <= len(order) / 1000


def test_a_new_version_is_another_object() -> None:
    walks = Walks()
    for number in range(6):
        walk = walks.observe(ref(number))
    assert walk is not None
    assert walks.observe(ref(6, version="2")) is None
    assert walks.ended == [walk]


def test_what_was_not_heard_of_for_long_is_forgotten() -> None:
    walks = Walks()
    for number in range(6):
        walks.observe(ref(number))
    for number in range(20):
        walks.observe(ref(1000 + number * number))
    assert [walk.ref for walk in walks.ended] == [ref(5)]
    for number in range(10_000):
        walks.observe(ref(0, uri=f"s3://b/{number}"))
    assert len(walks._objects) <= 256


def test_a_walk_ends_with_its_object() -> None:
    walk = Walk("sequential", ref(3), BLOCK)
    assert walk.ahead(3, 10_000) == [ref(4), ref(5), ref(6)]
    assert walk.ahead(9, 550) == [ref(4), BlockRef("s3://b/o", "1", 500, 50)]
    assert walk.ahead(9, 400) == []
    assert walk.ahead(0, 10_000) == []
    assert Walk("strided", ref(3), 2 * BLOCK).ahead(2, 10_000) == [ref(5), ref(7)]
