"""What the cache costs: cold reads against going direct, CPU a GiB, and a million blocks in memory and at the start.

    python benchmarks/engine.py [--rounds 7] [--mib 256] [--files 1000000] [--folder DIR]
        [--origins files link S3 S3-30ms]

A reader asks for 32 blocks of 1 MiB at once, each on its own, checks each (crc32c) when it arrives, and goes on to the
next 32, in random order. `direct` asks the store client itself, in a process that keeps freed memory as a cache server
does; `plan` is a reader that says beforehand what it will read, as a loader does. The ways take turns in each round; a
figure is the median of its rounds with the lowest and the highest, and the ratio to direct is the median of the ratios
within the rounds. CPU is that of the whole process, reader included, until all blocks lie where they are kept; beside
it is that of the object server, which runs on this machine. Where both together take all that the machine has, no read
is faster than that allows: `of CPU` is what a direct read costs both, divided by what this one does, which other load
moves little. `others` says how many cores strangers kept busy.

`link` is files behind a network of 250 MiB/s and 30 ms, which costs no CPU: there the cache can only lose by waiting.
What disks hold is deleted at the very end: where many files have just been deleted, ext4 without a journal is slow to
make new ones.

The million block files are empty and have names only, which is all that a scan looks at. They are written to `--folder`
and deleted again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import psutil
from crc32c import crc32c

from cache.allocator import keep_freed_memory
from cache.block import block_path
from cache.block_table import BlockTable
from cache.config import CacheConfig, TierConfig
from cache.directory_shelf import DirectoryShelf
from cache.engine import Engine, Handle
from cache.handle import map_memory
from cache.keys import BlockRef, block_key
from cache.testing import read_handle
from connectors.objects import ObjectMeta, Span, join_uri, split_uri
from connectors.protocols import Buffer, Store
from connectors.registry import open_store
from connectors.testing.seaweed import SeaweedServer
from connectors.wrappers import DelayedStore

MIB = 1 << 20
BATCH = 32
OBJECT_BLOCKS = 64
LATENCY_S = 0.03
LINK_MIB_S = 250.0
ORIGINS = ("files", "link", "S3", "S3-30ms")
ROWS = ("direct", "ram, cold", "ram, plan", "ram, warm", "disk, cold", "disk, plan", "disk, warm")

Read = Callable[[BlockRef], Awaitable[None]]


async def write_objects(store: Store, prefix: str, mib: int) -> list[BlockRef]:
    """Write random objects of 64 MiB and name their blocks."""
    refs = []
    for number in range(mib // OBJECT_BLOCKS):
        key = f"{prefix}object-{number}"
        meta = await store.put(key, os.urandom(OBJECT_BLOCKS * MIB))
        refs += [BlockRef(join_uri(store.url, key), meta.version, at * MIB, MIB) for at in range(OBJECT_BLOCKS)]
    return refs


def direct_reader(store: Store) -> Read:
    """Ask the store."""

    async def read(ref: BlockRef) -> None:
        _, key = split_uri(ref.uri)
        crc32c(await store.get_range(key, Span(ref.offset, ref.length), version=ref.version))

    return read


def cached_reader(engine: Engine) -> Read:
    """Ask the engine, and read what it gives the way a client does."""

    async def read(ref: BlockRef) -> None:
        (handle,) = await engine.get_many([ref])
        assert isinstance(handle, Handle), handle
        if handle.verify:
            read_handle(block_key(ref), handle)
        else:
            with handle:
                crc32c(map_memory(handle.fd, handle.length))

    return read


class Announced:
    """The plan of a reader, as a server keeps it for a loader."""

    def __init__(self, engine: Engine, refs: Sequence[BlockRef]) -> None:
        uris = list(dict.fromkeys(ref.uri for ref in refs))
        versions = {ref.uri: ref.version for ref in refs}
        table = BlockTable.from_columns(
            uris,
            [versions[uri] for uri in uris],
            object_of=np.array([uris.index(ref.uri) for ref in refs]),
            offset=np.array([ref.offset for ref in refs]),
            length=np.array([ref.length for ref in refs]),
            crc32c=None,
        )
        self._prefetcher = engine.prefetcher
        self._number = self._prefetcher.open(table.digest, table)
        self._prefetcher.extend(self._number, np.arange(len(refs), dtype="<i4").tobytes())

    def passed(self, position: int) -> None:
        """All blocks before `position` were read."""
        self._prefetcher.advance(self._number, position)


@dataclass(frozen=True)
class Cost:
    """Seconds of the clock until all was read, of CPU until all was placed, and cores that strangers took."""

    seconds: float
    cpu_s: float
    server_s: float
    others: float


def server_s() -> float:
    """Return the seconds of CPU that the object server has used, which is this process's only descendant that works."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(time.user + time.system for time in times)


