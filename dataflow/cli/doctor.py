"""`dataflow doctor`: what this installation is, and what to do about what is wrong with it."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import click

from cache.address import ENVIRONMENT, daemon_addresses
from cache.connection import Connection, ServerGoneError
from connectors.errors import DataError, ErrorKind

__all__ = ["Finding", "doctor", "examine"]

Level = Literal["fine", "note", "wrong"]

_DISTRIBUTIONS = ("tiered-dataflow", "numpy", "pyarrow", "obstore", "crc32c", "msgspec", "pillow")
_PACKAGES = ("connectors", "cache", "dataflow")

# Docker's default. torch hands batches between processes through /dev/shm and dies of SIGBUS when it is full.
_SMALL_SHM_BYTES = 64 << 20
# A block in memory is a descriptor: with blocks of 4 MiB this many hold a RAM tier of 16 GiB.
_FEW_DESCRIPTORS = 4096

# torch is imported in a process of its own: the packages above dataflow.loaders never load it, and a torch that
# crashes while it is loaded is then a finding too.
_ASK_TORCH = """
import json, torch
if not hasattr(torch, "accelerator"):  # before torch 2.6
    kind, count = "cuda", torch.cuda.device_count()
elif torch.accelerator.is_available():
    kind, count = torch.accelerator.current_accelerator().type, torch.accelerator.device_count()
else:
    kind, count = "cpu", 0
print(json.dumps([torch.__version__, [f"{kind}:{i}" for i in range(count)]]))
"""
_TORCH_TIMEOUT_S = 120
# glibc's loader lists its settings; other processors and C libraries have neither file nor line.
_LINKER = Path("/lib64/ld-linux-x86-64.so.2")
_COPIES_PAST_CACHE = "glibc.cpu.x86_non_temporal_threshold"
# Samples of a megabyte or so are the largest that are common.
_LATE_BYTES = 1 << 20
_DAEMON_TIMEOUT_S = 5


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: What was looked at.
        found: What it is.
        level: `fine`, `note` (something will be slower or smaller than it could be) or `wrong` (something will fail).
        advice: What to do; empty when all is fine.
    """

    subject: str
    found: str
    level: Level = "fine"
    advice: str = ""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.pass_context
def doctor(ctx: click.Context, *, as_json: bool) -> None:
    """Say what this installation is, and what to do about what is wrong with it.

    The exit code is 1 when something is wrong.
    """
    findings = list(examine())
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            click.echo(_line(finding))
    ctx.exit(int(any(finding.level == "wrong" for finding in findings)))


def examine() -> Iterator[Finding]:
    """Look at everything, the cheapest first."""
    yield Finding("python", f"{platform.python_version()} at {sys.executable}")
    yield _kernel()
    yield from _versions()
    yield from _places()
    yield _descriptors(*resource.getrlimit(resource.RLIMIT_NOFILE))
    yield _shared_memory(Path("/dev/shm"))  # noqa: S108 - this very file system is what torch uses
    yield from _large_copies(_LINKER)
    yield from _optional()
    yield _daemon(daemon_addresses())
    yield _torch()


def _line(finding: Finding) -> str:
    mark = {"fine": "ok   ", "note": "note ", "wrong": "WRONG"}[finding.level]
    advice = f"\n{'':28}{finding.advice}" if finding.advice else ""
    return f"{mark} {finding.subject:<21} {finding.found}{advice}"


def _kernel() -> Finding:
    found = f"{platform.system()} {platform.release()} ({platform.machine()})"
    if not hasattr(os, "memfd_create"):
        return Finding(
            "kernel", found, "wrong", "Dataflow needs Linux: the cache hands memory files between processes."
        )
    return Finding("kernel", found)


