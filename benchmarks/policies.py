"""Hit ratios over epochs and for favourites: our policies, the bound, and libcachesim's; and what each writes.

    python benchmarks/policies.py [--blocks 10000] [--epochs 5]

Every block is read once an epoch in a fresh random order (then the bound is c = cache / data set), or by a Zipf law.
The first epoch fills the cache and does not count. Written: blocks let in per epoch, as a share of the data set; what a
disk tier writes.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence

import libcachesim

from cache.policy import DropBehind, KeptSet, Lru, NextUse, Policy, S3Fifo
from cache.testing import Replay, make_key

SHARES = (0.25, 0.5, 0.75)
THEIRS = ("LRU", "FIFO", "S3FIFO", "WTinyLFU", "Sieve", "Belady")


def next_uses(trace: Sequence[int]) -> list[int]:
    """When each access's block comes next; far away where it does not."""
    uses, last = [0] * len(trace), {}
    for place in reversed(range(len(trace))):
        uses[place] = last.get(trace[place], 1 << 60)
        last[trace[place]] = place
    return uses


def replay_ours(policy: Policy, trace: Sequence[int], first: int, capacity: int, now: dict[bytes, float]) -> tuple:
    held = Replay(policy, capacity)
    hits = writes = 0
    for place, (block, use) in enumerate(zip(trace, next_uses(trace), strict=True)):
        if place == first:
            hits, writes = held.hits, held.writes
        now[make_key(block)] = use
        held.access(make_key(block))
    counted = len(trace) - first
    return (held.hits - hits) / counted, (held.writes - writes) / counted


def replay_theirs(name: str, trace: Sequence[int], first: int, capacity: int) -> float:
    cache = getattr(libcachesim, name)(cache_size=capacity, hashpower=16)
    hits = 0
    for place, (block, use) in enumerate(zip(trace, next_uses(trace), strict=True)):
        request = libcachesim.Request()
        request.obj_id, request.obj_size, request.clock_time, request.next_access_vtime = block + 1, 1, place, use
        hits += cache.get(request) and place >= first
    return hits / (len(trace) - first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()
    blocks, epochs = arguments.blocks, arguments.epochs
    rng = random.Random(0)
    traces = {
        "epochs": [block for _ in range(epochs) for block in rng.sample(range(blocks), blocks)],
        "zipf": rng.choices(range(blocks), [1 / rank for rank in range(1, blocks + 1)], k=blocks * epochs),
    }
    now: dict[bytes, float] = {}
    ours: dict[str, Callable[[], Policy]] = {
        "kept": KeptSet,
        "next_use": lambda: NextUse(lambda key: now.get(key, 0.0)),
        "s3fifo": S3Fifo,
        "drop_behind": DropBehind,
        "lru": Lru,
    }
    for kind, trace in traces.items():
        print(f"\n{kind}: {blocks} blocks, {epochs} epochs, the first does not count")
        print(f"{'policy':<22}" + "".join(f"  c={share:.2f} hits  written" for share in SHARES))
        for name, policy in ours.items():
            cells = [replay_ours(policy(), trace, blocks, int(share * blocks), now) for share in SHARES]
            print(f"{name:<22}" + "".join(f"      {hits:9.3f}  {written:7.3f}" for hits, written in cells))
        for name in THEIRS:
            found = [replay_theirs(name, trace, blocks, int(share * blocks)) for share in SHARES]
            print(f"{'libcachesim ' + name:<22}" + "".join(f"      {hits:9.3f}         " for hits in found))


if __name__ == "__main__":
    main()
