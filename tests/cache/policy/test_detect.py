"""Streams are told apart by themselves, and the policy follows."""

import random
from collections.abc import Iterable

import pytest

from cache.keys import BlockRef, block_key
from cache.policy import Auto, Detector, DropBehind, KeptSet, Pattern, S3Fifo
from cache.policy.detect import _MAX_OBJECTS, _MAX_SAMPLED
from cache.testing import make_key

MIB = 1 << 20


def refs(numbers: Iterable[int], *, per_object: int = 64) -> list[BlockRef]:
    return [BlockRef(f"s3://b/{n // per_object}", "1", n % per_object * MIB, MIB) for n in numbers]


def seen(stream: Iterable[BlockRef]) -> Pattern:
    detector = Detector()
    for ref in stream:
        detector.observe(block_key(ref), ref)
    return detector.pattern()


def epochs(count: float, blocks: int, readers: int = 1) -> list[int]:
    rng = random.Random(3)
    order = [n for _ in range(int(count) + 1) for n in rng.sample(range(blocks), blocks)][: int(count * blocks)]
    return [n for n in order for _ in range(readers)]


def zipf(count: int, blocks: int) -> list[int]:
    weights = [1 / rank for rank in range(1, blocks + 1)]
    return random.Random(4).choices(range(blocks), weights, k=count)


def test_little_says_nothing() -> None:
    assert seen(refs(range(20))) == Pattern("unknown", "unknown")


def test_one_walk_through_objects_is_sequential() -> None:
    assert seen(refs(range(1000))) == Pattern("sequential", "once")


def test_every_eighth_block_is_strided() -> None:
    assert seen(refs(range(0, 8000, 8), per_object=10_000)) == Pattern("strided", "once")


@pytest.mark.parametrize("readers", [1, 4])
@pytest.mark.parametrize(("count", "blocks"), [(1.6, 9000), (2, 3000), (2.5, 1000), (3.3, 100), (9, 300)])
def test_every_block_once_an_epoch_is_epochs_whoever_reads(count: float, blocks: int, readers: int) -> None:
    assert seen(refs(epochs(count, blocks, readers))) == Pattern("random", "epochs")


def test_a_repeated_walk_is_sequential_epochs() -> None:
    assert seen(refs([*range(2000)] * 3)) == Pattern("sequential", "epochs")


@pytest.mark.parametrize("blocks", [300, 20_000])
def test_favourites_are_skewed(blocks: int) -> None:
    assert seen(refs(zipf(40_000, blocks))) == Pattern("random", "skewed")


def test_a_stream_that_changes_is_seen_to_change() -> None:
    assert seen(refs(zipf(20_000, 300) + epochs(60, 300))).reuse == "epochs"
    assert seen(refs(epochs(20, 300) + zipf(40_000, 300))).reuse == "skewed"


def test_memory_is_bounded() -> None:
    detector = Detector()
    for ref in refs(range(30_000), per_object=2):
        detector.observe(block_key(ref), ref)
    assert len(detector._counts) <= _MAX_SAMPLED
    assert len(detector._last) <= _MAX_OBJECTS


def test_the_policy_follows_the_pattern_and_keeps_its_blocks() -> None:
    patterns = [Pattern()]
    policy = Auto(lambda: patterns[-1], every=4)
    policy.insert(make_key(1), 5)
    policy.insert(make_key(2), 5)
    for pattern, expected in [
        (Pattern("random", "skewed"), S3Fifo),
        (Pattern("unknown", "unknown"), S3Fifo),
        (Pattern("sequential", "once"), DropBehind),
        (Pattern("sequential", "epochs"), KeptSet),
    ]:
        patterns.append(pattern)
        for _ in range(4):
            policy.touch(make_key(1))
        assert type(policy.current) is expected
    assert policy.admit(make_key(0), 10, free_bytes=0, free_blocks=0) == [make_key(2), make_key(1)]
    policy.remove(make_key(2))
    assert policy.admit(make_key(0), 10, free_bytes=0, free_blocks=0) is None
