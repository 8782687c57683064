"""What `dataflow demo` does, step by step, and the facts that it ends with.

digits -> PNG folder -> convert -> shards at the origin -> tiered cache -> DataLoader -> 2 ranks
                                                                         killed, resumed on 1 rank: same batches?
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from cache.address import answers
from cache.config import CacheConfig, TierConfig
from connectors.errors import DataError
from dataflow.dataset import open_dataset
from dataflow.demo.digits import write_digits
from dataflow.demo.job import Job

__all__ = ["EpochTraffic", "Facts", "Origin", "run_demo"]

Origin = Literal["local", "s3"]

BLOCK_BYTES = 72 << 10  # just over what a cache server sends inline, so that descriptors are handed over
_SIZES = ("--block-size", f"{BLOCK_BYTES}B", "--shard-size", f"{1 << 20}B")
GLOBAL_BATCH = 64
WINDOW_BLOCKS = 2
_COMMAND = (sys.executable, "-P", "-m", "dataflow")
_START_TIMEOUT_S = 30
_STOP_TIMEOUT_S = 30
_LAUNCH_TIMEOUT_S = 600


@dataclass(frozen=True, slots=True)
class EpochTraffic:
    """What one epoch took from where.

    Attributes:
        origin_requests: Requests to the origin; one may carry several adjacent blocks.
        origin_blocks: Blocks fetched from the origin.
        origin_bytes: Bytes from the origin.
        hits: Blocks served, by tier name (the ring included).
    """

    origin_requests: int
    origin_blocks: int
    origin_bytes: int
    hits: dict[str, int]


@dataclass(frozen=True, slots=True)
class Facts:
    """What the demo found out.

    Attributes:
        accuracy: Share of the test images that the trained model names rightly.
        samples_per_s: Training samples per second over all ranks.
        seconds: Seconds of rank 0 by stage.
        samples: Length of the training set.
        dataset_bytes: Size of the training set's blocks.
        blocks: Number of blocks of the training set.
        blocks_outside: Blocks that the tiers did not keep.
        ring_blocks: Blocks that the ring can carry from one epoch into the next, or lose before their last reader.
        epochs: Traffic of each epoch of the undisturbed run.
        killed_at: Steps done when the second run was killed.
        resumed_at: Step of the checkpoint that the third run went on from.
        compared_steps: Global batches compared between the undisturbed and the resumed run.
        same_sequence: Whether all of them held the same images and labels in the same order.
    """

    accuracy: float
    samples_per_s: float
    seconds: dict[str, float]
    samples: int
    dataset_bytes: int
    blocks: int
    blocks_outside: int
    ring_blocks: int
    epochs: list[EpochTraffic]
    killed_at: int
    resumed_at: int
    compared_steps: int
    same_sequence: bool


def run_demo(folder: Path, *, origin: Origin, epochs: int, say: Callable[[str], None]) -> Facts:
    """Run the whole road below `folder` (which must be empty) and return what happened.

    Args:
        folder: Where images, shards, cache, checkpoints and traces go.
        origin: `local` keeps the shards in a folder; `s3` starts a real S3 server and a cache daemon.
        epochs: Passes over the training set.
        say: Receives one line before each step.
    """
    say("Writing 1,797 handwritten digits as PNG files in class folders")
    write_digits(folder / "images")
    with _origin(origin, folder, say) as (root, cache):
        for part in ("train", "test"):
            say(f"dataflow convert images/{part} {root}/{part}")
            _dataflow("convert", f"{folder}/images/{part}", f"{root}/{part}", *_SIZES)
        return _train(folder, root, cache, epochs=epochs, say=say)


def _dataflow(*arguments: str) -> None:
    """Run the command as a user would; it shows its own progress."""
    code = subprocess.run([*_COMMAND, *arguments], timeout=_LAUNCH_TIMEOUT_S, check=False).returncode
    if code:
        raise DataError(f"dataflow {' '.join(arguments)} ended with exit code {code}")


def _tiers(folder: Path) -> CacheConfig:
    """Room for about half of the training set, in memory and on disk, so that something has to stay outside."""
    return CacheConfig(
        tiers=(
            TierConfig("ram", capacity_bytes=900 << 10),
            TierConfig("disk", capacity_bytes=900 << 10, path=str(folder / "cache"), medium="nvme"),
        ),
        ring_bytes=8 * BLOCK_BYTES,
    )


@contextlib.contextmanager
def _origin(origin: Origin, folder: Path, say: Callable[[str], None]) -> Iterator[tuple[str, str | None]]:
    """Yield the origin's URL and the address of the cache daemon (None: embedded)."""
    if origin == "local":
        yield str(folder / "origin"), None
        return
    from connectors.testing.seaweed import SeaweedServer

    say("Starting a real S3 server (SeaweedFS) on loopback")
    with SeaweedServer() as server:
        os.environ.update(server.environment())
        server.create_bucket("digits")
        say("Starting the cache daemon: dataflow cache serve")
        with _daemon(folder) as address:
            yield "s3://digits", address


