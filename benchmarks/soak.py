"""Readers that come and go, faults and churn, for as long as you like: was every byte right, and is anything left?

    python benchmarks/soak.py [--minutes 30] [--readers 4] [--seed 0]

A daemon whose tiers hold about half of the data serves readers that each live for some reads and then end, or are
killed in the middle; some tell it their future first. Meanwhile, at random: block files are flipped, cut or removed,
objects of the origin are replaced, clients send garbage, stall in the middle, or call good blocks bad, the daemon is
stopped for a moment, or killed and started again on the same directory. The last one of them serves the second half.

Each reader compares every byte with what the object holds in that version. At the end the tiers are within their
limits, no connection and no plan is left, the daemon has no more descriptors open than blocks in memory explain, and
its anonymous memory has not grown since its first minute.

Prints one line of JSON; ends with 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing, nullcontext, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from cache.address import socket_address
from cache.block_table import BlockTable
from cache.client import CacheClient
from cache.connection import ServerGoneError
from cache.frames import PROTOCOL_VERSION, Hello, ReadBlocks, ReportBad, encode
from cache.keys import BlockRef
from cache.plan_link import PlanLink
from connectors.errors import ChangedError, DataError, NotFoundError

OBJECTS = 40
OBJECT_BYTES = 1 << 20
BLOCK_BYTES = 100_000
TIER_BYTES = 10 << 20
READS = 200
FAULTS = ("flip", "cut", "remove", "replace", "replace", "stop", "kill_reader", "garbage", "stall", "slander")
PAUSE_S = 0.2
KILLS = 8
STALLED = 4
SETTLE_S = 60.0
GROWTH_BYTES = 64 << 20


def content(seed: int) -> bytes:
    """The bytes of an object: its first eight say which, so a reader knows the rest."""
    return seed.to_bytes(8, "little") + np.random.default_rng(seed).bytes(OBJECT_BYTES - 8)


class Daemon:
    """A daemon that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.address = f"@soak-{secrets.token_hex(8)}"
        self.disk = folder / "disk"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "dataflow", "cache", "serve", "--socket", self.address]
        command += ["--ram", str(TIER_BYTES), "--disk", str(self.disk), "--disk-size", str(TIER_BYTES)]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        self._process.stderr.readline()
        # What it says of the faults made here is no news, and must not fill the pipe.
        self._sink = subprocess.Popen(["cat"], stdin=self._process.stderr, stdout=subprocess.DEVNULL)
        self.process = psutil.Process(self._process.pid)

    def end(self, number: int) -> int:
        self._process.send_signal(number)
        status = self._process.wait(60)
        self._sink.wait(60)
        return status

    def stats(self) -> dict[str, Any]:
        with closing(CacheClient(self.address)) as client:
            return client.stats()

    def anonymous_bytes(self) -> int:
        """Memory of its own: blocks in memory are files."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
        raise AssertionError("Linux says RssAnon")


def read(address: str, folder: Path, seed: int, channel: Connection) -> None:
    """One reader's life; sends what it counted."""
    rng, counts = random.Random(seed), Counter[str]()
    known: dict[int, bytes] = {}
    with closing(CacheClient(address)) as client:
        for _ in range(READS):
            path = folder / str(rng.randrange(OBJECTS))
            try:
                meta = client.head(f"file://{path}")
                offsets = rng.sample(range(0, OBJECT_BYTES - BLOCK_BYTES, BLOCK_BYTES), 4)
                # The block at 0 says which content this version is.
                refs = [BlockRef(f"file://{path}", meta.version, at, BLOCK_BYTES) for at in (0, *offsets)]
                with closing(announce(client, refs)) if rng.random() < 0.25 else nullcontext():
                    blocks = client.read_blocks(refs)
            except (ChangedError, NotFoundError):
                counts["changed"] += 1
                continue
            except ServerGoneError:
                counts["gone"] += 1
                time.sleep(PAUSE_S)
                continue
            number = int.from_bytes(blocks[0].view[:8], "little")
            right = known.setdefault(number, content(number))
            if len(known) > OBJECTS:
                known.clear()
            counts["blocks"] += len(blocks)
            counts["wrong"] += sum(
                block.view != right[ref.offset : ref.offset + ref.length]
                for ref, block in zip(refs, blocks, strict=True)
            )
    channel.send(counts)


