"""What a training image costs: JPEG decode, RandomResizedCrop(224), flip and normalisation to float32, in one process.

    python benchmarks/images.py [--rounds 15] [--quality 98] [--json FILE]

Each road makes 128 photographs of 500 x 375 into float32 planes, in batches of 64. Rounds go through all roads in turn.
A figure is CPU milliseconds an image: the median of the rounds, with the lowest and the highest; `of ours` is the
median of the rounds' ratios to our road. The limits are libjpeg-turbo alone, its pixels thrown away: of whole images,
of the crops, and of their brightness alone, which is hardly more than undoing the entropy coding.

simplejpeg, OpenCV and FFCV are measured where they are installed. FFCV reads the same files from a file of its own
format, and draws its own crops, by the same rule.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from loader_workloads import MEAN, SIZE, STD, photograph
from PIL import Image

from dataflow.transforms import Draws, ImageTransform, RandomResizedCrop, Region
from dataflow.transforms.decoding import open_image
from dataflow.transforms.turbojpeg import load_library

_IMAGES, _BATCH = 128, 64
_CROP = RandomResizedCrop(SIZE)
# Of turbojpeg.h.
_DECOMPRESS, _RGB, _GREY = 1, 0, 6

Road = Callable[[], int]  # does its work once, and says for how many images


def files_of(quality: int) -> list[bytes]:
    files = []
    for number in range(_IMAGES):
        file = io.BytesIO()
        Image.open(io.BytesIO(photograph(number))).save(file, "JPEG", quality=quality, subsampling="4:2:0")
        files.append(file.getvalue())
    return files


def ours(files: list[bytes]) -> Road:
    transform = ImageTransform(_CROP, flip=0.5, mean=MEAN, std=STD)
    batch = np.empty((_BATCH, 3, SIZE, SIZE), np.float32)
    epoch = iter(range(1 << 62))

    def road() -> int:
        now = next(epoch)
        for first in range(0, len(files), _BATCH):
            draws = Draws(0, now, np.arange(first, first + _BATCH))
            transform.transform_columns({"image": files[first : first + _BATCH]}, draws, lambda *_: batch)
        return len(files)

    return road


def whole(files: list[bytes], decode: Callable[[bytes], np.ndarray]) -> Road:
    """Decode all of an image, then do as the recipes of most loaders do; samples are stacked by torch."""
    rng = np.random.default_rng(0)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]

    def one(file: bytes) -> torch.Tensor:
        pixels = decode(file)
        left, top, width, height = _CROP.choose(pixels.shape[1], pixels.shape[0], rng)
        planes = torch.from_numpy(pixels[top : top + height, left : left + width]).permute(2, 0, 1)[None]
        planes = torch.nn.functional.interpolate(planes, (SIZE, SIZE), mode="bilinear", antialias=True)[0]
        planes = planes.flip(2) if rng.random() < 0.5 else planes
        return planes.float().div_(255).sub_(mean).div_(std)

    def road() -> int:
        for first in range(0, len(files), _BATCH):
            torch.stack([one(file) for file in files[first : first + _BATCH]])
        return len(files)

    return road


def ffcv(files: list[bytes], folder: Path) -> Road:
    from ffcv.fields import RGBImageField, rgb_image
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter

    repeats = 4  # its threads start anew each epoch

    class Numbered:
        def __len__(self) -> int:
            return len(files) * repeats

        def __getitem__(self, number: int) -> tuple[np.ndarray]:
            pixels = np.array(Image.open(io.BytesIO(files[number % len(files)])))
            pixels[0, 0] = (number % len(files), 0, 0)
            return (pixels,)

    # It would encode the pixels anew.
    rgb_image.encode_jpeg = lambda pixels, _: np.frombuffer(files[pixels[0, 0, 0]], np.uint8)
    path = str(folder / "images.beton")
    DatasetWriter(path, {"image": RGBImageField(write_mode="jpg")}, num_workers=0).from_indexed_dataset(Numbered())
    steps = [
        RandomResizedCropRGBImageDecoder((SIZE, SIZE)),
        RandomHorizontalFlip(),
        NormalizeImage(np.array(MEAN) * 255, np.array(STD) * 255, np.float32),
        ToTensor(),
        ToTorchImage(convert_back_int16=False),
    ]
    loader = Loader(path, batch_size=_BATCH, num_workers=1, order=OrderOption.RANDOM, pipelines={"image": steps})
    return lambda: sum(len(batch) for (batch,) in loader)


def limits(files: list[bytes]) -> dict[str, Road]:
    library = load_library()
    if library is None:
        return {}
    handle = library.tj3Init(_DECOMPRESS)
    room = np.empty(1 << 22, np.uint8)
    regions = []
    for number, file in enumerate(files):
        image = open_image(file)
        regions.append(_CROP.choose(image.width, image.height, np.random.default_rng(number)))

    def all_of(kind: int) -> int:
        for file in files:
            raw = np.frombuffer(file, np.uint8)
            library.tj3DecompressHeader(handle, raw.ctypes.data, raw.size)
            library.tj3Decompress8(handle, raw.ctypes.data, raw.size, room.ctypes.data, 0, kind)
        return len(files)

    def crops() -> int:
        for file, region in zip(files, regions, strict=True):
            open_image(file).decode(Region(*region))
        return len(files)

    return {
        "limit: brightness only": lambda: all_of(_GREY),
        "limit: whole images": lambda: all_of(_RGB),
        "limit: crops only": crops,
    }


def roads_of(files: list[bytes], folder: Path) -> dict[str, Road]:
    def simplejpeg() -> Road:
        import simplejpeg

        return whole(files, simplejpeg.decode_jpeg)

    def opencv() -> Road:
        import cv2

        cv2.setNumThreads(0)
        return whole(files, lambda file: cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR_RGB))

    roads = {"dataflow": ours(files), **limits(files)}
    peers: dict[str, Callable[[], Road]] = {
        "simplejpeg, torch": simplejpeg,
        "OpenCV, torch": opencv,
        "Pillow, torch": lambda: whole(files, lambda file: np.array(Image.open(io.BytesIO(file)))),
        "FFCV": lambda: ffcv(files, folder),
    }
    for name, make in peers.items():
        try:
            roads[name] = make()
        except ImportError as error:
            print(f"{name} is left out: {error}")
    return roads


def cpu_ms(road: Road) -> float:
    began_s = time.process_time()
    images = road()
    return (time.process_time() - began_s) * 1e3 / images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quality", type=int, default=98, help="of the JPEG files; 98 makes them some 100 KB large")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    files = files_of(options.quality)
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="dataflow-images-") as folder:
        roads = roads_of(files, Path(folder))
        for road in roads.values():
            road()
        for _ in range(options.rounds):
            for name, road in roads.items():
                found.setdefault(name, []).append(cpu_ms(road))
    print(f"{np.mean([len(file) for file in files]) / 1000:.0f} KB a file, load {os.getloadavg()[0]:.1f}\n")
    print("| | CPU ms an image | of ours |\n|---|---|---|")
    for name, times in found.items():
        ratio = statistics.median(time / mine for time, mine in zip(times, found["dataflow"], strict=True))
        print(f"| {name} | {statistics.median(times):.2f} ({min(times):.2f}-{max(times):.2f}) | {ratio:.2f} |")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
