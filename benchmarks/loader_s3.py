"""Batches from a real S3 server, cold and warm, beside streaming, litdata, webdataset and a raw client, in one run.

    python benchmarks/loader_s3.py [--rounds 3] [--fraction 1] [--only "jpeg bytes" tokens] [--loaders dataflow litdata]
                                   [--workers 2] [--latency-ms 30 --connection-mb 90] [--link-mb 200] [--data FOLDER]
                                   [--json FILE]

The server is SeaweedFS on loopback, so it takes its share of the same cores. Each loader has the samples of loader.py
in its own form there, and each measurement a process and a local cache of its own: the loader is made, the first batch
is waited for, the epoch is read to its end (cold), then two epochs more (warm; the better one). `local` is our loader
over the same files on the local disk. The raw client is obstore, which reads all of our data set in ranges and does
nothing with it, or keeps it in shared memory as a cache must; of three sizes of range the best.

A figure is the median of the rounds, with the lowest and the highest; rounds go through all loaders in turn. Cold rates
count the first batch. Requests and bytes are what our cache server counted; the peers do not tell theirs. webdataset
has no cache by default, so its later epochs are as cold as the first. A loader that gives another number of samples or
bytes than were stored is said to have failed; streaming gives some samples twice and others not, so its bytes may be
off a little. CPU seconds are those of the cold epoch, by part: the S3 server, our cache server, and the loader with its
workers. On a machine that does other things they are steadier than rates.

With `--latency-ms` and `--connection-mb`, or with `--link-mb`, the server is at a distance (`distance.py`): requests
arrive so much later, a connection carries so many MB/s, and all connections together so many. Then rates are not
limited by the server's share of the cores alone.
"""

from __future__ import annotations

import argparse
import asyncio
import compileall
import contextlib
import datetime as dt
import functools
import importlib.util
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import loader_peers
import psutil
import torch
from distance import Distance
from loader_workloads import BATCH_SIZES, Scale, Source, collate, finish, prepare

from connectors.testing.seaweed import SeaweedServer

# streaming wants torchvision for data sets that are not read here.
if importlib.util.find_spec("torchvision") is None:
    sys.modules["streaming.vision"] = types.ModuleType("streaming.vision")

