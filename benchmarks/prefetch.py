"""How long a reader waits for a distant store: with and without plan and hedging; and what each of our parts gives.

    python benchmarks/prefetch.py [--rounds 3] [--megabytes-per-second 50] [--draw docs/explanation]

A real S3 server (SeaweedFS) stands behind a wrapper that makes every read take 30 ms more and every thousandth 2 s, and
that shares one link among all replies. The reader takes 256 KiB a step in a fresh random order each epoch, with a few
steps of its own ahead, as a loader's workers have. Stall is the share of the time that it waits beyond its own pace.

The slow tail: the reader takes 70 % of what the link gives. Nothing is cached, and the ring is smaller than the data.
Ablation: it takes 130 %, and a cache holds half of the data; the first epoch, which fills it, does not count. Then each
part is left out: sharding (each sample of 16 KiB is an object of its own), caching (no tier), prefetching (no plan).

Rounds of all runs alternate; shown are the median and the extremes of the stall. `--draw` (needs the extra `bench`)
writes `prefetch-stall.svg`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache.block_table import BlockTable
from cache.config import CacheConfig, TierConfig
from cache.engine import Engine
from cache.handle import Handle
from connectors.objects import Span
from connectors.protocols import Buffer, Store
from connectors.registry import open_store
from connectors.testing.seaweed import SeaweedServer

MIB = 1 << 20
STEP = MIB // 4
STEPS = 512  # in an epoch
SAMPLES = 16  # in a step
LATENCY_S = 0.03
SLOW_S = 2.0
ONE_IN = 1000
OWN_STEPS_AHEAD = 4
TAIL_EPOCHS = 4
ABLATION_EPOCHS = 3
TAIL_PACE = 0.7
ABLATION_PACE = 1.3
CACHED = 0.5
# The ring, as a share of the data: while it holds blocks ahead, it caches none, but afterwards a few.
TAIL_RING = 0.5
ABLATION_RING = 1 / 8
PUTS_AT_ONCE = 32
WIDTHS = (8, 6, 9, 7, 5, 7, 6, 7, 12)


@dataclass(frozen=True)
class Run:
    """One way to read; the parts that it has."""

    title: str
    pace: float
    epochs: int
    uncounted_epochs: int = 0
    plan: bool = True
    hedge: bool = True
    cache: bool = False
    shards: bool = True
    ring: float = TAIL_RING


TAIL = [
    Run("plan, hedging", TAIL_PACE, TAIL_EPOCHS),
    Run("plan, no hedging", TAIL_PACE, TAIL_EPOCHS, hedge=False),
    Run("no plan, hedging", TAIL_PACE, TAIL_EPOCHS, plan=False),
    Run("neither", TAIL_PACE, TAIL_EPOCHS, plan=False, hedge=False),
]
ABLATION = [
    Run(title, ABLATION_PACE, ABLATION_EPOCHS, 1, ring=ABLATION_RING, **parts)
    for title, parts in (
        ("all three", {"cache": True}),
        ("no prefetching", {"cache": True, "plan": False}),
        ("no caching", {}),
        ("no sharding", {"cache": True, "shards": False}),
        ("none", {"plan": False, "shards": False}),
    )
]


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


@dataclass(frozen=True)
class Data:
    """The same bytes, in shards of blocks and as one object a sample; and each as the blocks of a step."""

    options: dict
    tables: dict[bool, BlockTable]

    def steps(self, *, shards: bool, epochs: int) -> list[list[int]]:
        """The blocks of each step, in a fresh random order each epoch."""
        rng, per_step = random.Random(1), 1 if shards else SAMPLES
        order = [n for _ in range(epochs) for n in rng.sample(range(STEPS * per_step), STEPS * per_step)]
        return [order[begin : begin + per_step] for begin in range(0, len(order), per_step)]


async def store_data(server: SeaweedServer) -> Data:
    options = server.options()
    store = open_store(server.create_bucket("prefetch"), **options)
    body = random.Random(0).randbytes(STEPS * STEP)
    version = (await store.put("shard", body)).version
    sample, count = STEP // SAMPLES, STEPS * SAMPLES
    versions: list[str] = []
    for begin in range(0, count, PUTS_AT_ONCE):
        numbers = range(begin, begin + PUTS_AT_ONCE)
        puts = [store.put(f"samples/{n:06}", body[n * sample : (n + 1) * sample]) for n in numbers]
        versions += [meta.version for meta in await asyncio.gather(*puts)]
    await store.close()
    in_shards = BlockTable.from_columns(
        [f"{store.url}/shard"],
        [version],
        object_of=np.zeros(STEPS, np.int32),
        offset=np.arange(STEPS) * STEP,
        length=np.full(STEPS, STEP),
        crc32c=None,
    )
    alone = BlockTable.from_columns(
        [f"{store.url}/samples/{n:06}" for n in range(count)],
        versions,
        object_of=np.arange(count),
        offset=np.zeros(count, np.int64),
        length=np.full(count, sample),
        crc32c=None,
    )
    return Data(options, {True: in_shards, False: alone})


async def measure(run: Run, data: Data, rate_bytes_s: float) -> tuple[float, str]:
    """Read all steps at the reader's pace; return the stall, and what else there is to say."""
    table, steps = data.tables[run.shards], data.steps(shards=run.shards, epochs=run.epochs)
    length = table.ref(0).length
    tier = TierConfig("ram", int(CACHED * len(table)) * (length // 4096 + 1) * 4096)
    config = CacheConfig((tier,) if run.cache else (), ring_bytes=int(run.ring * STEPS * STEP), hedge=run.hedge)
    engine = Engine(config, open_store=lambda root: Distant(open_store(root, **data.options), rate_bytes_s))
    await engine.start()
    clock = asyncio.get_running_loop().time
    pace_s = STEP / (run.pace * rate_bytes_s)
    if run.plan:
        number = engine.prefetcher.open(table.digest, table)
        engine.prefetcher.extend(number, np.array([b for step in steps for b in step], "<i4").tobytes())

    def read(step: list[int]) -> asyncio.Task:
        return asyncio.create_task(engine.get_many([table.ref(block) for block in step]))

    reads = [read(step) for step in steps[:OWN_STEPS_AHEAD]]
    await reads[0]  # the first one is the same for all
    stalled_s, begin_s, passed = 0.0, clock(), 0
    due_s = begin_s
    for place, step in enumerate(steps):
        if place == run.uncounted_epochs * STEPS:
            stalled_s, begin_s = 0.0, clock()
        asked_s = clock()
        for handle in await reads[place]:
            assert isinstance(handle, Handle), handle
            handle.close()
        waited_s = clock() - asked_s
        stalled_s += waited_s
        if place + OWN_STEPS_AHEAD < len(steps):
            reads.append(read(steps[place + OWN_STEPS_AHEAD]))
        passed += len(step)
        if run.plan and place % 64 == 63:
            engine.prefetcher.advance(number, passed)
        # A pause that came out too long makes the next one shorter.
        due_s += waited_s + pace_s
        await asyncio.sleep(max(0.0, due_s - clock()))
    total_s = clock() - begin_s
    stats = engine.stats()
    await engine.close()
    origin, ahead = stats["origin"], stats["prefetch"]
    pace = (len(steps) - run.uncounted_epochs * STEPS) * STEP / (total_s - stalled_s) / rate_bytes_s
    cells = [f"{total_s:.1f}", f"{pace:.0%}", *(origin[name] for name in ("requests", "hedges_sent", "hedges_won"))]
    cells += [*(ahead[name] for name in ("useful", "late", "wasted")), f"{ahead['window_bytes'] / MIB:.1f}"]
    return stalled_s / total_s, " ".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))