@contextlib.contextmanager
def _daemon(folder: Path) -> Iterator[str]:
    config, address = folder / "cache.toml", str(folder / "cache.sock")
    config.write_text(_toml(_tiers(folder)))
    command = [*_COMMAND, "cache", "serve", "--config", str(config), "--socket", address]
    with (folder / "daemon.log").open("w") as log:
        daemon = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            deadline_s = time.monotonic() + _START_TIMEOUT_S
            while not answers(address):
                if daemon.poll() is not None or time.monotonic() > deadline_s:
                    raise DataError(f"the cache daemon did not start; see {folder / 'daemon.log'}")
                time.sleep(0.05)
            yield address
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(timeout=_STOP_TIMEOUT_S)


def _toml(config: CacheConfig) -> str:
    """Write the configuration as an operator would."""
    lines = [f"ring_bytes = {config.ring_bytes}"]
    for tier in config.tiers:
        lines += ["", "[[tiers]]", f'name = "{tier.name}"', f"capacity_bytes = {tier.capacity_bytes}"]
        if tier.path is not None:
            lines += [f"path = {json.dumps(tier.path)}", f'medium = "{tier.medium}"']
    return "\n".join(lines) + "\n"


def _train(folder: Path, root: str, cache: str | None, *, epochs: int, say: Callable[[str], None]) -> Facts:
    train_url = f"{root}/train"
    dataset = open_dataset(train_url, cache=cache)
    index = dataset.index
    dataset.reader.close()
    steps = epochs * -(-index.num_samples // GLOBAL_BATCH)
    job = Job(
        name="undisturbed",
        train_url=train_url,
        test_url=f"{root}/test",
        cache=cache,
        tiers=_tiers(folder).to_json(),
        folder=str(folder),
        epochs=epochs,
        global_batch_size=GLOBAL_BATCH,
        window_blocks=WINDOW_BLOCKS,
        buffer_bytes=2 * WINDOW_BLOCKS * BLOCK_BYTES,
        num_workers=2,
        checkpoint_every=5,
    )
    say(f"Training {epochs} epochs on 2 ranks with 2 workers each, undisturbed")
    _launch(job, ranks=2)
    result = json.loads((folder / "undisturbed.json").read_text())

    killed_at = steps // 2 + 3
    say(f"Training again; rank 1 is killed (SIGKILL) after step {killed_at}")
    _launch(msgspec.structs.replace(job, name="killed", die_at_step=killed_at), ranks=2, survives=False)
    say("Resuming from the newest checkpoint on 1 rank with 3 workers")
    _launch(msgspec.structs.replace(job, name="resumed", num_workers=3, resume=True), ranks=1)
    resumed = _global_batches(folder, "resumed", ranks=1)
    expected = _global_batches(folder, "undisturbed", ranks=2)
    before = _global_batches(folder, "killed", ranks=2)
    resumed_at = min(resumed)
    joined = {step: before[step] for step in range(resumed_at)} | resumed

    kept = sum(tier["blocks"] for tier in result["cache"][-1]["tiers"])
    return Facts(
        accuracy=result["accuracy"],
        samples_per_s=result["samples"] / result["seconds"],
        seconds=result["loader"]["seconds"],
        samples=index.num_samples,
        dataset_bytes=int(index.blocks.length.sum()),
        blocks=len(index.blocks.length),
        blocks_outside=len(index.blocks.length) - kept,
        ring_blocks=_tiers(folder).ring_bytes // BLOCK_BYTES,
        epochs=[_traffic(before, after) for before, after in itertools.pairwise(result["cache"])],
        killed_at=killed_at,
        resumed_at=resumed_at,
        compared_steps=len(expected),
        same_sequence=joined == expected,
    )


def _launch(job: Job, *, ranks: int, survives: bool = True) -> None:
    """Start the job under torchrun and wait. What it prints goes to `NAME.log`."""
    folder = Path(job.folder)
    path = folder / f"{job.name}.job.json"
    path.write_bytes(msgspec.json.encode(job))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "dataflow.demo.training", str(path)]
    # The safe path keeps a checkout in the working directory from shadowing the installed packages.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    with (folder / f"{job.name}.log").open("w") as log:
        code = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, timeout=_LAUNCH_TIMEOUT_S, check=False
        ).returncode
    if (code == 0) != survives:
        raise DataError(
            f"the {job.name} run ended with exit code {code}; its output is in {folder / (job.name + '.log')}"
        )


def _global_batches(folder: Path, name: str, *, ranks: int) -> dict[int, list[Any]]:
    """Join the traces of all ranks: step -> what the job saw in it, in rank order. A step that a rank missed is out."""
    parts: list[dict[int, list[Any]]] = []
    for rank in range(ranks):
        lines = (folder / f"{name}-rank-{rank}.jsonl").read_text().splitlines()
        parts.append({line["step"]: line["seen"] for line in map(json.loads, lines)})
    steps = set.intersection(*(set(part) for part in parts))
    return {step: [seen for part in parts for seen in part[step]] for step in sorted(steps)}


def _traffic(before: dict[str, Any], after: dict[str, Any]) -> EpochTraffic:
    tiers = zip([*before["tiers"], before["ring"]], [*after["tiers"], after["ring"]], strict=True)
    hits = {new["name"]: new["hits"] - old["hits"] for old, new in tiers}
    return EpochTraffic(
        origin_requests=after["origin"]["requests"] - before["origin"]["requests"],
        origin_blocks=after["origin"]["blocks"] - before["origin"]["blocks"],
        origin_bytes=after["origin"]["bytes"] - before["origin"]["bytes"],
        hits=hits,
    )
