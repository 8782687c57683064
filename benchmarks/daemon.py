"""What the daemon costs: warm blocks through it beside the same bytes by open and mmap of files on a tmpfs.

    python benchmarks/daemon.py [--rounds 9] [--seconds 1]

Two client processes read at the same time, in turns through the daemon and from the files, the other way round in each
other round, so that both ways meet the same machine. Every block is summed by numpy, so each byte is touched, in the
same way on both roads. A figure is the median over the rounds with the lowest and the highest; the ratio is that of the
two halves of a round. `cpu ratio` compares what the roads cost in CPU seconds, clients and daemon together: other work
on the machine hardly moves it. `others` says how many cores were busy with what is not ours.
"""

from __future__ import annotations

import argparse
import mmap
import multiprocessing
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil

from cache.client import CacheClient
from cache.keys import BlockRef

CLIENTS = 2
GIB = 1 << 30


@dataclass(frozen=True)
class Case:
    """What is read, and the ratio to files that it has to reach."""

    size_bytes: int
    batch: int
    count: int
    bar: float | None = None


CASES = {
    "4 MiB blocks": Case(4 << 20, 1, 64, 0.8),
    "64 x 110 KB": Case(110_000, 64, 640, 0.5),
    "one 4 KiB block": Case(4096, 1, 64),
    "64 x 4 KiB": Case(4096, 64, 640),
}


@dataclass(frozen=True)
class Turn:
    """One road for a while: what the clients read, and the CPU seconds of clients, daemon and everybody else."""

    blocks_s: float
    cpu_s_per_block: float
    daemon_s_per_block: float
    others: float


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


def write_blocks(folder: Path, case: Case) -> list[Path]:
    """Write one file a block."""
    folder.mkdir(parents=True)
    paths = [folder / str(number) for number in range(case.count)]
    for path in paths:
        path.write_bytes(os.urandom(case.size_bytes))
    return paths


def touch(view: memoryview) -> int:
    """Read all of it."""
    whole = len(view) // 8 * 8
    return int(np.frombuffer(view[:whole], np.uint64).sum(dtype=np.uint64))


def through_daemon(client: CacheClient, paths: Sequence[Path], case: Case) -> Callable[[int], None]:
    """Return what reads the batch that begins at a block, warm, through the daemon."""
    refs = [BlockRef(f"file://{path}", client.head(f"file://{path}").version, 0, case.size_bytes) for path in paths]

    def read(begin: int) -> None:
        for block in client.read_blocks(refs[begin : begin + case.batch]):
            touch(block.view)

    return read


def from_files(paths: Sequence[Path], case: Case) -> Callable[[int], None]:
    """Return what reads the same by open and mmap."""

    def read(begin: int) -> None:
        for path in paths[begin : begin + case.batch]:
            fd = os.open(path, os.O_RDONLY)
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            mapped = mmap.mmap(fd, case.size_bytes, flags=flags, prot=mmap.PROT_READ)
            os.close(fd)
            touch(memoryview(mapped))

    return read


def serve_turns(address: str, paths: Sequence[Path], case: Case, channel: Connection) -> None:
    """Read as asked, by road and seconds; answer with blocks, seconds and CPU seconds."""
    with closing(CacheClient(address)) as client:
        roads = {"daemon": through_daemon(client, paths, case), "files": from_files(paths, case)}
        for read in roads.values():
            for begin in range(0, case.count, case.batch):
                read(begin)
        channel.send(None)
        while (order := channel.recv()) is not None:
            road, seconds = order
            done, began, began_cpu = 0, time.perf_counter(), time.process_time()
            while time.perf_counter() - began < seconds:
                roads[road](done % case.count)
                done += case.batch
            channel.send((done, time.perf_counter() - began, time.process_time() - began_cpu))


@contextmanager
def clients(address: str, paths: Sequence[Path], case: Case) -> Iterator[list[Connection]]:
    """Yield a channel to each client process, warm."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        channels = []
        for _ in range(CLIENTS):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve_turns, args=(address, paths, case, theirs))
            process.start()
            stack.callback(process.join)
            stack.callback(ours.send, None)
            channels.append(ours)
        for channel in channels:
            channel.recv()
        yield channels


def busy_s() -> float:
    """Return the seconds that all cores together have worked, or been kept from working by the hypervisor."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)


def take_turn(road: str, seconds: float, channels: Sequence[Connection], daemon: psutil.Process) -> Turn:
    """Let all clients read by one road."""
    before_s, daemon_before_s = busy_s(), sum(daemon.cpu_times()[:2])
    for channel in channels:
        channel.send((road, seconds))
    answers = [channel.recv() for channel in channels]
    daemon_s = sum(daemon.cpu_times()[:2]) - daemon_before_s
    blocks, client_s = sum(answer[0] for answer in answers), sum(answer[2] for answer in answers)
    others = max(0.0, busy_s() - before_s - daemon_s - client_s) / max(answer[1] for answer in answers)
    rate = sum(answer[0] / answer[1] for answer in answers)
    return Turn(rate, (client_s + daemon_s) / blocks, daemon_s / blocks, others)


def spread(values: Sequence[float], form: str) -> str:
    """Return the median with the lowest and the highest."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def measure(name: str, case: Case, rounds: int, seconds: float) -> bool:
    """Print the lines of a case; say whether it is below its bar."""
    daemon_turns, file_turns = [], []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, running_daemon(Path(folder)) as (address, daemon):
        paths = write_blocks(Path(folder) / "blocks", case)
        with clients(address, paths, case) as channels:
            for number in range(rounds):
                for road in ("daemon", "files")[:: 1 if number % 2 else -1]:
                    turns = daemon_turns if road == "daemon" else file_turns
                    turns.append(take_turn(road, seconds, channels, daemon))
    pairs = list(zip(daemon_turns, file_turns, strict=True))
    ratios = [daemon.blocks_s / file.blocks_s for daemon, file in pairs]
    cpu_ratios = [file.cpu_s_per_block / daemon.cpu_s_per_block for daemon, file in pairs]
    bar = "" if case.bar is None else f", the bar is {case.bar}"
    print(f"{name}{bar}: ratio {spread(ratios, '.2f')}, cpu ratio {spread(cpu_ratios, '.2f')}")
    gib = case.size_bytes / GIB
    for road, turns in (("daemon", daemon_turns), ("files", file_turns)):
        print(
            f"    {road:<6} {spread([turn.blocks_s * gib for turn in turns], '.2f')} GiB/s, "
            f"{spread([turn.blocks_s / case.batch for turn in turns], ',.0f')} requests/s, "
            f"{spread([turn.cpu_s_per_block / gib for turn in turns], '.2f')} CPU s/GiB, "
            f"others {spread([turn.others for turn in turns], '.1f')} cores"
        )
    ceilings = [1 / (turn.daemon_s_per_block * case.batch) for turn in daemon_turns]
    shares = [turn.daemon_s_per_block / gib for turn in daemon_turns]
    print(f"    daemon alone: {spread(shares, '.3f')} CPU s/GiB, {spread(ceilings, ',.0f')} requests a CPU second")
    return case.bar is not None and statistics.median(ratios) < case.bar


def main() -> None:
    """Measure and print; ends with 1 where a ratio is below its bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    print(f"load of the machine before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    below = [measure(name, case, options.rounds, options.seconds) for name, case in CASES.items()]
    print(f"load of the machine after: {os.getloadavg()[0]:.1f}")
    raise SystemExit(any(below))


if __name__ == "__main__":
    main()
