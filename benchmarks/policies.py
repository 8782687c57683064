"""Hit ratios over epochs and for favourites: the bound, our policies, and libcachesim's; and what each writes.

    python benchmarks/policies.py [--blocks 10000] [--epochs 5]

Every block is read once an epoch in a fresh random order (then the bound is c = cache / data set), or by a Zipf law
(then it is what next_use and Belady reach). The first epoch fills the cache and does not count. Written: bytes let in
per epoch, as a share of the data set; what a disk tier writes. At the end epochs are read through an engine with a
real disk tier, with and without a plan; its own counters say what was written, and its ring adds a few hits.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
from collections.abc import Callable, Sequence

import libcachesim
import numpy as np

from cache.block_table import BlockTable
from cache.config import CacheConfig, PolicyName, TierConfig
from cache.engine import Engine
from cache.handle import Handle
from cache.policy import DropBehind, KeptSet, Lru, NextUse, Policy, S3Fifo
from cache.testing import Replay, make_key
from connectors.registry import open_store

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


def replay_theirs(name: str, trace: Sequence[int], first: int, capacity: int) -> tuple[float, float]:
    cache = getattr(libcachesim, name)(cache_size=capacity, hashpower=16)
    hits = writes = 0
    for place, (block, use) in enumerate(zip(trace, next_uses(trace), strict=True)):
        request = libcachesim.Request()
        request.obj_id, request.obj_size, request.clock_time, request.next_access_vtime = block + 1, 1, place, use
        hit = cache.get(request)
        if place >= first:
            hits += hit
            # It was let in where it is there now; looking does not count as a use.
            writes += not hit and cache.find(request, update_cache=False) is not None
    counted = len(trace) - first
    return hits / counted, writes / counted


async def replay_engine(policy: PolicyName, *, blocks: int, epochs: int, share: float, plan: bool) -> tuple:
    """Read epochs through an engine over a disk tier; hits are blocks that were not fetched."""
    size = 4000  # with its trailer, one page of the disk
    store = open_store(f"memory://policies-{policy}-{share}-{plan}")
    version = (await store.put("data", bytes(blocks * size))).version
    table = BlockTable.from_columns(
        [f"{store.url}/data"], [version], object_of=np.zeros(blocks, np.int32), offset=np.arange(blocks) * size,
        length=np.full(blocks, size), crc32c=None,
    )  # fmt: skip
    rng = random.Random(0)
    orders = [rng.sample(range(blocks), blocks) for _ in range(epochs)]
    with tempfile.TemporaryDirectory() as folder:
        tier = TierConfig("disk", int(share * blocks) * 4096, folder, medium="nvme", policy=policy)
        engine = Engine(CacheConfig((tier,), ring_bytes=16 * 4096), open_store=lambda _: store)
        await engine.start()
        await engine.scanned()
        number = engine.prefetcher.open(table.digest, table) if plan else 0
        for epoch, order in enumerate(orders):
            if epoch == 1:
                await engine.settle()
                begin = engine.stats()
            for place, block in enumerate(order):
                if plan and place % 256 == 0:
                    # This epoch and the next, as a loader announces them: ahead, and across the end.
                    engine.prefetcher.advance(number, epoch * blocks + place)
                    coming = [b for later in orders[epoch:] for b in later][place : place + 2 * blocks]
                    engine.prefetcher.replace(number)
                    engine.prefetcher.extend(number, np.array(coming, "<i4").tobytes())
                (handle,) = await engine.get_many([table.ref(block)])
                assert isinstance(handle, Handle), handle
                handle.close()
                await engine.settle()
        end = engine.stats()
        await engine.close()
    counted = blocks * (epochs - 1)
    fetched = end["origin"]["blocks"] - begin["origin"]["blocks"]
    written = end["tiers"][0]["written_bytes"] - begin["tiers"][0]["written_bytes"]
    return 1 - fetched / counted, written / (4096 * counted)


def line(name: str, cells: Sequence[tuple[float, float | None]]) -> None:
    shown = (
        f"      {hits:9.3f}  " + (f"{written:7.3f}" if written is not None else " " * 7) for hits, written in cells
    )
    print(f"{name:<22}" + "".join(shown), flush=True)


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
        if kind == "epochs":
            line("the bound", [(share, None) for share in SHARES])
        for name, policy in ours.items():
            cells = [replay_ours(policy(), trace, blocks, int(share * blocks), now) for share in SHARES]
            line(name, cells)
        for name in THEIRS:
            line(f"libcachesim {name}", [replay_theirs(name, trace, blocks, int(share * blocks)) for share in SHARES])
    few = max(200, blocks // 4)
    print(f"\nepochs, through an engine with a disk tier: {few} blocks, {epochs} epochs")
    for name, policy, plan in (("kept", "kept", False), ("kept, plan", "kept", True), ("lru", "lru", False)):
        line(name, [
            asyncio.run(replay_engine(policy, blocks=few, epochs=epochs, share=share, plan=plan)) for share in SHARES
        ])  # fmt: skip


if __name__ == "__main__":
    main()