def _versions() -> Iterator[Finding]:
    for name in _DISTRIBUTIONS:
        try:
            yield Finding(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding(name, "not installed", "wrong", "Install Dataflow again: pip install tiered-dataflow")


def _places() -> Iterator[Finding]:
    """Where the three packages come from, and whether a file of the user takes the place of one."""
    home = Path(__file__).parents[2]
    for name in _PACKAGES:
        spec = find_spec(name)
        place = Path(spec.origin) if spec and spec.origin else None
        if place is None or place.parents[1] != home:
            advice = f"It belongs to {home}. Rename that file, or move the script away from it."
            yield Finding(f"package {name}", str(place), "wrong", advice)
            continue
        rivals = [path for path in (Path.cwd() / f"{name}.py", Path.cwd() / name / "__init__.py") if path.exists()]
        if rivals and Path.cwd() != home:
            advice = (
                f"{rivals[0]} takes its place for scripts in this folder: rename it, or run scripts from elsewhere."
            )
            yield Finding(f"package {name}", str(place.parent), "note", advice)
        else:
            yield Finding(f"package {name}", str(place.parent))


def _descriptors(soft: int, hard: int) -> Finding:
    found = f"{soft} open files, {hard} at most"
    if hard != resource.RLIM_INFINITY and hard < _FEW_DESCRIPTORS:
        advice = (
            f"A RAM tier holds one open file a block. Raise the hard limit to {_FEW_DESCRIPTORS} or more (ulimit -Hn)."
        )
        return Finding("RLIMIT_NOFILE", found, "note", advice)
    return Finding("RLIMIT_NOFILE", found)


def _shared_memory(path: Path) -> Finding:
    try:
        size_bytes, _, free_bytes = shutil.disk_usage(path)
    except OSError as error:
        advice = "torch's worker processes need it: mount a tmpfs there (docker run --shm-size=1g)."
        return Finding(str(path), str(error), "wrong", advice)
    found = f"{size_bytes >> 20} MiB, {free_bytes >> 20} MiB free"
    if size_bytes <= _SMALL_SHM_BYTES:
        advice = "Worker processes of torch may die of a bus error: make it larger (docker run --shm-size=1g)."
        return Finding(str(path), found, "note", advice)
    return Finding(str(path), found)


def _large_copies(linker: Path) -> Iterator[Finding]:
    """From which size on memory is copied without reading its destination into the processor's cache first."""
    try:
        listed = subprocess.run([linker, "--list-tunables"], capture_output=True, text=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return
    values = dict(line.split(": ", 1) for line in listed.stdout.splitlines() if ": " in line)
    if _COPIES_PAST_CACHE not in values:
        return
    size_bytes = int(values[_COPIES_PAST_CACHE].split()[0], 16)
    found = f"past the processor's cache from {size_bytes >> 10:,} KiB on"
    if size_bytes <= _LATE_BYTES:
        yield Finding("large copies", found)
        return
    advice = f"Samples of 256 KiB and more may be batched faster with GLIBC_TUNABLES={_COPIES_PAST_CACHE}=262144"
    yield Finding("large copies", found, "note", advice)


def _optional() -> Iterator[Finding]:
    if find_spec("uvloop"):
        yield Finding("uvloop", metadata.version("uvloop"))
    else:
        yield Finding(
            "uvloop", "not installed", "note", "The cache is faster with it: pip install 'tiered-dataflow[fast]'"
        )
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    yield Finding("seaweed S3 server", weed or "not installed (only `dataflow demo --origin s3` and tests use it)")


def _daemon(addresses: Sequence[str]) -> Finding:
    subject = "cache daemon"
    for address in addresses:
        try:
            Connection(address, timeout_s=_DAEMON_TIMEOUT_S).close()
        except ServerGoneError as error:
            if error.kind is ErrorKind.TIMEOUT:
                return Finding(subject, str(error), "wrong", "Stop that process and start the daemon again.")
            if error.kind is not ErrorKind.UNREACHABLE:
                return Finding(subject, str(error), "note", "Programs go on without it; end some that are connected.")
        except DataError as error:
            return Finding(subject, str(error), "wrong", f"Set {ENVIRONMENT} to the address of a daemon of yours.")
        else:
            return Finding(subject, f"answers at {address}")
    if ENVIRONMENT in os.environ:
        advice = f"Start it there (dataflow cache serve --socket ADDRESS), or unset {ENVIRONMENT}."
        return Finding(subject, f"nobody answers at {addresses[0]}", "wrong", advice)
    return Finding(subject, "none; a program that reads remote data starts a private cache")


def _torch() -> Finding:
    if find_spec("torch") is None:
        return Finding("torch", "not installed", "note", "The loader needs it: pip install 'tiered-dataflow[torch]'")
    try:
        asked = subprocess.run(
            [sys.executable, "-P", "-c", _ASK_TORCH],
            capture_output=True,
            text=True,
            check=True,
            timeout=_TORCH_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return Finding(
            "torch", f"not loaded after {_TORCH_TIMEOUT_S} s", "wrong", "A driver may hang: try `import torch`."
        )
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
        return Finding("torch", reason, "wrong", "torch cannot be imported: install it again.")
    version, devices = json.loads(asked.stdout.splitlines()[-1])
    return Finding("torch", f"{version}, devices: {', '.join(devices) or 'cpu only'}")
