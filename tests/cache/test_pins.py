"""Pins are refused where they cannot be kept together, end in time, and the newest set wins."""

import pytest

from cache.pins import MAX_PINS, Pin, Pins, PinSet
from connectors.errors import BadInputError, NotFoundError


def add(pins: Pins, prefix: str, size_bytes: int = 10, expires_s: float | None = None, now_s: float = 0) -> None:
    pins.add(Pin(prefix, size_bytes, expires_s, 0), limit_bytes=100, now_s=now_s)


def test_a_pin_is_for_all_at_and_below_its_url() -> None:
    pins = Pins()
    assert not pins.cover("s3://b/set/x")
    add(pins, "s3://b/set")
    add(pins, "file:///data")
    covered = ["s3://b/set", "s3://b/set/x", "s3://b/set/x/y", "file:///data/a"]
    others = ["s3://b/sets", "s3://b", "s3://b/other/set", "file:///dat", "memory://x/set"]
    assert [uri for uri in covered + others if pins.cover(uri)] == covered


@pytest.mark.parametrize("root", ["file:///", "s3://b"])
def test_a_whole_store_can_be_pinned(root: str) -> None:
    pins = Pins()
    add(pins, root)
    assert pins.cover(f"{root.rstrip('/')}/a/b")
    pins.remove(root)
    assert len(pins) == 0


def test_what_cannot_be_kept_together_is_refused_with_the_numbers() -> None:
    pins = Pins()
    add(pins, "s3://b/x", 60)
    with pytest.raises(BadInputError, match=r"has 50 bytes .* may take 100 bytes, 60 are promised to 1 other"):
        add(pins, "s3://b/y", 50)
    add(pins, "s3://b/x", 90)  # anew, not beside
    with pytest.raises(BadInputError, match="ended already"):
        add(pins, "s3://b/y", 1, expires_s=5, now_s=5)


def test_there_are_only_so_many() -> None:
    pins = Pins()
    for number in range(MAX_PINS):
        add(pins, f"s3://b/{number}", 0)
    with pytest.raises(BadInputError, match="already"):
        add(pins, "s3://b/more", 0)


def test_a_pin_ends_in_time_and_makes_room() -> None:
    pins = Pins()
    add(pins, "s3://b/x", 100, expires_s=10)
    assert not pins.expire(9.9)
    add(pins, "s3://b/y", 100, now_s=10)
    assert [pin.prefix for pin in pins.current.pins] == ["s3://b/y"]


def test_only_a_pin_that_is_there_can_be_taken_back() -> None:
    pins = Pins()
    add(pins, "s3://b/x")
    with pytest.raises(NotFoundError, match="not pinned"):
        pins.remove("s3://b/x/y")
    pins.remove("s3://b/x/")
    assert pins.stats() == []


def test_of_several_sets_the_newest_is_taken() -> None:
    pins = Pins()
    newer, older = PinSet(5, (Pin("s3://b/x", 1, None, 0), Pin("s3://b/old", 1, 3, 0))), PinSet(4)
    assert pins.restore(newer, now_s=7)
    for known in (older, newer, PinSet(pins.current.generation)):
        assert not pins.restore(known, now_s=7)
    assert [pin["prefix"] for pin in pins.stats()] == ["s3://b/x"]