_MIB = 1 << 20
_PATIENCE_S = 120
_BUCKET = "loader"
_PHOTOGRAPHS = 256
_UPLOADS_AT_ONCE = 4
_RAW_RANGES = ((_MIB, 32), (4 * _MIB, 16), (8 * _MIB, 8))
# A request costs a server about as much as a few megabytes do, so blocks are larger than by default.
_BLOCK_BYTES = 8 * _MIB
_CACHE_BYTES = 4 << 30
# How far bytes may be off where a loader fills up the parts of its workers with samples that it gave already.
_BYTES_OFF = 0.002
_RELAY = "LOADER_S3_RELAY_PID"
# The folder of each form; the peers' as loader_peers names them.
_FORMS = {"dataflow": "blocks-8m", "streaming": "mds", "litdata": "litdata", "webdataset": "webdataset"}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a loader finds its data: locally, in the bucket, and where it may keep a cache."""

    local: Path
    key: str
    scratch: Path

    @property
    def url(self) -> str:
        return f"s3://{_BUCKET}/{self.key}"


@dataclass(frozen=True, slots=True)
class Cpu:
    """CPU seconds of the S3 server, our cache server, and everything else that was started."""

    store_s: float = 0.0
    cache_s: float = 0.0
    loader_s: float = 0.0

    def since(self, before: Cpu) -> Cpu:
        return Cpu(self.store_s - before.store_s, self.cache_s - before.cache_s, self.loader_s - before.loader_s)


@dataclass(frozen=True, slots=True)
class Round:
    """One measurement."""

    first_batch_s: float
    cold_samples_per_s: float
    warm_samples_per_s: float
    cold_cpu: Cpu
    requests: int | None
    origin_bytes: int | None


def dataflow(workload: str, place: Place, num_workers: int) -> tuple[Iterable, Callable[[], dict[str, Any]]]:
    from cache import CacheConfig, TierConfig

    return ours(workload, place.url, num_workers, cache=CacheConfig((TierConfig("ram", _CACHE_BYTES),)))


def local(workload: str, place: Place, num_workers: int) -> tuple[Iterable, None]:
    return ours(workload, place.local, num_workers)[0], None


def ours(workload: str, url: str | Path, num_workers: int, **options: Any) -> tuple[Iterable, Callable[[], Any]]:
    from dataflow import DataLoader, ElasticBatchSampler

    dataset = loader_peers.open_native(workload, url, **options)
    sampler = ElasticBatchSampler(dataset, BATCH_SIZES[workload], rank=0, world_size=1)
    return DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers), dataset.reader.stats


def write_ours(workload: str, folder: Path) -> None:
    where = folder / _FORMS["dataflow"] / workload.replace(" ", "-")
    if not where.exists():
        loader_peers.write_native(workload, Source(workload, folder), where, block_size_bytes=_BLOCK_BYTES)


def streaming(workload: str, place: Place, num_workers: int) -> tuple[Iterable, None]:
    from streaming import StreamingDataset

    class Finished(StreamingDataset):
        def __getitem__(self, number: Any) -> Any:
            return finish(workload, super().__getitem__(number))

    os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
    dataset = Finished(
        remote=place.url, local=str(place.scratch), shuffle=True, batch_size=BATCH_SIZES[workload], download_timeout=60
    )
    return in_torch(dataset, workload, num_workers), None


def litdata(workload: str, place: Place, num_workers: int) -> tuple[Iterable, None]:
    import litdata as package
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS = {**(downloader._OBSTORE_CLIENT_OPTIONS or {}), "allow_http": True}  # noqa: SLF001

    class Finished(package.StreamingDataset):
        def __getitem__(self, number: Any) -> Any:
            return finish(workload, super().__getitem__(number))

    options = {
        "endpoint_url": os.environ["AWS_ENDPOINT_URL"],
        "aws_access_key_id": os.environ["AWS_ACCESS_KEY_ID"],
        "aws_secret_access_key": os.environ["AWS_SECRET_ACCESS_KEY"],
        "region_name": os.environ["AWS_REGION"],
    }
    dataset = Finished(place.url, cache_dir=str(place.scratch), shuffle=True, storage_options=options)
    loader = package.StreamingDataLoader(
        dataset,
        batch_size=BATCH_SIZES[workload],
        num_workers=num_workers,
        collate_fn=functools.partial(collate, workload),
    )
    return loader, None


def webdataset(workload: str, place: Place, num_workers: int) -> tuple[Iterable, None]:
    import obstore
    import webdataset as package
    from obstore.store import S3Store

    store = S3Store(_BUCKET, client_options={"allow_http": True})
    keys = [f"{place.key}/{path.name}" for path in sorted(place.local.glob("*.tar"))]
    shards = obstore.sign(store, "GET", keys, dt.timedelta(hours=1))

    def restore(sample: dict[str, Any]) -> Any:
        return finish(workload, {name.split(".")[0]: value for name, value in sample.items() if name[0] != "_"})

    reader = package.WebDataset(shards, shardshuffle=len(shards), empty_check=False).decode().shuffle(1000)
    return in_torch(reader.map(restore), workload, num_workers), None


def in_torch(dataset: Any, workload: str, num_workers: int) -> Iterable:
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=BATCH_SIZES[workload],
        num_workers=num_workers,
        collate_fn=functools.partial(collate, workload),
        persistent_workers=num_workers > 0,
    )


LOADERS: dict[str, Callable[..., tuple[Iterable, Callable[[], dict[str, Any]] | None]]] = {
    "dataflow": dataflow,
    "local": local,
    "streaming": streaming,
    "litdata": litdata,
    "webdataset": webdataset,
}


def size_bytes_of(batch: Any) -> int:
    if isinstance(batch, torch.Tensor):
        return batch.nbytes
    values = batch.values() if isinstance(batch, dict) else batch
    return sum(len(one) if isinstance(one, bytes) else size_bytes_of(one) for one in values)


def epoch(loader: Iterable, began_s: float, expected: tuple[int, int]) -> tuple[float, float]:
    """Read an epoch; return when its first batch came, and when it ended."""
    first_s, samples, size_bytes = 0.0, 0, 0
    for batch in loader:
        first_s = first_s or time.perf_counter() - began_s
        samples += loader_peers.batch_length(batch)
        size_bytes += size_bytes_of(batch)
    ended_s = time.perf_counter() - began_s
    if samples != expected[0] or abs(size_bytes - expected[1]) > _BYTES_OFF * expected[1]:
        raise RuntimeError(f"{samples:,} samples of {size_bytes:,} bytes came, not {expected[0]:,} of {expected[1]:,}")
    return first_s, ended_s


def measure(name: str, workload: str, place: Place, num_workers: int, expected: tuple[int, int]) -> Round:
    used, began_s = cpu(), time.perf_counter()
    loader, stats = LOADERS[name](workload, place, num_workers)
    first_s, cold_s = epoch(loader, began_s, expected)
    used = cpu().since(used)
    origin = stats()["origin"] if stats else {}
    warm_s = min(epoch(loader, time.perf_counter(), expected)[1] for _ in range(2))
    rates = expected[0] / cold_s, expected[0] / warm_s
    return Round(first_s, *rates, used, origin.get("requests"), origin.get("bytes"))


def cpu() -> Cpu:
    """What the benchmark has started has used so far: its children, among them the store, and our cache server.

    That one has left the family; it is known by the store's credentials in its environment. The relay is not counted.
    """
    benchmark, credentials = os.getppid(), os.environ["AWS_ACCESS_KEY_ID"]
    used = dict.fromkeys(("store", "cache", "loader"), 0.0)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_cache = "cache.embedded" in process.cmdline()
            is_ours = benchmark in [parent.pid for parent in process.parents()]
            is_known = is_ours or process.environ().get("AWS_ACCESS_KEY_ID") == credentials
            if is_known and str(process.pid) != os.environ.get(_RELAY):
                part = "cache" if is_cache else "store" if process.name() == "weed" else "loader"
                times = process.cpu_times()
                used[part] += times.user + times.system + times.children_user + times.children_system
    return Cpu(used["store"], used["cache"], used["loader"])


def serve(name: str, arguments: tuple[Any, ...], answer: Connection) -> None:
    """The process of one measurement; what it imports is not measured."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as in a training script
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  some loaders print
    try:
        module = {"local": "dataflow"}.get(name, name)
        __import__(module)
        if module == "dataflow":
            # All that is loaded when it is first used.
            from dataflow import DataLoader, ElasticBatchSampler, open_dataset, transforms  # noqa: F401
        answer.send(measure(name, *arguments))
    except BaseException as error:  # noqa: BLE001  whatever a peer does, the others are measured
        traceback.print_exc(file=sys.stderr)
        answer.send(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120])


