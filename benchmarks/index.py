"""What indexes cost: how fast they are built, and what opening a very large dataset takes.

    python benchmarks/index.py build [--mib 128] [--workers 1 2] [--rounds 3]
    python benchmarks/index.py open [--samples 100000000] [--shards 100000] [--blocks 1000000 12800000] [--rounds 5]

`build` writes the same records as JSONL, TFRecord and WebDataset, and indexes each: records and bytes a second of the
files, which lie in the page cache. `open` writes the index of a dataset that is not there, native and as a sidecar, and
opens it, each time in a process of its own. That says how long `open_dataset` took (imports done), how much its memory
grew, and how long the first `locate` of 1,024 samples took. Mapped pages of the index, which all processes share, are
told apart from memory of the process's own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from connectors.folders import file_version
from dataflow import ShardWriter, open_dataset
from dataflow.convert import convert
from dataflow.formats.arrow.manifest import (
    INDEX_NAME,
    MANIFEST_NAME,
    IndexEntry,
    Manifest,
    content_digest,
    dataset_fingerprint,
    describe_fields,
    encode_schema,
)
from dataflow.formats.scan import listing_fingerprint
from dataflow.formats.sidecar import Sidecar
from dataflow.index import Blocks, Shards, encode_index
from dataflow.index.storage import SIDECAR_NAME
from dataflow.indexing import build_index

FORMATS = ("jsonl", "tfrecord", "webdataset")
SCHEMA = pa.schema([pa.field("n", pa.int64()), pa.field("text", pa.string())])


def build(mib: int, workers: list[int], rounds: int) -> None:
    """Print how fast each format is indexed."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        text = "".join(map(chr, np.random.default_rng(0).integers(97, 123, 1000)))
        with ShardWriter(f"{folder}/native", SCHEMA) as writer:
            for number in range(mib * 1024):
                writer.write({"n": number, "text": text})
        print(f"{'format':<12} {'workers':>7} {'records/s':>12} {'GB/s':>7} {'spread':>7} {'index bytes':>12}")
        for name in FORMATS:
            url = f"{folder}/{name}"
            convert(f"{folder}/native", url, to=name, shard_size_bytes=16 << 20)
            for count in workers:
                seconds = []
                for _ in range(rounds):
                    begin = time.perf_counter()
                    done = build_index(url, workers=count)
                    seconds.append(time.perf_counter() - begin)
                middle = statistics.median(seconds)
                print(
                    f"{name:<12} {count:>7} {done.num_samples / middle:>12,.0f} "
                    f"{done.scanned_bytes / middle / 1e9:>7.3f} {(max(seconds) - min(seconds)) / middle:>7.0%} "
                    f"{done.size_bytes:>12,}"
                )


def write_native(folder: Path, shards: Shards, blocks: Blocks) -> None:
    """Write index and manifest of a native dataset without its shards."""
    index = encode_index(shards, blocks)
    (folder / INDEX_NAME).write_bytes(index)
    schema = encode_schema(SCHEMA)
    entry = IndexEntry(name=INDEX_NAME, size_bytes=len(index), digest=content_digest(index))
    manifest = Manifest(
        schema=schema,
        fields=describe_fields(SCHEMA),
        num_samples=int(blocks.first_sample[-1]),
        num_blocks=len(blocks),
        num_shards=len(shards),
        size_bytes=int(shards.size_bytes.sum()),
        index=entry,
        fingerprint=dataset_fingerprint(schema, entry.digest),
        compression="none",
    )
    (folder / MANIFEST_NAME).write_bytes(manifest.to_json())


