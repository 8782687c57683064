"""What order costs per sample at 10^5 to 10^9 samples, how well it shuffles, and what buckets, packs and parts gain.

    python benchmarks/order.py [--lengths 10000000] [--plots docs/explanation]

Reads no data set. Times depend on the machine; shares and ratios do not. Plots need the `bench` extra.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from dataflow.index import Blocks, Index, Shards
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
    PackedBatches,
    Place,
    Schedule,
    Shuffle,
    divide,
    lay_out_pack,
)

BLOCK_SAMPLES = 1000
CHUNK = 65_536
CAPACITY = 2048
POWERS = range(5, 10)
WINDOWS = (1, 4, 16, 64, 256, 1000)
SHARD_BLOCKS = 20
QUALITIES = (
    "neighbours of one block, x chance",
    "correlation of neighbours",
    "spread of a block over the epoch",
    f"spread of a shard of {SHARD_BLOCKS} blocks",
    "blocks in a batch of 256",
)


def seconds(work: Callable[[], object]) -> float:
    """Return the best of seven, in processor time, so that foreign load does not count."""
    times = []
    for _ in range(7):
        began_s = time.process_time()
        work()
        times.append(time.process_time() - began_s)
    return min(times)


def table(title: str, *rows: tuple[object, ...]) -> None:
    """Print rows of cells under a title; the first row is the head."""
    print(f"\n{title}\n")
    for place, row in enumerate(rows):
        print("| " + " | ".join(f"{cell:,.4g}" if isinstance(cell, float) else f"{cell}" for cell in row) + " |")
        if place == 0:
            print("|" + "---|" * len(row))


COSTS = ("full order", "block order", "global batches and parts", "index")


def cost_of(n: int) -> tuple[float, ...]:
    """Return ns a sample as in `COSTS`, and ms to begin an epoch and to resume in its middle."""
    middle = n // 2
    count = min(CHUNK, n - middle)
    first_sample = np.arange(0, n + 1, BLOCK_SAMPLES)
    full, block = FullOrder(n, 0, 0), BlockOrder(first_sample, 0, 0, 64)
    schedule = Schedule(Shuffle(n, first_sample, "block", 0, 64), FixedBatches(1000, "short"))
    place = Place(n // 2000, n // 2000 * 1000)
    index, samples = index_of(first_sample), block.take(middle, middle + count)

    def plan_parts() -> None:
        steps = schedule.batching.plan(block, 0, place.position, place.position + count)
        for step in range(len(steps)):
            divide(EqualParts(), steps.batch(block, step), 8)

    return (
        seconds(lambda: full.take(middle, middle + count)) / count * 1e9,
        seconds(lambda: block.take(middle, middle + count)) / count * 1e9,
        seconds(plan_parts) / count * 1e9,
        seconds(lambda: index.locate(samples)) / count * 1e9,
        seconds(lambda: BlockOrder(first_sample, 0, 0, 64)) * 1e3,
        seconds(lambda: schedule.epoch(0).check(place)) * 1e3,
    )


def index_of(first_sample: np.ndarray) -> Index:
    """Return the index of one shard whose blocks have a byte a sample."""
    sizes = np.diff(first_sample)
    blocks = Blocks(np.zeros(len(sizes), np.int32), first_sample[:-1], sizes, first_sample)
    return Index("memory://bench/", "", Shards(pa.array(["shard"]), first_sample[-1:], pa.array(["1"])), blocks)


def cost() -> list[tuple[float, ...]]:
    """Cost of an order is flat in the number of samples."""
    costs = [cost_of(10**power) for power in POWERS]
    table(
        f"Cost, blocks of {BLOCK_SAMPLES} samples",
        ("samples", *(f"{name}, ns a sample" for name in COSTS), "begin an epoch, ms", "resume in its middle, ms"),
        *((f"10^{power}", *figures) for power, figures in zip(POWERS, costs, strict=True)),
    )
    return costs


def quality() -> list[tuple[float, ...]]:
    """How far block order is from a permutation of all samples."""
    n = 1_000_000
    first_sample = np.arange(0, n + 1, BLOCK_SAMPLES)
    epochs = [(f"window of {window}", BlockOrder(first_sample, 0, 0, window).take(0, n)) for window in WINDOWS]
    epochs.append(("full", FullOrder(n, 0, 0).take(0, n)))
    epochs.append(("numpy's permutation", np.random.default_rng(0).permutation(n)))
    rows = []
    for _, samples in epochs:
        block = samples // BLOCK_SAMPLES
        positions = np.argsort(samples).reshape(-1, BLOCK_SAMPLES)
        batches = block[: n // 256 * 256].reshape(-1, 256)
        rows.append(
            (
                float((block[1:] == block[:-1]).mean() * n / BLOCK_SAMPLES),
                float(np.corrcoef(samples[1:], samples[:-1])[0, 1]),
                float(positions.std(axis=1).mean() / (n / 12**0.5)),
                float(positions.reshape(-1, SHARD_BLOCKS * BLOCK_SAMPLES).std(axis=1).mean() / (n / 12**0.5)),
                float(np.mean([len(np.unique(batch)) for batch in batches[::40]])),
            )
        )
    table(
        f"Shuffle quality, {n:,} samples in {n // BLOCK_SAMPLES:,} blocks, batches of 256",
        ("order", *QUALITIES),
        *((name, *row) for (name, _), row in zip(epochs, rows, strict=True)),
    )
    return rows


def draw(costs: list[tuple[float, ...]], qualities: list[tuple[float, ...]], folder: Path) -> None:
    """Write what `cost` and `quality` found as two figures."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "order"  # else every run names its shapes anew
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, column in zip(COSTS, zip(*costs, strict=True), strict=False):
        axes.plot([10**power for power in POWERS], column, marker="o", label=name)
    axes.set(xscale="log", xlabel="samples in the dataset", ylabel="ns a sample", ylim=(0, None))
    axes.legend()
    figure.savefig(folder / "order-cost.svg", metadata={"Date": None})

    figure = Figure(figsize=(15, 3.2), layout="constrained")
    for axes, title, column in zip(figure.subplots(1, 5), QUALITIES, zip(*qualities, strict=True), strict=True):
        axes.plot(WINDOWS, column[: len(WINDOWS)], marker="o", label="block order")
        axes.axhline(column[-2], color="C1", label="full order")
        axes.axhline(column[-1], color="black", linestyle=":", label="numpy's permutation")
        axes.set(xscale="log", xlabel="window, blocks", title=title)
        axes.title.set_fontsize("medium")
        if title.startswith("neighbours"):
            axes.set_yscale("log")
            axes.legend(loc="lower left", bbox_to_anchor=(0, 0.05), fontsize="small")
    figure.savefig(folder / "order-quality.svg", metadata={"Date": None})


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