def announce(client: CacheClient, refs: list[BlockRef]) -> PlanLink:
    """Tell the daemon what will be read."""
    plan = client.open_plan(
        BlockTable.from_columns(
            [refs[0].uri],
            [refs[0].version],
            object_of=np.zeros(len(refs), np.int32),
            offset=np.array([ref.offset for ref in refs]),
            length=np.array([ref.length for ref in refs]),
            crc32c=None,
        )
    )
    plan.extend(np.arange(len(refs)))
    return plan


def lie(rng: random.Random, kind: str, address: str, folder: Path, stalled: list[socket.socket]) -> None:
    """Be a client that nobody wants."""
    liar = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stalled.append(liar)
    with suppress(OSError):
        liar.settimeout(1.0)
        liar.connect(socket_address(address))
        greeting = encode(Hello(PROTOCOL_VERSION))
        uri = f"file://{folder / str(rng.randrange(OBJECTS))}"
        with closing(CacheClient(address)) as client, suppress(DataError):
            version = client.head(uri).version
            refs = [BlockRef(uri, version, at, BLOCK_BYTES) for at in range(0, OBJECT_BYTES - BLOCK_BYTES, BLOCK_BYTES)]
            match kind:
                case "garbage":
                    liar.sendall(greeting + rng.randbytes(rng.randrange(1, 1000)))
                case "stall":  # asks for far more than it ever takes
                    frame = encode(ReadBlocks(refs * 20))
                    liar.sendall(greeting + frame * 4 + frame[: rng.randrange(len(frame))])
                case "slander":
                    liar.sendall(greeting + encode(ReportBad(refs)))
    while len(stalled) > STALLED:
        stalled.pop(0).close()


def make_fault(rng: random.Random, kind: str, daemon: Daemon, folder: Path, readers: dict[Any, Any]) -> None:
    """Break something, once."""
    files = list((daemon.disk / "blocks-1").glob("*/*")) if kind in ("flip", "cut", "remove") else []
    with suppress(FileNotFoundError):
        if files:
            victim = rng.choice(files)
            if kind == "remove":
                victim.unlink()
            else:
                damaged = bytearray(victim.read_bytes())
                damaged[rng.randrange(len(damaged))] ^= 1
                # A new file, as a disk would not change what a reader has mapped.
                victim.unlink()
                victim.write_bytes(damaged if kind == "flip" else damaged[:-1])
    if kind == "replace":
        target = folder / str(rng.randrange(OBJECTS))
        fresh = folder / f".{target.name}.dataflow-partial"
        fresh.write_bytes(content(rng.randrange(2**32)))
        fresh.rename(target)
    elif kind == "stop":
        daemon.process.suspend()
        time.sleep(PAUSE_S)
        daemon.process.resume()
    elif kind == "kill_reader" and readers:
        rng.choice(list(readers.values())).kill()


def what_is_left(daemon: Daemon) -> dict[str, int]:
    """What a daemon without clients still holds for them, and what it holds too much of."""
    stats = daemon.stats()
    # Blocks in memory are descriptors: those of the tier and of the ring, some of the daemon's own, and nothing else.
    in_memory = sum(tier["blocks"] for tier in (stats["tiers"][0], stats["ring"]))
    return {
        "connections": stats["server"]["connections"] - 1,
        "plans": stats["prefetch"]["plans"],
        "prefetched_bytes": stats["prefetch"]["ahead_bytes"],
        "descriptors": max(0, daemon.process.num_fds() - in_memory - 40),
        "bytes_over_limit": sum(max(0, tier["used_bytes"] - tier["capacity_bytes"]) for tier in stats["tiers"]),
    }


