"""The workloads of loader.py: what they are, and their data in plain files that any loader can read."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

BATCH_SIZES = {"tokens": 32, "records": 256, "pixels": 64, "jpeg bytes": 64, "jpeg decode": 64, "volume crops": 4}
# How often an epoch has each stored sample, where few are stored: an epoch of 32 batches would measure its beginning.
REPEATS = {"pixels": 32}
TOKENS = 2048
SIZE = 224
VOLUME, BOX = (256, 256, 256), (128, 128, 128)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Scale:
    """How many samples there are of each kind; all of it is 1 GiB of tokens, 2 million records, 2,048 decoded images,
    4,096 photographs and 32 volumes of 64 MiB.
    """

    tokens: int
    records: int
    pixels: int
    images: int
    volumes: int

    @classmethod
    def of(cls, fraction: float) -> Scale:
        counts = {"tokens": 1 << 18, "records": 2_000_000, "pixels": 2048, "images": 4096}
        scaled = {name: max(256, int(number * fraction)) for name, number in counts.items()}
        return cls(**scaled, volumes=max(8, int(32 * fraction)))


def prepare(folder: Path, scale: Scale, workloads: Iterable[str], *, photographs: int | None = None) -> None:
    """Write the plain files of some workloads, unless they are there; of so many photographs, which then repeat."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(map(file_of, workloads)):
        if not (folder / f"{name}.npy").exists():
            _write(name, folder, scale, photographs or scale.images)


def _write(name: str, folder: Path, scale: Scale, photographs: int) -> None:
    rng = np.random.default_rng(0)
    if name == "tokens":
        np.save(folder / "tokens.npy", rng.integers(0, 50_000, (scale.tokens, TOKENS), dtype=np.uint16))
    elif name == "records":
        np.save(folder / "labels.npy", rng.integers(0, 1000, scale.records))
        np.save(folder / "records.npy", rng.random((scale.records, 16), dtype=np.float32))
    elif name == "pixels":
        np.save(folder / "pixels.npy", rng.random((scale.pixels, 3, SIZE, SIZE), dtype=np.float32))
    elif name == "volumes":
        shape = (scale.volumes, *VOLUME)
        volumes = np.lib.format.open_memmap(folder / "volumes.npy", "w+", np.dtype(np.float32), shape)
        for volume in volumes:
            rng.random(out=volume, dtype=np.float32)
    else:
        distinct = [photograph(number) for number in range(min(photographs, scale.images))]
        files = [distinct[number % len(distinct)] for number in range(scale.images)]
        np.save(folder / "offsets.npy", np.cumsum([0, *map(len, files)]))
        np.save(folder / "images.npy", np.frombuffer(b"".join(files), np.uint8))


def file_of(workload: str) -> str:
    """The name of the plain file that a workload needs, without its ending."""
    return {"jpeg bytes": "images", "jpeg decode": "images", "volume crops": "volumes"}.get(workload, workload)


@cache
def _pictures() -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def photograph(number: int) -> bytes:
    """A part of one of scikit-learn's two photographs, 500 x 375, some 100 KB, as in ImageNet."""
    rng = np.random.default_rng(number)
    width = int(rng.integers(420, 640))
    height = width * 2 // 3
    left, top = int(rng.integers(0, 641 - width)), int(rng.integers(0, 428 - height))
    picture = _pictures()[number % 2].crop((left, top, left + width, top + height))
    file = io.BytesIO()
    picture.resize((500, 375), Image.Resampling.BICUBIC).save(
        file, "JPEG", quality=97 - number % 3, subsampling="4:2:0"
    )
    return file.getvalue()


class Source:
    """Samples by number, from the plain files. `read` gives what is stored, `[number]` what a model takes.

    Each process maps the files itself.
    """

    def __init__(self, workload: str, folder: Path) -> None:
        self.workload = workload
        self.folder = folder
        self._name = file_of(workload)
        self._maps: dict[str, np.ndarray] = {}
        self._stored = len(self._map("offsets")) - 1 if self._name == "images" else len(self._map(self._name))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def __len__(self) -> int:
        return self._stored * REPEATS.get(self.workload, 1)

    def _map(self, name: str) -> np.ndarray:
        if name not in self._maps:
            self._maps[name] = np.load(self.folder / f"{name}.npy", mmap_mode="c").view(np.ndarray)
        return self._maps[name]

    def read(self, number: int) -> dict[str, Any]:
        if self.workload in ("tokens", "pixels", "volume crops"):
            return {self._name: self._map(self._name)[number % self._stored]}
        if self.workload == "records":
            return {"values": self._map("records")[number], "label": int(self._map("labels")[number])}
        offsets = self._map("offsets")
        return {"image": self._map("images")[offsets[number] : offsets[number + 1]].tobytes()}

    def __getitem__(self, number: int) -> Any:
        return finish(self.workload, self.read(number))


def finish(workload: str, sample: dict[str, Any]) -> Any:
    """From what is stored to what a model takes; the same function for every loader that works sample by sample."""
    if workload == "tokens":
        return torch.from_numpy(np.asarray(sample["tokens"]).astype(np.int64))
    if workload == "pixels":
        return torch.from_numpy(np.asarray(sample["pixels"]))
    if workload == "records":
        return torch.from_numpy(np.asarray(sample["values"])), int(sample["label"])
    if workload == "volume crops":
        first = [int(_rng.integers(whole - size + 1)) for whole, size in zip(VOLUME, BOX, strict=True)]
        box = tuple(slice(at, at + size) for at, size in zip(first, BOX, strict=True))
        return torch.from_numpy(np.asarray(sample["volumes"])[box])
    return sample["image"] if workload == "jpeg bytes" else decode(sample["image"])


_rng = np.random.default_rng(0)


def decode(file: bytes) -> torch.Tensor:
    """Decode all of it, by simplejpeg where it is installed, then crop, resize, flip and normalise."""
    from dataflow.transforms import RandomResizedCrop

    pixels = decode_whole(file)
    left, top, width, height = RandomResizedCrop(SIZE).choose(pixels.shape[1], pixels.shape[0], _rng)
    planes = torch.from_numpy(pixels[top : top + height, left : left + width]).permute(2, 0, 1)[None]
    planes = torch.nn.functional.interpolate(planes, (SIZE, SIZE), mode="bilinear", antialias=True)[0]
    if _rng.random() < 0.5:
        planes = planes.flip(2)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return planes.float().div_(255).sub_(mean).div_(std)


def decode_whole(file: bytes) -> np.ndarray:
    try:
        import simplejpeg
    except ImportError:
        return np.array(Image.open(io.BytesIO(file)))
    return simplejpeg.decode_jpeg(file)


def collate(workload: str, samples: list[Any]) -> Any:
    """torch's default, but for files, of which a list is made."""
    return samples if workload == "jpeg bytes" else torch.utils.data.default_collate(samples)
