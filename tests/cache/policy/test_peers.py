"""Our policies against those of libcachesim, and against the bound."""

import random

import libcachesim
import pytest

from cache.policy import KeptSet, Lru, NextUse, Policy, S3Fifo
from cache.testing import Replay, make_key

BLOCKS = 1000
SHARES = [0.25, 0.5, 0.75]


def next_uses(trace: list[int]) -> list[float]:
    found, last = [0.0] * len(trace), {}
    for place in reversed(range(len(trace))):
        found[place] = last.get(trace[place], float(1 << 60))
        last[trace[place]] = place
    return found


def theirs(name: str, trace: list[int], capacity: int, first: int) -> float:
    cache = getattr(libcachesim, name)(cache_size=capacity, hashpower=12)
    hits = 0
    for place, (block, use) in enumerate(zip(trace, next_uses(trace), strict=True)):
        request = libcachesim.Request()
        request.obj_id, request.obj_size, request.clock_time = block + 1, 1, place
        request.next_access_vtime = int(use)
        hits += cache.get(request) and place >= first
    return hits / (len(trace) - first)


def ours(policy: Policy, trace: list[int], capacity: int, first: int, uses: dict[bytes, float]) -> tuple[float, int]:
    held = Replay(policy, capacity)
    hits = writes = 0
    for place, (block, use) in enumerate(zip(trace, next_uses(trace), strict=True)):
        if place == first:
            writes = held.writes
        uses[make_key(block)] = use
        hits += held.access(make_key(block)) and place >= first
    return hits / (len(trace) - first), held.writes - writes


def epoch_trace(count: int) -> list[int]:
    rng = random.Random(5)
    return [block for _ in range(count) for block in rng.sample(range(BLOCKS), BLOCKS)]


def zipf_trace(count: int) -> list[int]:
    return random.Random(6).choices(range(BLOCKS), [1 / rank for rank in range(1, BLOCKS + 1)], k=count)


@pytest.mark.parametrize("share", SHARES)
# It lets the first blocks straight into the main queue, which the paper does not; epochs keep that visible.
@pytest.mark.parametrize(
    ("trace", "tolerance"), [(epoch_trace(6), 0.05), (zipf_trace(6000), 0.02)], ids=["epochs", "zipf"]
)
def test_the_same_policy_has_the_same_hits(trace: list[int], tolerance: float, share: float) -> None:
    capacity, uses = int(share * BLOCKS), {}
    belady, _ = ours(NextUse(lambda key: uses.get(key, 0.0)), trace, capacity, BLOCKS, uses)
    assert belady == pytest.approx(theirs("Belady", trace, capacity, BLOCKS), abs=0.005)
    assert ours(Lru(), trace, capacity, BLOCKS, {})[0] == theirs("LRU", trace, capacity, BLOCKS)
    s3_fifo, _ = ours(S3Fifo(), trace, capacity, BLOCKS, {})
    assert s3_fifo == pytest.approx(theirs("S3FIFO", trace, capacity, BLOCKS), abs=tolerance)


@pytest.mark.parametrize("share", SHARES)
def test_over_epochs_the_kept_set_reaches_the_bound_without_a_write_and_nobody_else_does(share: float) -> None:
    trace, capacity = epoch_trace(6), int(share * BLOCKS)
    hits, writes = ours(KeptSet(), trace, capacity, BLOCKS, {})
    assert hits == share
    assert writes == 0
    for name in ("LRU", "S3FIFO", "WTinyLFU", "Sieve", "FIFO"):
        assert theirs(name, trace, capacity, BLOCKS) < 0.98 * share, name


def test_for_favourites_s3_fifo_beats_lru() -> None:
    trace = zipf_trace(20_000)
    assert ours(S3Fifo(), trace, 100, BLOCKS, {})[0] > 1.05 * ours(Lru(), trace, 100, BLOCKS, {})[0]