def write_sidecar(folder: Path, shards: Shards, blocks: Blocks) -> None:
    """Write a sidecar, and those of its files that opening looks at."""
    names, versions = shards.names.to_pylist(), shards.versions.to_pylist()
    for shard in {0, len(shards) // 3, 2 * len(shards) // 3, len(shards) - 1, *_probed(len(shards))}:
        path = folder / names[shard]
        with path.open("wb") as file:
            file.truncate(int(shards.size_bytes[shard]))
        versions[shard] = file_version(path.stat())
    shards = Shards(shards.names, shards.size_bytes, pa.array(versions, pa.string()))
    fingerprint = listing_fingerprint(shards, blocks, SCHEMA)
    learned = np.zeros(len(shards), np.int32)
    sidecar = Sidecar("jsonl", SCHEMA, {}, shards, blocks, [""], learned, fingerprint)
    (folder / SIDECAR_NAME).write_bytes(sidecar.encode())


def _probed(count: int) -> list[int]:
    return np.linspace(0, count - 1, 4).astype(np.int64).tolist()


def tables(num_samples: int, num_shards: int, num_blocks: int, *, checksums: bool) -> tuple[Shards, Blocks]:
    """Return the tables of a dataset of that many samples, shards and blocks, of 1 MiB each."""
    rng = np.random.default_rng(0)
    first_shard = np.linspace(0, num_blocks, num_shards + 1).astype(np.int64)
    shard = np.repeat(np.arange(num_shards, dtype=np.int32), np.diff(first_shard))
    place = np.arange(num_blocks) - first_shard[shard]
    blocks = Blocks(
        shard,
        place << 20,
        np.full(num_blocks, 1 << 20, np.int64),
        np.linspace(0, num_samples, num_blocks + 1).astype(np.int64),
        rng.integers(0, 1 << 32, num_blocks).astype(np.uint32) if checksums else None,
    )
    names = pa.array([f"shard-{number:05d}.jsonl" for number in range(num_shards)], pa.string())
    versions = pa.array([f"{number:032x}" for number in range(num_shards)], pa.string())
    return Shards(names, np.diff(first_shard) << 20, versions), blocks


def opening(num_samples: int, num_shards: int, block_counts: list[int], rounds: int) -> None:
    """Print what opening takes."""
    heads = ("index", "blocks", "MB", "open s", "spread", "own MB", "peak MB", "mapped MB", "locate ms")
    print("".join(f"{head:>12}" for head in heads))
    for num_blocks in block_counts:
        for kind, write in (("native", write_native), ("sidecar", write_sidecar)):
            with tempfile.TemporaryDirectory() as folder:
                write(Path(folder), *tables(num_samples, num_shards, num_blocks, checksums=kind == "native"))
                size = sum(path.stat().st_size for path in Path(folder).glob("*.arrow"))
                rows = [_opened(folder) for _ in range(rounds)]
            times = [row["open_s"] for row in rows]
            middle = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
            spread = (max(times) - min(times)) / middle["open_s"]
            memory = "".join(f"{middle[name] / 1e6:>12.0f}" for name in ("own", "peak", "mapped"))
            print(
                f"{kind:>12}{num_blocks:>12,}{size / 1e6:>12.0f}{middle['open_s']:>12.3f}{spread:>12.0%}{memory}"
                f"{middle['locate_ms']:>12.1f}"
            )


def _opened(url: str) -> dict[str, float]:
    command = [sys.executable, __file__, "child", url]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _memory() -> dict[str, int]:
    rows = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {row[0]: int(row[1]) << 10 for row in rows if row[0] in ("RssAnon:", "RssFile:", "VmHWM:", "VmRSS:")}


def child(url: str) -> None:
    """Open a dataset, and print what that took as JSON."""
    before = _memory()
    begin = time.perf_counter()
    dataset = open_dataset(url, cache=None)
    open_s = time.perf_counter() - begin
    after = _memory()
    numbers = np.random.default_rng(1).integers(0, len(dataset), 1024)
    begin = time.perf_counter()
    dataset.index.locate(numbers)
    locate_ms = 1000 * (time.perf_counter() - begin)
    row = {
        "open_s": open_s,
        "own": after["RssAnon:"] - before["RssAnon:"],
        "mapped": after["RssFile:"] - before["RssFile:"],
        "peak": after["VmHWM:"] - before["VmRSS:"],
        "locate_ms": locate_ms,
    }
    print(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    builds = modes.add_parser("build")
    builds.add_argument("--mib", type=int, default=128)
    builds.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    builds.add_argument("--rounds", type=int, default=3)
    opens = modes.add_parser("open")
    opens.add_argument("--samples", type=int, default=100_000_000)
    opens.add_argument("--shards", type=int, default=100_000)
    opens.add_argument("--blocks", type=int, nargs="+", default=[1_000_000, 12_800_000])
    opens.add_argument("--rounds", type=int, default=5)
    modes.add_parser("child").add_argument("url")
    options = parser.parse_args()
    if options.mode == "build":
        build(options.mib, options.workers, options.rounds)
    elif options.mode == "open":
        opening(options.samples, options.shards, options.blocks, options.rounds)
    else:
        child(options.url)


if __name__ == "__main__":
    main()