ROW = 512


def tokens_per_second(rounds: int) -> None:
    """Useful tokens per second of processor time: one small transformer on padded batches, buckets and packed rows."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    width, heads, count = 64, 4, 256
    lengths = np.clip(np.random.default_rng(0).lognormal(4.5, 1, count).astype(np.int64), 1, ROW)
    documents = [np.random.default_rng(int(n)).integers(0, 1000, n) for n in lengths]
    embed, head = torch.nn.Embedding(1000, width), torch.nn.Linear(width, 1000)
    layers = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True), 2
    )

    def train(tokens: np.ndarray, owners: np.ndarray) -> None:
        """One forward and backward pass over rows of tokens; `owners` is the document of each, -1 for filling."""
        owner = torch.from_numpy(owners)
        apart = owner[:, :, None] != owner[:, None, :]
        hidden = layers(embed(torch.from_numpy(tokens)), mask=apart.repeat_interleave(heads, 0))
        real = owner >= 0
        torch.nn.functional.cross_entropy(head(hidden[real]), torch.from_numpy(tokens)[real]).backward()

    def padded(batch: GlobalBatch) -> tuple[np.ndarray, np.ndarray]:
        own = [documents[sample] for sample in batch.samples().tolist()]
        tokens = np.zeros((len(own), max(map(len, own))), np.int64)
        owners = np.full(tokens.shape, -1, np.int64)
        for row, document in enumerate(own):
            tokens[row, : len(document)], owners[row, : len(document)] = document, 0
        return tokens, owners

    def packed(batch: GlobalBatch) -> tuple[np.ndarray, np.ndarray]:
        own = np.split(batch.samples(), batch.unit_starts[1:-1])
        rows = [lay_out_pack([documents[sample] for sample in pack.tolist()], ROW, 0) for pack in own]
        return np.stack([row.tokens for row in rows]), np.stack([row.document_ids for row in rows])

    kinds = {
        "padded, 32 samples": (FixedBatches(32, "short"), padded),
        "buckets": (BucketBatches(lengths, 16 * ROW, 1, None, None, count, 0), padded),
        "packs of 512, 8 a step": (PackedBatches(lengths, ROW, 8, count, 0), packed),
    }
    speeds: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(rounds + 1):
        for name, (batching, make) in kinds.items():
            began_s = time.process_time()
            for batch in Epoch(Shuffle(count, None, "full", 0, 1), batching, turn).batches():
                train(*make(batch))
            speeds[name].append(lengths.sum() / (time.process_time() - began_s))
    measured = {name: np.array(found[1:]) for name, found in speeds.items()}  # the first round warms up
    first = next(iter(measured.values()))
    table(
        f"Training throughput, {count:,} log-normal lengths, mean {lengths.mean():.0f}, cut at {ROW}; {rounds} rounds",
        ("batches", "useful tokens per processor second", "least to most", "over padded, median of rounds"),
        *(
            (
                name,
                float(np.median(found)),
                f"{found.min():,.0f} to {found.max():,.0f}",
                float(np.median(found / first)),
            )
            for name, found in measured.items()
        ),
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
    parser.add_argument("--rounds", type=int, default=5, help="rounds of training on padded and packed rows")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="also draw cost and quality there, as SVG")
    arguments = parser.parse_args()
    costs, qualities = cost(), quality()
    if arguments.plots is not None:
        draw(costs, qualities, arguments.plots)
    batches(arguments.lengths)
    parts()
    tokens_per_second(arguments.rounds)


if __name__ == "__main__":
    main()