def in_own_process(name: str, *arguments: Any) -> Round | str:
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    process = context.Process(target=serve, args=(name, arguments, far))
    process.start()
    far.close()
    try:
        return near.recv() if near.poll(_PATIENCE_S) else "gave no answer"
    except EOFError:
        return "died"
    finally:
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()


def raw_rate(folder: Path, key: str, keep: bool) -> float:
    """Bytes a second of a client that reads all objects in ranges; the best of some sizes.

    It throws them away, or keeps each range in new shared memory until it ends.
    """
    import obstore
    from obstore.store import S3Store

    objects = [
        (f"{key}/{path.relative_to(folder)}", path.stat().st_size) for path in folder.rglob("*") if path.is_file()
    ]

    async def read(range_bytes: int, at_once: int) -> float:
        store = S3Store(_BUCKET, client_options={"allow_http": True})
        slots = asyncio.Semaphore(at_once)
        kept: list[int] = []

        async def one(name: str, start: int, end: int) -> None:
            async with slots:
                body = await obstore.get_range_async(store, name, start=start, end=end)
                if keep:
                    kept.append(os.memfd_create("kept"))
                    await asyncio.to_thread(os.write, kept[-1], body)

        ranges = [
            (name, start, min(size, start + range_bytes))
            for name, size in objects
            for start in range(0, size, range_bytes)
        ]
        random.Random(0).shuffle(ranges)
        began_s = time.perf_counter()
        await asyncio.gather(*(one(*part) for part in ranges))
        took_s = time.perf_counter() - began_s
        for fd in kept:
            os.close(fd)
        return sum(size for _, size in objects) / took_s

    return max(asyncio.run(read(*sizes)) for sizes in _RAW_RANGES)