def busy_s() -> float:
    """Return the seconds that all cores together have worked, or been kept from working by the hypervisor."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)


async def measure(
    read: Read, refs: Sequence[BlockRef], engine: Engine | None = None, *, announce: bool = False
) -> Cost:
    """Read all blocks, announced or not, then wait until they are placed."""
    began, began_cpu, began_server, began_busy = time.perf_counter(), time.process_time(), server_s(), busy_s()
    plan = Announced(engine, refs) if engine is not None and announce else None
    for start in range(0, len(refs), BATCH):
        await asyncio.gather(*map(read, refs[start : start + BATCH]))
        if plan is not None:
            plan.passed(start + BATCH)
    seconds = time.perf_counter() - began
    if engine is not None:
        await engine.settle()
    cpu_s, served_s = time.process_time() - began_cpu, server_s() - began_server
    strangers_s = max(0.0, busy_s() - began_busy - cpu_s - served_s)
    return Cost(seconds, cpu_s, served_s, strangers_s / (time.perf_counter() - began))


class LinkedStore:
    """A store behind a network: each read arrives after the latency, one after the other at the rate of the link."""

    def __init__(self, store: Store, *, mib_s: float, latency_s: float) -> None:
        self.url = store.url
        self._store = store
        self._mib_s, self._latency_s = mib_s, latency_s
        self._free_s = 0.0

    async def get_range(self, key: str, span: Span, *, version: str | None = None) -> Buffer:
        """See `connectors.protocols`."""
        return (await self.get_ranges(key, [span], version=version))[0]

    async def get_ranges(self, key: str, spans: Sequence[Span], *, version: str | None = None) -> list[Buffer]:
        """See `connectors.protocols`."""
        now_s = time.monotonic()
        self._free_s = max(self._free_s, now_s + self._latency_s) + sum(s.length for s in spans) / MIB / self._mib_s
        arrived_s = self._free_s
        bodies = await self._store.get_ranges(key, spans, version=version)
        await asyncio.sleep(arrived_s - time.monotonic())
        return bodies

    async def put(self, key: str, data: Buffer) -> ObjectMeta:
        """See `connectors.protocols`."""
        return await self._store.put(key, data)

    async def close(self) -> None:
        """See `connectors.protocols`."""


async def compare(origin: str, store: Store, prefix: str, folder: Path, mib: int, rounds: int) -> None:
    """Print a line for each way to read the same blocks."""
    refs = await write_objects(store, prefix, mib)
    costs: dict[str, list[Cost]] = {}
    await measure(direct_reader(store), refs)  # connections and page cache
    ways = [("direct", False), ("ram", False), ("ram", True), ("disk", False), ("disk", True)]
    for turn in range(rounds):
        random.Random(turn).shuffle(refs)
        for name, announce in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
            if name == "direct":
                costs.setdefault(name, []).append(await measure(direct_reader(store), refs))
                continue
            path = tempfile.mkdtemp(dir=folder) if name == "disk" else None
            tier = TierConfig(name, 2 * mib * MIB, path, medium="nvme" if path else "ram")
            engine = Engine(CacheConfig((tier,)), open_store=lambda _: store)
            await engine.start()
            await engine.scanned()
            reader = cached_reader(engine)
            cold = await measure(reader, refs, engine, announce=announce)
            costs.setdefault(f"{name}, plan" if announce else f"{name}, cold", []).append(cold)
            if not announce:
                costs.setdefault(f"{name}, warm", []).append(await measure(reader, refs, engine))
            await engine.close()
    print(f"\n{origin}: {mib} MiB, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(
        f"{'':<12} {'MiB/s':>20} {'ratio to direct':>20} {'CPU s/GiB':>18} {'server':>18} {'of CPU':>18} {'others':>14}"
    )
    for name, measured in sorted(costs.items(), key=lambda row: ROWS.index(row[0])):
        pairs = list(zip(measured, costs["direct"], strict=True))
        cells = [
            _spread([mib / cost.seconds for cost in measured], "20.0f"),
            _spread([direct.seconds / cost.seconds for cost, direct in pairs], "20.2f"),
            _spread([1024 / mib * cost.cpu_s for cost in measured], "18.2f"),
            _spread([1024 / mib * cost.server_s for cost in measured], "18.2f"),
            _spread([(one.cpu_s + one.server_s) / (cost.cpu_s + cost.server_s) for cost, one in pairs], "18.2f"),
            _spread([cost.others for cost in measured], "14.1f"),
        ]
        print(f"{name:<12} {' '.join(cells)}")


async def start_up(folder: Path, files: int) -> None:
    """Print what a directory of so many blocks costs at the start, and in memory."""
    root = folder / "million"
    shelf = DirectoryShelf(str(root), medium="nvme", system=os)
    shelf.lock()
    shelf.close()
    blocks = root / "blocks-1"
    for number in range(256):
        (blocks / f"{number:02x}").mkdir()
    source = random.Random(0)
    try:
        for _ in range(files):
            os.mknod(blocks / block_path(source.randbytes(16), MIB))
        for policy in ("kept", "lru"):
            gc.collect()
            before = psutil.Process().memory_info().rss
            config = CacheConfig((TierConfig("disk", 1 << 60, str(root), medium="nvme", policy=policy),))
            engine = Engine(config)
            began = time.perf_counter()
            await engine.start()
            opened_s = time.perf_counter() - began
            longest_s = await _longest_pause(engine)
            scanned_s = time.perf_counter() - began
            found = engine.stats()["tiers"][0]["blocks"]
            taken = psutil.Process().memory_info().rss - before
            print(
                f"{policy}: {found} blocks; serves after {opened_s * 1e3:.0f} ms, knows all after {scanned_s:.1f} s, "
                f"the loop waits at most {longest_s * 1e3:.0f} ms; {taken / MIB:.0f} MiB, {taken / found:.0f} B a block"
            )
            await engine.close()
            del engine
    finally:
        shutil.rmtree(root)


async def _longest_pause(engine: Engine) -> float:
    """Wait for the scan; return the longest time during which nobody else was served."""
    scan = asyncio.ensure_future(engine.scanned())
    longest_s = 0.0
    while not scan.done():
        began = time.perf_counter()
        await asyncio.sleep(0)
        longest_s = max(longest_s, time.perf_counter() - began)
        await asyncio.sleep(0.001)
    return longest_s


def _spread(values: Sequence[float], form: str) -> str:
    width, _, places = form.partition(".")
    text = f"{statistics.median(values):.{places}} ({min(values):.{places}}-{max(values):.{places}})"
    return f"{text:>{width}}"


@contextlib.contextmanager
def _temporary(parent: str | None) -> Iterator[Path]:
    path = tempfile.mkdtemp(dir=parent)
    try:
        yield Path(path)
    finally:
        shutil.rmtree(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--files", type=int, default=1_000_000, help="0 leaves the start-up out")
    parser.add_argument("--folder", help="where to write; by default the system's temporary folder")
    parser.add_argument("--origins", nargs="*", choices=ORIGINS, default=ORIGINS, help="none leaves the reads out")
    options = parser.parse_args()
    keep_freed_memory()
    with _temporary(options.folder) as folder, contextlib.ExitStack() as servers:
        store: Store | None = None
        for origin in options.origins:
            prefix = "" if origin.startswith("S3") else f"{folder}/origin/".lstrip("/")
            match origin:
                case "files":
                    asked = open_store("file:///")
                case "link":
                    linked = LinkedStore(open_store("file:///"), mib_s=LINK_MIB_S, latency_s=LATENCY_S)
                    asked = cast("Store", linked)
                case _:
                    if store is None:
                        server = servers.enter_context(SeaweedServer())
                        store = open_store(server.create_bucket("engine"), **server.options())
                    asked = store if origin == "S3" else DelayedStore(store, lambda _: LATENCY_S)
            asyncio.run(compare(origin, asked, prefix, folder, options.mib, options.rounds))
        if options.files:
            asyncio.run(start_up(folder, options.files))


if __name__ == "__main__":
    main()
