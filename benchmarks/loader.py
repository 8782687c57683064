"""How fast batches come, beside torch's DataLoader and other loaders, in one run.

    python benchmarks/loader.py [--rounds 5] [--seconds 1] [--fraction 0.1] [--data FOLDER] [--json FILE]
                                [--only tokens records] [--loaders torch dataflow] [--workers 0 2]

Workloads: tokens (2,048 uint16, to int64, batches of 32), records (16 float32 and a label, batches of 256), pixels
(decoded images, 3 x 224 x 224 float32, batches of 64, which are 38 MB), JPEG bytes (batches of 64 files), JPEG decode
(RandomResizedCrop(224), flip, normalise), volume crops (boxes of 128^3 out of volumes of 256^3 float32, batches of 4,
which are 34 MB). All loaders read the same samples and, but for `dataflow native`, finish them by the same function.
`dataflow` is our loader over the dataset that `torch` has, `dataflow native` reads native shards. With `--fraction 1`
there are 1 GiB of tokens, 2 million records and 2 GiB of volumes.

Each loader lives in a process of its own for each workload (what other workloads left in an allocator makes some of
them twice as fast), and rounds go through all of them in turn. A figure is the median of the
rounds, with the lowest and the highest; `x torch` is the median of the rounds' ratios. CPU seconds are those of the
process and its children, per 1,000 samples, and steadier than rates on a machine that does other things too; memory is
their proportional set size at the end of a round. Files are brought into the page cache before a workload is measured.
Peers that are not installed are left out, and said so.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil
import torch
from loader_peers import PEERS, TAKE_PART, batch_length
from loader_workloads import BATCH_SIZES, Scale, Source, decode_whole, file_of, prepare

_PATIENCE_S = 60


@dataclass(frozen=True, slots=True)
class Round:
    """One measurement."""

    samples_per_s: float
    cpu_s_per_1000: float
    first_batch_s: float
    memory_mib: float


def family() -> list[psutil.Process]:
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def cpu_s(processes: list[psutil.Process]) -> float:
    """CPU seconds so far; of the others in ticks of a hundredth of a second, as the kernel counts them."""
    total = time.process_time()
    for process in processes[1:]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def memory_mib(processes: list[psutil.Process]) -> float:
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return total / (1 << 20)


def endless(loader: Iterable) -> Iterator:
    while True:
        before = time.perf_counter()
        yield from loader
        if time.perf_counter() - before < 1e-4:
            raise RuntimeError("the loader has no batches")


def measure(name: str, workload: str, folder: Path, num_workers: int, seconds: float) -> Round:
    """Iterate for some seconds and throw the batches away; what happens once, at the start, is not in the rates."""
    began_s = time.perf_counter()
    batches = endless(PEERS[name](workload, folder, num_workers))
    next(batches)
    first_batch_s = time.perf_counter() - began_s
    for _ in range(8 * max(1, num_workers)):
        next(batches)
    processes = family()
    samples, used_s, began_s = 0, cpu_s(processes), time.perf_counter()
    while time.perf_counter() - began_s < seconds:
        for _ in range(4):
            samples += batch_length(next(batches))
    elapsed_s = time.perf_counter() - began_s
    used_s = cpu_s(processes) - used_s
    memory = memory_mib(processes)
    batches.close()
    return Round(samples / elapsed_s, max(used_s, 1e-9) / samples * 1000, first_batch_s, memory)


def serve(name: str, folder: Path, orders: Connection) -> None:
    """The process of one loader: measures when it is told to."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as in a training script
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  some loaders print
    while (order := orders.recv()) is not None:
        workload, num_workers, seconds = order
        try:
            orders.send(measure(name, workload, folder, num_workers, seconds))
        except BaseException as error:  # noqa: BLE001  whatever a peer does, the others are measured
            traceback.print_exc(file=sys.stderr)
            orders.send(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:90])