def raw_in_own_process(folder: Path, key: str, keep: bool) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(raw_rate, (folder, key, keep))


def store_data(workload: str, loaders: list[str], folder: Path) -> None:
    """Write each loader's form of the data, if it is not there, and put it into the bucket."""
    import obstore
    from obstore.store import S3Store

    store = S3Store(_BUCKET, client_options={"allow_http": True})
    loader_peers.STORED = sys.maxsize  # all have the same samples here
    for name in loaders:
        if name == "dataflow":
            write_ours(workload, folder)
        elif name in _FORMS:
            loader_peers.PEERS[name](workload, folder, 0)
        else:
            continue
        form = folder / _FORMS[name]
        for path in sorted((form / workload.replace(" ", "-")).rglob("*")):
            if path.is_file():
                obstore.put(store, f"{_FORMS[name]}/{path.relative_to(form)}", path, max_concurrency=_UPLOADS_AT_ONCE)


def expected_of(workload: str, folder: Path) -> tuple[int, int]:
    source = Source(workload, folder)
    batch = collate(workload, [source[number] for number in range(1)]) if workload != "jpeg bytes" else None
    if batch is None:
        return len(source), sum(len(source.read(number)["image"]) for number in range(len(source)))
    return len(source), size_bytes_of(batch) * len(source)


def spread(values: list[float], digits: int = 0) -> str:
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