async def measure_all(server: SeaweedServer, rate_bytes_s: float, rounds: int) -> dict[Run, list[float]]:
    data = await store_data(server)
    stalls: dict[Run, list[float]] = {run: [] for run in (*TAIL, *ABLATION)}
    names = ("seconds", "pace", "requests", "hedged", "won", "useful", "late", "wasted", "window, MiB")
    titles = " ".join(f"{name:>{width}}" for name, width in zip(names, WIDTHS, strict=True))
    print(f"{'':<18} {'stall':>7} {titles}   load {os.getloadavg()[0]:.1f}")
    for _ in range(rounds):
        for run, found in stalls.items():
            stall, rest = await measure(run, data, rate_bytes_s)
            found.append(stall)
            print(f"{run.title:<18} {stall:7.2%} {rest}", flush=True)
    print(f"\n{'':<18} {'median':>8} {'least':>8} {'most':>8}   load {os.getloadavg()[0]:.1f}")
    for run, found in stalls.items():
        print(f"{run.title:<18} {statistics.median(found):8.2%} {min(found):8.2%} {max(found):8.2%}")
    return stalls


def draw(stalls: dict[Run, list[float]], folder: Path) -> None:
    """Write both comparisons as one figure."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "prefetch"  # else every run names its shapes anew
    mpl.rcParams["svg.fonttype"] = "none"
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    titles = (f"at {TAIL_PACE:.0%} of the link, nothing cached", f"at {ABLATION_PACE:.0%} of the link, half cached")
    for axes, runs, title in zip(figure.subplots(1, 2), (TAIL, ABLATION), titles, strict=True):
        medians = [100 * statistics.median(stalls[run]) for run in runs]
        spread = [
            [median - 100 * min(stalls[run]) for run, median in zip(runs, medians, strict=True)],
            [100 * max(stalls[run]) - median for run, median in zip(runs, medians, strict=True)],
        ]
        bars = axes.barh([run.title for run in runs], medians, xerr=spread, color=["C2", *["C0"] * (len(runs) - 1)])
        axes.bar_label(bars, [f"{median:.1f} %" for median in medians], padding=8)
        axes.invert_yaxis()
        axes.set(title=title, xlabel="% of the time spent waiting", xlim=(0, 120))
    figure.savefig(folder / "prefetch-stall.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes-per-second", type=float, default=50.0)
    parser.add_argument("--draw", type=Path, help="a folder for the figure")
    arguments = parser.parse_args()
    with SeaweedServer() as server:
        stalls = asyncio.run(measure_all(server, arguments.megabytes_per_second * MIB, arguments.rounds))
    if arguments.draw:
        draw(stalls, arguments.draw)


if __name__ == "__main__":
    main()
