"""What order costs per sample at 10^5 to 10^9 samples, how well it shuffles, and what buckets, packs and parts gain.

    python benchmarks/order.py [--lengths 10000000]

Needs numpy only and reads no data. Times depend on the machine; shares and ratios do not.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from dataflow.order import (
    BalancedParts,
    BlockOrder,
    BucketBatches,
    Epoch,
    EqualParts,
    FixedBatches,
    FullOrder,
    GlobalBatch,
    LocalParts,
    Order,
    PackedBatches,
    Place,
    Schedule,
    Shuffle,
    divide,
)

BLOCK_SAMPLES = 1000
CHUNK = 65_536
CAPACITY = 2048


def seconds(work: Callable[[], object]) -> float:
    """Return the best of three."""
    times = []
    for _ in range(3):
        began_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - began_s)
    return min(times)


def table(title: str, *rows: tuple[object, ...]) -> None:
    """Print rows of cells under a title; the first row is the head."""
    print(f"\n{title}\n")
    for place, row in enumerate(rows):
        print("| " + " | ".join(f"{cell:,.4g}" if isinstance(cell, float) else f"{cell}" for cell in row) + " |")
        if place == 0:
            print("|" + "---|" * len(row))


def cost_of(n: int) -> tuple[float, ...]:
    """Return ns a sample in full and block order, and ms to begin an epoch and to resume in its middle."""
    middle = n // 2
    count = min(CHUNK, n - middle)
    first_sample = np.arange(0, n + 1, BLOCK_SAMPLES)
    full, block = FullOrder(n, 0, 0), BlockOrder(first_sample, 0, 0, 64)
    schedule = Schedule(Shuffle(n, first_sample, "block", 0, 64), FixedBatches(1000, "short"))
    step = n // 2000
    return (
        seconds(lambda: full.take(middle, middle + count)) / count * 1e9,
        seconds(lambda: block.take(middle, middle + count)) / count * 1e9,
        seconds(lambda: BlockOrder(first_sample, 0, 0, 64)) * 1e3,
        seconds(lambda: schedule.epoch(0).check(Place(step, step * 1000))) * 1e3,
    )


def cost() -> None:
    """Cost of an order is flat in the number of samples."""
    table(
        f"Cost, blocks of {BLOCK_SAMPLES} samples",
        ("samples", "full, ns a sample", "block, ns a sample", "begin an epoch, ms", "resume in its middle, ms"),
        *((f"10^{power}", *cost_of(10**power)) for power in range(5, 10)),
    )


def quality() -> None:
    """How far block order is from a permutation of all samples."""
    n = 1_000_000
    first_sample = np.arange(0, n + 1, BLOCK_SAMPLES)
    orders: list[tuple[str, Order]] = [
        (f"window of {window}", BlockOrder(first_sample, 0, 0, window)) for window in (1, 4, 16, 64, 256, 1000)
    ]
    rows = []
    for name, order in [*orders, ("full", FullOrder(n, 0, 0))]:
        samples = order.take(0, n)
        block = samples // BLOCK_SAMPLES
        positions = np.argsort(samples).reshape(-1, BLOCK_SAMPLES)
        batches = block[: n // 256 * 256].reshape(-1, 256)
        rows.append(
            (
                name,
                float((block[1:] == block[:-1]).mean() * n / BLOCK_SAMPLES),
                float(positions.std(axis=1).mean() / (n / 12**0.5)),
                float(np.mean([len(np.unique(batch)) for batch in batches[::40]])),
            )
        )
    table(
        f"Shuffle quality, {n:,} samples in {n // BLOCK_SAMPLES:,} blocks, batches of 256",
        ("order", "neighbours of one block, x chance", "spread of a block over the epoch", "blocks in a batch"),
        *rows,
    )


def lengths_of(count: int) -> np.ndarray:
    """Return token counts as text has them: log-normal, cut at the capacity."""
    return np.clip(np.random.default_rng(0).lognormal(6, 1, count).astype(np.int64), 1, CAPACITY)


def batches(count: int) -> None:
    """Tokens that are not padding, and the time to plan."""
    lengths = lengths_of(count)
    source = Shuffle(count, None, "full", 0, 1)

    def useful(batching: FixedBatches | BucketBatches | PackedBatches) -> tuple[float, float]:
        began_s = time.perf_counter()
        used = computed = 0
        for batch in Epoch(source, batching, 0).batches():
            own = lengths[batch.samples()]
            used += int(own.sum())
            is_packed = isinstance(batching, PackedBatches)
            computed += batch.num_units * (CAPACITY if is_packed else int(own.max()))
        return used / computed, (time.perf_counter() - began_s) / count * 1e6

    rows: list[tuple[object, ...]] = [("fixed, 256 samples", *useful(FixedBatches(256, "short")))]
    for window in (8192, 65_536):
        bucketed = BucketBatches(lengths, 256 * 595, 8, None, None, window, 0)
        rows.append((f"buckets, window of {window:,}", *useful(bucketed)))
        rows.append((f"packs, window of {window:,}", *useful(PackedBatches(lengths, CAPACITY, 64, window, 0))))
    table(
        f"{count:,} log-normal lengths, mean {lengths.mean():.0f}, cut at {CAPACITY}",
        ("batches", "share of tokens that are not padding", "planning and summing, us a sample"),
        *rows,
    )


def parts() -> None:
    """Balance and locality inside global batches."""
    n = 262_144
    lengths = lengths_of(n)
    order = FullOrder(n, 0, 0)
    rows: list[tuple[object, ...]] = []
    for ranks, per_rank in ((8, 256), (64, 64), (256, 32), (1024, 8)):
        home = np.random.default_rng(1).integers(0, ranks, n)
        local = LocalParts(lambda samples, home=home: home[samples], tuple(range(ranks)))
        figures = []
        for start in range(0, n, ranks * per_rank)[:32]:
            batch = GlobalBatch(order, np.arange(start, start + ranks * per_rank), None, 0)
            samples = batch.samples()
            row = []
            for division in (EqualParts(), BalancedParts(lengths)):
                dealt = divide(division, batch, ranks)
                load = np.add.reduceat(lengths[samples[dealt.units]], dealt.starts[:-1])
                row.append(load.max() / load.mean())
            dealt = divide(local, batch, ranks)
            figures.append([*row, (np.repeat(np.arange(ranks), per_rank) == home[samples[dealt.units]]).mean()])
        equal, balanced, share = np.mean(figures, axis=0).tolist()
        rows.append((f"{ranks} x {per_rank}", equal, balanced, 1 / ranks, share))
    table(
        "Parts of a global batch",
        ("ranks x samples", "slowest / mean, equal", "balanced by tokens", "local by chance", "local parts"),
        *rows,
    )


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, default=1_000_000, help="samples to bucket and pack")
    arguments = parser.parse_args()
    cost()
    quality()
    batches(arguments.lengths)
    parts()


if __name__ == "__main__":
    main()