def soak(folder: Path, *, minutes: float, num_readers: int, seed: int) -> dict[str, Any]:
    """Run it all; return the report."""
    rng, counts, faults = random.Random(seed), Counter[str](), Counter[str]()
    origin = folder / "origin"
    origin.mkdir()
    for number in range(OBJECTS):
        (origin / str(number)).write_bytes(content(number))
    daemon = Daemon(folder)
    stalled: list[socket.socket] = []
    context = multiprocessing.get_context("spawn")
    readers: dict[Any, Any] = {}
    begin = time.monotonic()
    end = begin + minutes * 60
    # In the first half, and seldom enough to fill in between.
    num_kills = max(1, min(KILLS, int(minutes * 6)))
    kills = [begin + minutes * 30 * (number + 1) / num_kills for number in range(num_kills)]
    next_fault = begin
    lives, fd_peak, anonymous, next_look = 0, 0, [], begin + min(60.0, minutes * 15)
    while readers or time.monotonic() < end:
        while len(readers) < num_readers and time.monotonic() < end:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=read, args=(daemon.address, origin, rng.randrange(2**32), theirs))
            process.start()
            theirs.close()
            readers[ours] = process
            lives += 1
        for ours in wait(list(readers), timeout=PAUSE_S):
            with suppress(EOFError):  # a killed one
                counts.update(ours.recv())
            process = readers.pop(ours)
            process.join()
            counts["crashed"] += process.exitcode not in (0, -signal.SIGKILL)
            ours.close()
        if time.monotonic() < end and time.monotonic() > next_fault:
            kind = rng.choice(FAULTS)
            faults[kind] += 1
            if kind in ("garbage", "stall", "slander"):
                lie(rng, kind, daemon.address, origin, stalled)
            else:
                make_fault(rng, kind, daemon, origin, readers)
            next_fault = time.monotonic() + 1.0
        if kills and time.monotonic() > kills[0]:
            kills.pop(0)
            faults["kill_daemon"] += 1
            daemon.end(signal.SIGKILL)
            daemon.start()
            anonymous, next_look = [], time.monotonic() + min(60.0, minutes * 15)
        fd_peak = max(fd_peak, daemon.process.num_fds())
        if time.monotonic() > next_look:
            anonymous.append(daemon.anonymous_bytes())
            next_look = time.monotonic() + 60.0
    for liar in stalled:
        liar.close()
    leaks = what_is_left(daemon)
    while any(leaks.values()) and time.monotonic() < end + SETTLE_S:
        time.sleep(PAUSE_S)
        leaks = what_is_left(daemon)
    anonymous.append(daemon.anonymous_bytes())
    leaks["memory_bytes"] = max(0, anonymous[-1] - anonymous[0] - GROWTH_BYTES)
    leaks["exit_status"] = daemon.end(signal.SIGTERM)
    leaks["temporary_files"] = len(list((daemon.disk / "tmp").iterdir()))
    taken = sum(-(-file.stat().st_size // 4096) * 4096 for file in (daemon.disk / "blocks-1").glob("*/*"))
    leaks["disk_bytes_over_limit"] = max(0, taken - TIER_BYTES)
    return {
        "minutes": minutes,
        "readers": lives,
        **{name: counts[name] for name in ("blocks", "wrong", "crashed", "changed", "gone")},
        "faults": dict(sorted(faults.items())),
        "leaks": leaks,
        "fd_peak": fd_peak,
        "anonymous_mib_by_minute": [size_bytes >> 20 for size_bytes in anonymous],
    }


def main() -> None:
    """Run, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--readers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        report = soak(Path(name), minutes=options.minutes, num_readers=options.readers, seed=options.seed)
    print(json.dumps(report))
    wrong = report["wrong"] or report["crashed"] or not report["blocks"] or any(report["leaks"].values())
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
