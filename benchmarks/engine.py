"""What the cache costs: cold reads against going direct, CPU a GiB, and a million blocks in memory and at the start.

    python benchmarks/engine.py [--rounds 7] [--mib 256] [--files 1000000] [--folder DIR]

Every read checks its bytes (crc32c), so that all of them are touched. `direct` is the same store client, no cache. The
ways take turns in each round; a figure is the median of its rounds with the lowest and the highest, and the ratio to
direct is the median of the ratios within the rounds. A read is a batch of 32 blocks of 1 MiB in random order. CPU is
that of the whole process, client included, until all blocks lie where they are kept. `others` says how many cores were
busy meanwhile with what is not this process: an object server of this machine, and strangers.

`a link` is files behind a network of 250 MiB/s and 30 ms, which costs no CPU: there the cache can only lose by waiting.

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

import psutil
from crc32c import crc32c

from cache.block import block_path
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

Read = Callable[[Sequence[BlockRef]], Awaitable[None]]


async def write_objects(store: Store, prefix: str, mib: int) -> list[BlockRef]:
    """Write random objects of 64 MiB and name their blocks."""
    refs = []
    for number in range(mib // OBJECT_BLOCKS):
        key = f"{prefix}object-{number}"
        meta = await store.put(key, os.urandom(OBJECT_BLOCKS * MIB))
        refs += [BlockRef(join_uri(store.url, key), meta.version, at * MIB, MIB) for at in range(OBJECT_BLOCKS)]
    return refs


def direct_reader(store: Store) -> Read:
    """Ask the store for each block, all of a batch at once."""

    async def read_one(ref: BlockRef) -> None:
        _, key = split_uri(ref.uri)
        crc32c(await store.get_range(key, Span(ref.offset, ref.length), version=ref.version))

    async def read(refs: Sequence[BlockRef]) -> None:
        await asyncio.gather(*(read_one(ref) for ref in refs))

    return read


def cached_reader(engine: Engine) -> Read:
    """Ask the engine, and read what it gives the way a client does."""

    def look(ref: BlockRef, handle: Handle) -> None:
        if handle.verify:
            read_handle(block_key(ref), handle)
        else:
            with handle:
                crc32c(map_memory(handle.fd, handle.length))

    async def read(refs: Sequence[BlockRef]) -> None:
        for ref, handle in zip(refs, await engine.get_many(refs), strict=True):
            assert isinstance(handle, Handle), handle
            look(ref, handle)

    return read


@dataclass(frozen=True)
class Cost:
    """Seconds of the clock until all was read, of our CPU until all was placed, and cores that others took."""

    seconds: float
    cpu_s: float
    others: float


def busy_s() -> float:
    """Return the seconds that all cores together have worked, or been kept from working by the hypervisor."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)


async def measure(read: Read, refs: Sequence[BlockRef], settle: Callable[[], Awaitable[None]] | None = None) -> Cost:
    """Read all blocks, then wait until they are placed."""
    began, began_cpu, began_busy = time.perf_counter(), time.process_time(), busy_s()
    for start in range(0, len(refs), BATCH):
        await read(refs[start : start + BATCH])
    seconds = time.perf_counter() - began
    if settle is not None:
        await settle()
    cpu_s = time.process_time() - began_cpu
    return Cost(seconds, cpu_s, max(0.0, busy_s() - began_busy - cpu_s) / (time.perf_counter() - began))


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
    ram = TierConfig("ram", 2 * mib * MIB)
    disk = TierConfig("disk", 2 * mib * MIB, str(folder / "tier"), medium="nvme")
    await measure(direct_reader(store), refs)  # connections and page cache
    for turn in range(rounds):
        random.Random(turn).shuffle(refs)
        ways = [None, CacheConfig((ram,)), CacheConfig((disk,))]
        for config in ways[turn % 3 :] + ways[: turn % 3]:
            if config is None:
                costs.setdefault("direct", []).append(await measure(direct_reader(store), refs))
                continue
            engine = Engine(config, open_store=lambda _: store)
            await engine.start()
            await engine.scanned()
            name = config.tiers[0].name
            costs.setdefault(f"{name}, cold", []).append(await measure(cached_reader(engine), refs, engine.settle))
            costs.setdefault(f"{name}, warm", []).append(await measure(cached_reader(engine), refs))
            await engine.close()
            shutil.rmtree(folder / "tier", ignore_errors=True)
    print(f"\n{origin}: {mib} MiB, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"{'':<12} {'MiB/s':>22} {'ratio to direct':>24} {'CPU s/GiB':>20} {'others, cores':>16}")
    for name, measured in costs.items():
        rates = [mib / cost.seconds for cost in measured]
        ratios = [direct.seconds / cost.seconds for cost, direct in zip(measured, costs["direct"], strict=True)]
        cpus = [1024 / mib * cost.cpu_s for cost in measured]
        others = [cost.others for cost in measured]
        print(
            f"{name:<12} {_spread(rates, '.0f'):>22} {_spread(ratios, '.2f'):>24} {_spread(cpus, '.2f'):>20} "
            f"{_spread(others, '.1f'):>16}"
        )


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
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


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
    options = parser.parse_args()
    with _temporary(options.folder) as folder:
        prefix = f"{folder}/origin/".lstrip("/")
        asyncio.run(compare("files", open_store("file:///"), prefix, folder, options.mib, options.rounds))
        linked = cast("Store", LinkedStore(open_store("file:///"), mib_s=LINK_MIB_S, latency_s=LATENCY_S))
        asyncio.run(compare("a link", linked, prefix, folder, options.mib, options.rounds))
        with SeaweedServer() as server:
            store = open_store(server.create_bucket("engine"), **server.options())
            asyncio.run(compare("S3", store, "", folder, options.mib, options.rounds))
            far = DelayedStore(store, lambda _: LATENCY_S)
            asyncio.run(compare("S3 behind 30 ms", far, "", folder, options.mib, options.rounds))
        if options.files:
            asyncio.run(start_up(folder, options.files))


if __name__ == "__main__":
    main()
