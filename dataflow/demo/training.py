"""One rank of the demo's training job: `python -m torch.distributed.run ... -m dataflow.demo.training JOB.json`.

Everything that a user's own script would hold stands here: a dataset, a sampler, a loader, a model, checkpoints.
Beside training, each rank writes down what it was given (`NAME-rank-R.jsonl`), so that two runs can be compared.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import zlib
from pathlib import Path
from typing import Any, TextIO

import msgspec
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from cache.config import CacheConfig
from dataflow import DataLoader, ElasticBatchSampler, open_dataset
from dataflow.demo.job import Job

__all__ = ["main"]


class Classifier(nn.Module):
    """Two convolutions on 16 x 16 means of the pixels, and one layer that decides."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.AdaptiveAvgPool2d(16),
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(512, 10)),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return class scores, float32 (N, 10), for uint8 images (N, H, W)."""
        scores: torch.Tensor = self.layers(images.unsqueeze(1).float() / 255 - 0.5)
        return scores


class Trainer:
    """The training loop of one rank."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.folder = Path(job.folder)
        torch.manual_seed(0)
        self.model = DistributedDataParallel(Classifier())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        cache = job.cache if job.cache is not None else CacheConfig.from_json(job.tiers)
        self.dataset = open_dataset(job.train_url, cache=cache, buffer_bytes=job.buffer_bytes)
        sampler = ElasticBatchSampler(
            self.dataset, job.global_batch_size, seed=7, shuffle="block", window_blocks=job.window_blocks
        )
        self.loader: DataLoader[Any] = DataLoader(
            self.dataset,
            batch_sampler=sampler,
            num_workers=job.num_workers,
            persistent_workers=job.num_workers > 0,
        )
        self.steps_per_epoch = len(sampler)
        self.step = 0
        self.cache_stats: list[dict[str, Any]] = []

    def run(self) -> None:
        """Train to the last epoch, then write `NAME.json` on rank 0."""
        if self.job.resume:
            self._load()
        self._note_cache()
        began_s, first_step = time.perf_counter(), self.step
        with (self.folder / f"{self.job.name}-rank-{self.rank}.jsonl").open("a") as trace:
            while self.step < self.job.epochs * self.steps_per_epoch:
                self._run_epoch(trace)
        seconds = time.perf_counter() - began_s
        if self.rank == 0:
            samples = (self.step - first_step) * len(self.dataset) // self.steps_per_epoch
            result = {
                "accuracy": self._accuracy(),
                "seconds": seconds,
                "samples": samples,
                "world_size": self.world_size,
                "num_workers": self.job.num_workers,
                "loader": self.loader.stats().as_dict(),
                "cache": self.cache_stats,
            }
            (self.folder / f"{self.job.name}.json").write_text(json.dumps(result))

    def _run_epoch(self, trace: TextIO) -> None:
        for batch in self.loader:
            self._learn(batch)
            pairs = zip(batch["image"].numpy(), batch["label"].tolist(), strict=True)
            seen = [[zlib.crc32(pixels.tobytes()), label] for pixels, label in pairs]
            trace.write(json.dumps({"step": self.step, "seen": seen}) + "\n")
            trace.flush()
            self.step += 1
            if self.step % self.job.checkpoint_every == 0:
                self._save()
            if self.rank == 1 and self.step == self.job.die_at_step:
                os.kill(os.getpid(), signal.SIGKILL)
        self._note_cache()

    def _note_cache(self) -> None:
        """Read the cache's numbers at a moment when no rank reads blocks."""
        dist.barrier()
        self.cache_stats.append(self.dataset.reader.stats())
        dist.barrier()

    def _learn(self, batch: dict[str, torch.Tensor]) -> None:
        """One step. The loss is a mean over the global batch: any split among ranks gives the same gradient."""
        begin = self.step % self.steps_per_epoch * self.job.global_batch_size
        in_batch = min(self.job.global_batch_size, len(self.dataset) - begin)
        loss = functional.cross_entropy(self.model(batch["image"]), batch["label"], reduction="sum")
        self.optimizer.zero_grad()
        (loss * self.world_size / in_batch).backward()
        self.optimizer.step()

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def _save(self) -> None:
        if self.rank == 0:
            state = {
                "step": self.step,
                "loader": self.loader.state_dict(),
                "model": self.model.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
            part = self._checkpoint.with_suffix(".part")
            torch.save(state, part)
            part.replace(self._checkpoint)

    def _load(self) -> None:
        state = torch.load(self._checkpoint, weights_only=True)
        self.step = state["step"]
        self.loader.load_state_dict(state["loader"])
        self.model.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _accuracy(self) -> float:
        """Share of the test set that the model names rightly; the test set is read in place or as its URL says."""
        right = total = 0
        dataset = open_dataset(self.job.test_url)
        with torch.no_grad():
            loader: DataLoader[Any] = DataLoader(dataset, batch_size=128)
            for batch in loader:
                right += int((self.model.module(batch["image"]).argmax(1) == batch["label"]).sum())
                total += len(batch["label"])
        return right / total


def main(path: str) -> None:
    """Run the job that the JSON file at `path` describes, as one rank among those that torchrun started."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        Trainer(msgspec.json.decode(Path(path).read_bytes(), type=Job)).run()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
