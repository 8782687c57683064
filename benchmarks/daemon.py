"""What the daemon costs: warm blocks through it beside the same bytes by open and mmap of files on a tmpfs.

    python benchmarks/daemon.py [--rounds 5] [--seconds 2]

Two client processes read at the same time, first through the daemon, then the files, in turns, so that both meet the
same machine. Every block is summed, as numpy reads it, so mapped memory is really touched. Printed are medians over the
rounds, and the median of the rounds' ratios; beside it the daemon's CPU seconds per GiB, and how many requests for one
small block it answers in a second.
"""

from __future__ import annotations

import argparse
import json
import mmap
import multiprocessing
import operator
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import psutil

from cache.client import CacheClient
from cache.keys import BlockRef

CLIENTS = 2
CASES = {  # name: bytes of a block, blocks a request, blocks in all
    "4 MiB blocks": (4 << 20, 1, 64),
    "64 x 110 KB": (110_000, 64, 640),
}
BARS = {"4 MiB blocks": 0.8, "64 x 110 KB": 0.5}
SMALL_BYTES = 4096


@contextmanager
def running_daemon(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Yield address and process of a daemon with 1 GiB of memory."""
    address = f"@benchmark-{secrets.token_hex(8)}"
    command = [sys.executable, "-m", "dataflow", "cache", "serve", "--socket", address, "--ram", "1GiB"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=folder) as process:
        assert process.stderr is not None
        process.stderr.readline()
        try:
            yield address, psutil.Process(process.pid)
        finally:
            process.terminate()


def write_blocks(folder: Path, size_bytes: int, count: int) -> list[Path]:
    """Write one file a block."""
    folder.mkdir(parents=True)
    paths = [folder / str(number) for number in range(count)]
    for path in paths:
        path.write_bytes(os.urandom(size_bytes))
    return paths


def touch(view: memoryview) -> int:
    """Read all of it."""
    whole = len(view) // 8 * 8
    return int(np.frombuffer(view[:whole], np.uint64).sum(dtype=np.uint64))


def read_daemon(address: str, paths: list[Path], size_bytes: int, batch: int, seconds: float) -> int:
    """Read warm blocks in a circle; return how many bytes."""
    with closing(CacheClient(address)) as client:
        refs = [BlockRef(f"file://{path}", client.head(f"file://{path}").version, 0, size_bytes) for path in paths]

        def one(begin: int) -> None:
            for block in client.read_blocks(refs[begin : begin + batch]):
                touch(block.view)

        return circle(one, len(refs), batch, seconds) * size_bytes


def read_files(paths: list[Path], size_bytes: int, batch: int, seconds: float) -> int:
    """The same by open and mmap."""

    def one(begin: int) -> None:
        for path in paths[begin : begin + batch]:
            fd = os.open(path, os.O_RDONLY)
            mapped = mmap.mmap(fd, size_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
            os.close(fd)
            touch(memoryview(mapped))

    return circle(one, len(paths), batch, seconds) * size_bytes


def circle(one: Callable[[int], None], count: int, batch: int, seconds: float) -> int:
    """Call `one` with the beginning of each batch until time is up; return how many blocks that were."""
    for begin in range(0, count, batch):
        one(begin)  # warm
    done, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        one(done % count)
        done += batch
    return done


def rate(function: Callable[..., int], *arguments: object, seconds: float) -> float:
    """Return GiB/s of all clients together."""
    context = multiprocessing.get_context("fork")
    with context.Pool(CLIENTS) as pool:
        results = [pool.apply_async(function, (*arguments, seconds)) for _ in range(CLIENTS)]
        total = sum(result.get() for result in results)
    return total / seconds / 2**30


def small_requests(address: str, paths: list[Path], seconds: float) -> int:
    """Ask for one small block at a time; return the number of requests."""
    with closing(CacheClient(address)) as client:
        uri = f"file://{paths[0]}"
        ref = BlockRef(uri, client.head(uri).version, 0, SMALL_BYTES)
        return circle(lambda _: client.read_blocks([ref]) and None, 1, 1, seconds)


def main() -> None:
    """Measure and print; ends with 1 where a ratio is below its bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    below = False
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name, running_daemon(Path(name)) as (address, process):
        for case, (size_bytes, batch, count) in CASES.items():
            paths = write_blocks(Path(name) / case.replace(" ", "-"), size_bytes, count)
            daemon_rates, file_rates, cpu_s, gib = [], [], 0.0, 0.0
            for _ in range(options.rounds):
                before = sum(process.cpu_times()[:2])
                daemon_rates.append(rate(read_daemon, address, paths, size_bytes, batch, seconds=options.seconds))
                cpu_s += sum(process.cpu_times()[:2]) - before
                # The first circle of each client, which is not in the rate, went through the daemon too.
                gib += daemon_rates[-1] * options.seconds + CLIENTS * count * size_bytes / 2**30
                file_rates.append(rate(read_files, paths, size_bytes, batch, seconds=options.seconds))
            ratio = statistics.median(map(operator.truediv, daemon_rates, file_rates))
            below |= ratio < BARS[case]
            print(
                json.dumps(
                    {
                        "case": case,
                        "daemon_gib_s": round(statistics.median(daemon_rates), 2),
                        "mmap_gib_s": round(statistics.median(file_rates), 2),
                        "ratio": round(ratio, 2),
                        "bar": BARS[case],
                        "daemon_cpu_s_per_gib": round(cpu_s / gib, 3),
                    }
                )
            )
        requests = [
            rate(small_requests, address, paths, seconds=options.seconds) * 2**30 for _ in range(options.rounds)
        ]
        print(json.dumps({"case": "requests for one 4 KiB block", "requests_s": round(statistics.median(requests))}))
    raise SystemExit(below)


if __name__ == "__main__":
    main()
