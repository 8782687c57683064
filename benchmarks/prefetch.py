"""How long a reader waits for a distant store, with and without a plan, with and without hedging.

    python benchmarks/prefetch.py [--megabytes-per-second 50] [--reads 2048]

A real S3 server (SeaweedFS) stands behind a wrapper that makes every read take 30 ms more and every thousandth 2 s, and
that shares one link among all replies. The reader takes blocks of 256 KiB in a fresh random order each epoch, at 70 %
of the link's rate, with a few reads of its own ahead, as a loader's workers have. Nothing is cached: there is no tier,
and the ring is smaller than the data set. Stall is the share of the time that the reader waits beyond its own pace.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections.abc import Sequence

import numpy as np

from cache.block_table import BlockTable
from cache.config import CacheConfig
from cache.engine import Engine
from cache.handle import Handle
from connectors.objects import Span
from connectors.protocols import Buffer, Store
from connectors.registry import open_store
from connectors.testing.seaweed import SeaweedServer

MIB = 1 << 20
BLOCK = MIB // 4
BLOCKS = 512
LATENCY_S = 0.03
SLOW_S = 2.0
ONE_IN = 1000
OWN_READS_AHEAD = 4
UTILISATION = 0.7


class Distant:
    """A store at the far end of a link."""

    def __init__(self, store: Store, rate_bytes_s: float) -> None:
        self.url = store.url
        self._store = store
        self._rate_bytes_s = rate_bytes_s
        self._calls = 0
        self._free_s = 0.0

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    async def get_range(self, key: str, span: Span, *, version: str | None = None) -> Buffer:
        await self._travel()
        body = await self._store.get_range(key, span, version=version)
        await self._arrive(span.length)
        return body

    async def get_ranges(self, key: str, spans: Sequence[Span], *, version: str | None = None) -> list[Buffer]:
        await self._travel()
        bodies = await self._store.get_ranges(key, spans, version=version)
        await self._arrive(sum(span.length for span in spans))
        return bodies

    async def _travel(self) -> None:
        self._calls += 1
        await asyncio.sleep(SLOW_S if self._calls % ONE_IN == ONE_IN // 2 else LATENCY_S)

    async def _arrive(self, size_bytes: int) -> None:
        now_s = asyncio.get_running_loop().time()
        self._free_s = max(now_s, self._free_s) + size_bytes / self._rate_bytes_s
        await asyncio.sleep(self._free_s - now_s)


async def measure(
    options: dict, table: BlockTable, order: list[int], *, rate_bytes_s: float, plan: bool, hedge: bool
) -> str:
    """Read the whole order at the reader's pace; return a line of the table."""
    config = CacheConfig(ring_bytes=BLOCKS * BLOCK // 2, hedge=hedge)
    engine = Engine(config, open_store=lambda root: Distant(open_store(root, **options), rate_bytes_s))
    await engine.start()
    clock = asyncio.get_running_loop().time
    pace_s = BLOCK / (UTILISATION * rate_bytes_s)
    if plan:
        number = engine.prefetcher.open(table.digest, table)
        engine.prefetcher.extend(number, np.array(order, "<i4").tobytes())
    reads = [asyncio.create_task(engine.get_many([table.ref(block)])) for block in order[:OWN_READS_AHEAD]]
    await reads[0]  # the first one is the same for all
    stalled_s, begin_s = 0.0, clock()
    due_s = begin_s
    for place in range(len(order)):
        asked_s = clock()
        (handle,) = await reads[place]
        assert isinstance(handle, Handle), handle
        handle.close()
        stalled_s += clock() - asked_s
        if place + OWN_READS_AHEAD < len(order):
            block = order[place + OWN_READS_AHEAD]
            reads.append(asyncio.create_task(engine.get_many([table.ref(block)])))
        if plan and place % 64 == 63:
            engine.prefetcher.advance(number, place + 1)
        due_s = max(due_s, clock()) + pace_s
        await asyncio.sleep(due_s - clock())
    total_s = clock() - begin_s
    stats = engine.stats()
    await engine.close()
    origin, ahead = stats["origin"], stats["prefetch"]
    return (
        f"{stalled_s / total_s:7.2%} {total_s:8.1f} {origin['requests']:9} {origin['hedges_sent']:7} "
        f"{origin['hedges_won']:5} {ahead['useful']:7} {ahead['late']:5} {ahead['wasted']:7}"
    )


async def run(server: SeaweedServer, rate_bytes_s: float, num_reads: int) -> None:
    options = server.options()
    store = open_store(server.create_bucket("prefetch"), **options)
    version = (await store.put("data", random.Random(0).randbytes(BLOCKS * BLOCK))).version
    await store.close()
    table = BlockTable.from_columns(
        [f"{store.url}/data"],
        [version],
        object_of=np.zeros(BLOCKS, np.int32),
        offset=np.arange(BLOCKS) * BLOCK,
        length=np.full(BLOCKS, BLOCK),
        crc32c=None,
    )
    rng = random.Random(1)
    order = [block for _ in range(-(-num_reads // BLOCKS)) for block in rng.sample(range(BLOCKS), BLOCKS)][:num_reads]
    print(f"{'plan':<5} {'hedge':<6} {'stall':>6} {'seconds':>8} {'requests':>9} {'hedged':>7} {'won':>5} "
          f"{'useful':>7} {'late':>5} {'wasted':>7}")  # fmt: skip
    for plan, hedge in ((True, True), (True, False), (False, True), (False, False)):
        line = await measure(options, table, order, rate_bytes_s=rate_bytes_s, plan=plan, hedge=hedge)
        print(f"{'yes' if plan else 'no':<5} {'yes' if hedge else 'no':<6} {line}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes-per-second", type=float, default=50.0)
    parser.add_argument("--reads", type=int, default=2048)
    arguments = parser.parse_args()
    with SeaweedServer() as server:
        asyncio.run(run(server, arguments.megabytes_per_second * MIB, arguments.reads))


if __name__ == "__main__":
    main()
