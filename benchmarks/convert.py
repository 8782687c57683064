"""How fast data sets are written, beside the writers of other libraries, from the same input, in one run.

    python benchmarks/convert.py [--rounds 5] [--scale 0.1] [--data FOLDER] [--only images tokens records]
                                 [--writers dataflow webdataset] [--patience 60] [--json FILE]

Inputs at `--scale 1`: 20,000 JPEGs of about 110 KB in class folders (500 distinct ones, whose copies differ in a
comment), 1 GiB of tokens (2,048 uint16 a sample) and 2 million records (16 float32 and a label).

Each write is a process of its own, which has imported its library before the clock starts, and rounds go through all
writers in turn. Two times are told, since libraries differ in what they wait for: until the writer returns, and until
all of it is on disk, for which what it left is synced. Ours returns when it is. CPU seconds are those of the process
and its children until the writer returns; memory is their largest sum of anonymous and shared pages, looked at every
20 ms. Figures are medians with the lowest and the highest; a ratio is the median of the ratios of the rounds. A writer
that takes longer than `--patience` seconds has that one round. Behind each table stand the limits of the machine:
reading the input and writing as many bytes, once, with system calls alone. At the end come the requests that a store
sees, which are counted.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
from convert_writers import WRITERS

DISTINCT = 500


@dataclass(frozen=True, slots=True)
class Round:
    """One write."""

    returned_s: float
    durable_s: float
    cpu_s: float
    size_bytes: int
    memory_mib: float


def prepare(folder: Path, scale: float) -> None:
    """Write the inputs, unless they are there."""
    if (folder / "label.npy").exists():
        return
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    files = [_photograph(number) for number in range(min(DISTINCT, int(20_000 * scale)))]
    for number in range(int(20_000 * scale)):
        file, comment = files[number % len(files)], b"%016d" % number
        below = folder / "images" / f"class{number % 100:03}"
        below.mkdir(exist_ok=True)
        (below / f"{number:06}.jpg").write_bytes(file[:2] + b"\xff\xfe\x00\x12" + comment + file[2:])
    np.save(folder / "tokens.npy", rng.integers(0, 50_000, (int((1 << 18) * scale), 2048), dtype=np.uint16))
    np.save(folder / "values.npy", rng.random((int(2_000_000 * scale), 16), dtype=np.float32))
    np.save(folder / "label.npy", rng.integers(0, 1000, int(2_000_000 * scale)))


def _photograph(number: int) -> bytes:
    import io

    from loader_workloads import photograph
    from PIL import Image

    file = io.BytesIO()
    picture = Image.open(io.BytesIO(photograph(number))).resize((580, 435), Image.Resampling.BICUBIC)
    picture.save(file, "JPEG", quality=96)
    return file.getvalue()


def write(workload: str, name: str, folder: Path, out: Path) -> None:
    """Be the process of one writer: get ready, wait for the end of stdin, write, and say what it took."""
    writer = WRITERS[workload][name]
    stdout = os.dup(1)
    os.dup2(2, 1)  # some libraries print
    with tempfile.TemporaryDirectory(dir=out.parent) as warm:  # imports, and whatever else happens once
        tiny = Path(warm) / "in"
        _tiny(tiny)
        target = Path(warm) / "out"
        target.mkdir()
        writer(tiny, target)
    before = _cpu_s()
    os.write(stdout, b"ready\n")
    sys.stdin.read()
    began_s = time.perf_counter()
    writer(folder, out)
    returned_s = time.perf_counter() - began_s
    cpu_s = _cpu_s() - before
    for path in out.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    durable_s = time.perf_counter() - began_s
    os.write(stdout, json.dumps([returned_s, durable_s, cpu_s]).encode() + b"\n")


def _tiny(folder: Path) -> None:
    (folder / "images" / "a").mkdir(parents=True)
    (folder / "images" / "a" / "0.jpg").write_bytes(b"\xff\xd8\xff")
    np.save(folder / "tokens.npy", np.zeros((4, 2048), np.uint16))
    np.save(folder / "values.npy", np.zeros((4, 16), np.float32))
    np.save(folder / "label.npy", np.zeros(4, np.int64))


def _cpu_s() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


class Watch:
    """The largest memory of a process and its children, looked at by a thread."""

    def __init__(self, pid: int) -> None:
        self.most_mib = 0.0
        self._root = psutil.Process(pid)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(0.02):
            self.most_mib = max(self.most_mib, sum(map(self._held_mib, self._family())))

    def _family(self) -> list[psutil.Process]:
        try:
            return [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    @staticmethod
    def _held_mib(process: psutil.Process) -> float:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            return 0.0
        return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) / 1024

    def end(self) -> float:
        self._ended.set()
        self._thread.join()
        return self.most_mib


def measure(workload: str, name: str, folder: Path, scratch: Path) -> Round | str:
    out = scratch / "out"
    out.mkdir()
    command = [sys.executable, __file__, "--write", workload, name, str(folder), str(out)]
    with (scratch / "errors").open("w+") as errors:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdin is not None
        assert process.stdout is not None
        with process.stdout:
            line, memory_mib = process.stdout.readline(), 0.0
            if line:
                watch = Watch(process.pid)
                process.stdin.close()  # go
                line = process.stdout.readline()
                memory_mib = watch.end()
        process.wait()
        size_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        shutil.rmtree(out)
        if not line:
            errors.seek(0)
            return (errors.read().strip().splitlines() or ["it ended without a word"])[-1][:90]
    returned_s, durable_s, cpu_s = json.loads(line)
    return Round(returned_s, durable_s, cpu_s, size_bytes, memory_mib)


def spread(values: Iterable[float], form: str = ".2f") -> str:
    values = list(values)
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def contest(workload: str, names: list[str], folder: Path, scratch: Path, rounds: int, patience_s: float) -> list[dict]:
    """Measure all writers in turn, round by round, and print their lines."""
    measured: dict[str, list[Round]] = {name: [] for name in names}
    failures: dict[str, str] = {}
    for number in range(rounds):
        for name in names:
            slow = number and (not measured[name] or measured[name][0].returned_s > patience_s)
            if name in failures or slow:
                continue
            found = measure(workload, name, folder, scratch)
            if isinstance(found, str):
                failures[name] = found
            else:
                measured[name].append(found)
            print(f"{workload}, round {number + 1}, {name}: {found}", file=sys.stderr, flush=True)
    lines = []
    smallest = min(found[0].size_bytes for found in measured.values() if found)
    base = measured.get("dataflow") or []
    for name, found in measured.items():
        if name in failures:
            print(f"| {workload} | {name} | {failures[name]} |", flush=True)
            lines.append({"workload": workload, "writer": name, "failure": failures[name]})
            continue
        times = [theirs.durable_s / ours.durable_s for theirs, ours in zip(found, base, strict=False)]
        print(
            f"| {workload} | {name} | {spread(one.durable_s for one in found)} | {spread(times) if times else '-'} "
            f"| {spread(one.returned_s for one in found)} | {spread(one.cpu_s for one in found)} "
            f"| {found[0].size_bytes / 2**20:,.1f} | {found[0].size_bytes / smallest:.3f} "
            f"| {max(one.memory_mib for one in found):,.0f} |",
            flush=True,
        )
        lines.append({"workload": workload, "writer": name, "rounds": [asdict(one) for one in found]})
    return lines


def limits(workload: str, folder: Path, scratch: Path) -> dict[str, float]:
    """What one process needs to read the input, and to write and sync as many bytes, by system calls alone."""
    paths = sorted((folder / "images").rglob("*.jpg"))
    if workload != "images":
        paths = [folder / f"{name}.npy" for name in {"tokens": ["tokens"], "records": ["values", "label"]}[workload]]
    found, buffer, size_bytes = {}, bytearray(8 << 20), 0
    began_s = time.perf_counter()
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        while done := os.readv(descriptor, [buffer]):
            size_bytes += done
        os.close(descriptor)
    found["read s"] = time.perf_counter() - began_s
    began_s = time.perf_counter()
    with (scratch / "plain").open("wb", buffering=0) as file:
        left = size_bytes
        while left > 0:
            left -= file.write(memoryview(buffer)[: min(left, len(buffer))])
        found["write s"] = time.perf_counter() - began_s
        os.fsync(file.fileno())
        found["write and sync s"] = time.perf_counter() - began_s
    (scratch / "plain").unlink()
    return found


def requests(samples: int = 10_000) -> dict[str, float]:
    """Count what a store sees per 1,000 small samples: written and read as one file each, and as native shards."""
    from dataflow.testing.requests import count_requests

    return count_requests(samples)


def main() -> None:
    """Run and print tables, in Markdown."""
    if sys.argv[1:2] == ["--write"]:
        workload, name, folder, out = sys.argv[2:]
        write(workload, name, Path(folder), Path(out))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=0.1)
    parser.add_argument("--patience", type=float, default=60.0)
    parser.add_argument("--only", nargs="*", default=list(WRITERS))
    parser.add_argument("--writers", nargs="*")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dataflow-convert-") as temporary:
        scratch = Path(temporary)
        folder = arguments.data or scratch / "data"
        prepare(folder, arguments.scale)
        load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
        print(
            f"{dt.date.today()}, {os.cpu_count()} CPUs, load {load} at the start, Python {platform.python_version()},"
        )
        print(f"scale {arguments.scale:g}\n")
        print(
            "| input | writer | on disk after s | x dataflow | returns after s | CPU s | MiB | x smallest | peak MiB |"
        )
        print("|---|---|---|---|---|---|---|---|---|", flush=True)
        report = []
        for workload in arguments.only:
            names = [name for name in WRITERS[workload] if name in (arguments.writers or WRITERS[workload])]
            report += contest(workload, names, folder, scratch, arguments.rounds, arguments.patience)
            found = limits(workload, folder, scratch)
            told = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
            print(f"| {workload} | the machine alone: {told} |", flush=True)
            report.append({"workload": workload, "limits": found})
        print("\n| requests per 1,000 samples | |\n|---|---|")
        counted = requests()
        print("\n".join(f"| {name} | {value:,.2f} |" for name, value in counted.items()))
        print(f"\nload at the end {', '.join(f'{one:.1f}' for one in os.getloadavg())}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"results": report, "requests": counted}, indent=1))


if __name__ == "__main__":
    main()