def contest(workload: str, names: list[str], folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all in turn, round by round, and print their lines."""
    expected = expected_of(workload, folder)
    found: dict[str, list[Round]] = {name: [] for name in names}
    failures: dict[str, str] = {}
    raw: list[float] = []
    kept: list[float] = []
    native = folder / _FORMS["dataflow"] / workload.replace(" ", "-")
    stored_bytes = sum(path.stat().st_size for path in native.rglob("*") if path.is_file())
    for _ in range(options.rounds):
        for rates, keep in ((raw, False), (kept, True)):
            bytes_s = raw_in_own_process(native, f"{_FORMS['dataflow']}/{native.name}", keep)
            rates.append(bytes_s / stored_bytes * expected[0])
        print(f"{workload}, raw client: {raw[-1]:,.0f}, {kept[-1]:,.0f} samples/s", file=sys.stderr, flush=True)
        for name in names:
            form = _FORMS.get(name, _FORMS["dataflow"])
            with tempfile.TemporaryDirectory(prefix="dataflow-s3-", dir=folder) as scratch:
                place = Place(folder / form / native.name, f"{form}/{native.name}", Path(scratch) / "cache")
                answer = in_own_process(name, workload, place, options.workers, expected)
            print(f"{workload}, {name}: {answer}", file=sys.stderr, flush=True)
            if isinstance(answer, str):
                failures[name] = answer
            else:
                found[name].append(answer)
    share = statistics.median(one / other for one, other in zip(kept, raw, strict=True))
    print(f"| {workload} | raw client | - | {spread(raw)} | 1 | - | - | - | - |")
    print(f"| {workload} | raw client, kept | - | {spread(kept)} | {share:.2f} | - | - | - | - |", flush=True)
    for name, rounds in found.items():
        if name in failures:
            print(f"| {workload} | {name} | {failures[name]} ({len(rounds)} of {options.rounds} rounds succeeded) |")
        if not rounds:
            continue
        cold, warm = [one.cold_samples_per_s for one in rounds], [one.warm_samples_per_s for one in rounds]
        share = statistics.median(mine / theirs for mine, theirs in zip(cold, raw, strict=False))
        asked = "-" if rounds[0].requests is None else f"{statistics.median(one.requests or 0 for one in rounds):,.0f}"
        got = [(one.origin_bytes or 0) / _MIB for one in rounds]
        gib = stored_bytes / (1 << 30)
        parts = [[seconds / gib for seconds in asdict(one.cold_cpu).values()] for one in rounds]
        cpu_s = " + ".join(f"{statistics.median(part):.1f}" for part in zip(*parts, strict=True))
        cpu_s += f" = {spread([sum(one) for one in parts], 1)}"
        print(
            f"| {workload} | {name} | {spread([one.first_batch_s for one in rounds], 2)} | {spread(cold)} "
            f"| {share:.2f} | {cpu_s} | {spread(warm)} | {asked} | {statistics.median(got):,.0f} |",
            flush=True,
        )
    return [
        {"workload": workload, "raw_samples_per_s": raw, "kept_samples_per_s": kept, "failures": failures},
        *({"workload": workload, "loader": name, "rounds": [asdict(one) for one in of]} for name, of in found.items()),
    ]


@contextlib.contextmanager
def at_distance(server: SeaweedServer, options: argparse.Namespace) -> Iterator[None]:
    """Put the server at a distance for every process started meanwhile, where one is given."""
    rates = {"connection_bytes_s": options.connection_mb * 1e6, "link_bytes_s": options.link_mb * 1e6}
    if not options.latency_ms and math.isinf(options.link_mb):
        yield
        return
    port = int(server.url.rpartition(":")[2])
    with Distance(port, latency_s=options.latency_ms / 1000, **rates) as distance:
        os.environ.update({"AWS_ENDPOINT_URL": distance.url, _RELAY: str(distance.pid)})
        yield
    os.environ["AWS_ENDPOINT_URL"] = server.url


def main() -> None:
    """Run and print a table, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fraction", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--latency-ms", type=float, default=0)
    parser.add_argument("--connection-mb", type=float, default=90)
    parser.add_argument("--link-mb", type=float, default=math.inf)
    parser.add_argument("--only", nargs="*", default=["jpeg bytes", "tokens"])
    parser.add_argument("--loaders", nargs="*", default=list(LOADERS))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    # As when it is installed: a server that is started does not compile its sources first.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    for package in ("connectors", "cache", "dataflow"):
        compileall.compile_dir(importlib.util.find_spec(package).submodule_search_locations[0], quiet=1)
    report = []
    with tempfile.TemporaryDirectory(prefix="dataflow-s3-") as scratch, SeaweedServer() as server:
        folder = options.data or Path(scratch)
        os.environ.update(server.environment())
        server.create_bucket(_BUCKET)
        prepare(folder, Scale.of(options.fraction), options.only, photographs=_PHOTOGRAPHS)
        for workload in options.only:
            store_data(workload, options.loaders, folder)
        load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
        print(f"{dt.date.today()}, {os.cpu_count()} CPUs, load {load} at the start, {options.workers} workers")
        if options.latency_ms or options.link_mb < math.inf:
            rates = f"{options.connection_mb:g} MB/s a connection, {options.link_mb:g} MB/s in all"
            print(f"{options.latency_ms:g} ms away, {rates}")
        print()
        columns = (
            "first batch s | cold samples/s | of raw | CPU s/GiB: S3 + cache + loader | warm samples/s | requests | MiB"
        )
        print(f"| workload | loader | {columns} |")
        print("|---|---|---|---|---|---|---|---|---|", flush=True)
        with at_distance(server, options):
            for workload in options.only:
                report += contest(workload, options.loaders, folder, options)
        print(f"\nload at the end {', '.join(f'{one:.1f}' for one in os.getloadavg())}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