class Contender:
    """A loader in its process, from the outside."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.orders, far = context.Pipe()
        self.process = context.Process(target=serve, args=(name, folder, far))
        self.process.start()
        far.close()

    def measure(self, workload: str, num_workers: int, seconds: float) -> Round | str:
        try:
            self.orders.send((workload, num_workers, seconds))
            if self.orders.poll(_PATIENCE_S):
                return self.orders.recv()
            self.process.kill()
        except (EOFError, BrokenPipeError):
            pass
        return "gave no answer"

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.orders.send(None)
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()


def limits(folder: Path) -> dict[str, float]:
    """What this machine gives at best, in one process: copies, and libjpeg-turbo."""
    from dataflow.transforms import RandomResizedCrop
    from dataflow.transforms.decoding import open_image

    def rate(action, seconds: float = 0.5) -> float:
        """Per CPU second."""
        times, began_s = 0, time.process_time()
        while time.process_time() - began_s < seconds:
            action(times)
            times += 1
        return times / (time.process_time() - began_s)

    source = Source("jpeg bytes", folder)
    files = [source[number] for number in range(128)]
    data, place = np.ones(1 << 28, np.uint8), np.ones(1 << 28, np.uint8)
    half = 1 << 27
    crop, rng = RandomResizedCrop(224), np.random.default_rng(0)

    def decode_crop(turn: int) -> None:
        image = open_image(files[turn % 128])
        image.decode(crop.choose(image.width, image.height, rng))

    found = {"memcpy GB/s": rate(lambda turn: np.copyto(place[:half], data[half * (turn % 2) :][:half])) * half / 1e9}
    for workload, size_bytes in (
        ("tokens", 32 * 2048 * 8),
        ("records", 256 * 72),
        ("pixels", 64 * 3 * 224**2 * 4),
        ("volume crops", 4 * 128**3 * 4),
    ):
        # A copy of each batch into four places in turn: what a hand-over costs at least.
        ring = [place[size_bytes * turn :][:size_bytes] for turn in range(4)]
        copy = rate(lambda turn, ring=ring, size=size_bytes: np.copyto(ring[turn % 4], data[:size]))
        found[f"ring reuse, {workload}, samples/s"] = copy * BATCH_SIZES[workload]
    found["libjpeg-turbo, whole, images/s"] = rate(lambda turn: decode_whole(files[turn % 128]))
    found["libjpeg-turbo, crop only, images/s"] = rate(decode_crop)
    return found


def spread(values: list[float], unit: float = 1.0) -> str:
    """The median, and the lowest and highest."""
    return f"{statistics.median(values) * unit:,.4g} ({min(values) * unit:,.4g}-{max(values) * unit:,.4g})"


def bring_into_memory(folder: Path, workload: str) -> None:
    """Read the files of a workload: a machine that reclaims memory lets go of those that wait for their turn."""
    for path in [folder / f"{file_of(workload)}.npy", *folder.glob(f"*/{workload.replace(' ', '-')}/**/*")]:
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 22):
                    pass


def contest(
    contenders: list[Contender], folder: Path, workload: str, num_workers: int, rounds: int, seconds: float
) -> list[dict]:
    """Measure all in turn, round by round, and print their lines."""
    contenders = [one for one in contenders if one.name in TAKE_PART.get(workload, PEERS)]
    measured: dict[str, list[Round]] = {one.name: [] for one in contenders}
    failures: dict[str, str] = {}
    for one in contenders:  # the data in the loader's own form, and its warm-up
        answer = one.measure(workload, num_workers, 0.1)
        if isinstance(answer, str):
            failures[one.name] = answer
    bring_into_memory(folder, workload)
    for _ in range(rounds):
        for one in contenders:
            if one.name in failures:
                continue
            answer = one.measure(workload, num_workers, seconds)
            if isinstance(answer, str):
                failures[one.name] = answer
            else:
                measured[one.name].append(answer)
    lines = []
    for name, found in measured.items():
        if name in failures:
            print(f"| {workload} | {num_workers} | {name} | {failures[name]} |", flush=True)
            lines.append({"workload": workload, "num_workers": num_workers, "loader": name, "failure": failures[name]})
            continue
        rates, cpus = [one.samples_per_s for one in found], [one.cpu_s_per_1000 for one in found]
        base = measured.get("torch") or []
        ratios = [mine.samples_per_s / theirs.samples_per_s for mine, theirs in zip(found, base, strict=False)]
        cpu_ratios = [theirs.cpu_s_per_1000 / mine.cpu_s_per_1000 for mine, theirs in zip(found, base, strict=False)]
        times = f"{statistics.median(ratios):.2f} | {statistics.median(cpu_ratios):.2f}" if ratios else "- | -"
        first = statistics.median([one.first_batch_s for one in found]) * 1000
        memory = max(one.memory_mib for one in found)
        print(
            f"| {workload} | {num_workers} | {name} | {spread(rates)} | {times} | {spread(cpus)} "
            f"| {first:,.0f} | {memory:,.0f} |",
            flush=True,
        )
        lines.append(
            {
                "workload": workload,
                "num_workers": num_workers,
                "loader": name,
                "times_torch": statistics.median(ratios) if ratios else None,
                "rounds": [asdict(one) for one in found],
            }
        )
    return lines


def main() -> None:
    """Run and print a table, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--fraction", type=float, default=0.1)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--only", nargs="*", default=list(BATCH_SIZES))
    parser.add_argument("--loaders", nargs="*", default=list(PEERS))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="dataflow-loader-") as scratch:
        folder = arguments.data or Path(scratch)
        prepare(folder, Scale.of(arguments.fraction), [*arguments.only, "jpeg bytes"])
        load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
        print(f"{dt.date.today()}, {os.cpu_count()} CPUs, load {load} at the start, torch {torch.__version__},")
        print(f"Python {platform.python_version()}, fraction {arguments.fraction:g} of the data\n")
        found = limits(folder)
        print("| the machine at best, per CPU second | |\n|---|---|")
        print("\n".join(f"| {name} | {value:,.4g} |" for name, value in found.items()) + "\n")
        print(
            "| workload | workers | loader | samples/s | x torch | per CPU s | CPU s / 1,000 | first batch ms | MiB |"
        )
        print("|---|---|---|---|---|---|---|---|---|", flush=True)
        report = []
        for workload in arguments.only:
            contenders = [Contender(name, folder) for name in arguments.loaders]
            try:
                for num_workers in arguments.workers:
                    report += contest(contenders, folder, workload, num_workers, arguments.rounds, arguments.seconds)
            finally:
                for one in contenders:
                    one.close()
        print(f"\nload at the end {', '.join(f'{one:.1f}' for one in os.getloadavg())}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"limits": found, "results": report}, indent=1))


if __name__ == "__main__":
    main()
