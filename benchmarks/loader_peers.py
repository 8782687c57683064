"""How each loader of loader.py reads the workloads: a function from (workload, folder, number of workers) to batches.

Workers are persistent: an epoch of 64 batches would measure their start. What a loader stores in a form of its own is
written at the first call, beside the plain files; of the peers' forms at most `STORED` samples, which is more than they
read in a round. A package that is not installed, or refuses, is left out of the table with the reason.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch.utils.data
from loader_workloads import BATCH_SIZES, BOX, MEAN, SIZE, STD, TOKENS, VOLUME, Source, collate, finish

STORED = 1 << 15


def torch_loader(workload: str, folder: Path, num_workers: int, kind: Any = torch.utils.data.DataLoader) -> Iterable:
    """torch's own, over the plain files."""
    return kind(
        Source(workload, folder),
        BATCH_SIZES[workload],
        shuffle=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=None if workload != "jpeg bytes" else functools.partial(collate, workload),
    )


def dataflow_loader(workload: str, folder: Path, num_workers: int) -> Iterable:
    """Ours, over the same dataset."""
    from dataflow import DataLoader

    return torch_loader(workload, folder, num_workers, DataLoader)


def dataflow_native(workload: str, folder: Path, num_workers: int, workers: Any = "process") -> Iterable:
    """Ours, over native shards."""
    from dataflow import DataLoader, ElasticBatchSampler

    where = folder / "native" / workload.replace(" ", "-")
    if not where.exists():
        write_native(workload, Source(workload, folder), where)
    dataset = open_native(workload, where)
    sampler = ElasticBatchSampler(dataset, BATCH_SIZES[workload], rank=0, world_size=1)
    return DataLoader(
        dataset, batch_sampler=sampler, num_workers=num_workers, workers=workers, persistent_workers=num_workers > 0
    )


def open_native(workload: str, where: str | Path, **options: Any) -> Any:
    """Open native shards, with what their samples are finished by; options go to `open_dataset`."""
    from dataflow import open_dataset
    from dataflow.transforms import (
        ArrayCrop,
        Cast,
        CroppedDataset,
        ImageTransform,
        RandomResizedCrop,
        TransformedDataset,
    )

    dataset = open_dataset(where, encoded=["image"] if workload.startswith("jpeg") else [], **options)
    if workload == "tokens":
        return TransformedDataset(dataset, Cast("tokens", "int64"))
    if workload == "jpeg decode":
        return TransformedDataset(dataset, ImageTransform(RandomResizedCrop(SIZE), flip=0.5, mean=MEAN, std=STD))
    if workload == "volume crops":
        return CroppedDataset(dataset, [ArrayCrop("volumes", BOX)])
    return dataset


def write_native(workload: str, source: Source, where: Path, **options: Any) -> None:
    """Write native shards; options go to `ShardWriter`."""
    import pyarrow as pa

    from dataflow import ShardWriter, image_field, tensor_field

    fields = {
        "tokens": [tensor_field("tokens", "uint16", (TOKENS,))],
        "records": [tensor_field("values", "float32", (16,)), pa.field("label", pa.int64())],
        "volume crops": [tensor_field("volumes", "float32", VOLUME)],
    }
    with ShardWriter(where, pa.schema(fields.get(workload, [image_field("image")])), **options) as writer:
        for number in range(len(source)):
            writer.write(source.read(number))


def streaming(workload: str, folder: Path, num_workers: int) -> Iterable:
    from streaming import MDSWriter, StreamingDataset

    where = folder / "mds" / workload.replace(" ", "-")
    columns = {
        "tokens": {"tokens": f"ndarray:uint16:{TOKENS}"},
        "records": {"values": "ndarray:float32:16", "label": "int"},
    }.get(workload, {"image": "bytes"})
    if not where.exists():
        source = Source(workload, folder)
        with MDSWriter(out=str(where), columns=columns) as writer:
            for number in _stored(source):
                writer.write(source.read(number))

    class Finished(StreamingDataset):
        def __getitem__(self, number: Any) -> Any:
            return finish(workload, super().__getitem__(number))

    batch_size = BATCH_SIZES[workload]
    dataset = Finished(local=str(where), shuffle=True, batch_size=batch_size)
    return _in_torch(dataset, workload, num_workers)


def litdata(workload: str, folder: Path, num_workers: int) -> Iterable:
    import litdata as package

    where = folder / "litdata" / workload.replace(" ", "-")
    if not where.exists():
        source = Source(workload, folder)
        package.optimize(source.read, list(_stored(source)), str(where), chunk_bytes="64MB", num_workers=1)

    return package.StreamingDataLoader(
        package.StreamingDataset(str(where), shuffle=True, transform=functools.partial(finish, workload)),
        batch_size=BATCH_SIZES[workload],
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=functools.partial(collate, workload),
    )


def webdataset(workload: str, folder: Path, num_workers: int) -> Iterable:
    import webdataset as package

    where = folder / "webdataset" / workload.replace(" ", "-")
    if not where.exists():
        where.mkdir(parents=True)
        source = Source(workload, folder)
        with package.ShardWriter(str(where / "%03d.tar"), maxcount=len(_stored(source)) // 4 + 1, verbose=0) as writer:
            for number in _stored(source):
                sample = source.read(number)
                values = {f"{name}.{_EXTENSIONS[name]}": value for name, value in sample.items()}
                writer.write({"__key__": f"{number:08}", **values})

    def restore(sample: dict[str, Any]) -> Any:
        return finish(workload, {name.split(".")[0]: value for name, value in sample.items() if name[0] != "_"})

    shards = sorted(map(str, where.glob("*.tar")))
    reader = package.WebDataset(shards, shardshuffle=len(shards), empty_check=False).decode().shuffle(1000)
    return _in_torch(reader.map(restore), workload, num_workers)


def _stored(source: Source) -> range:
    return range(min(len(source), STORED))


_EXTENSIONS = {"tokens": "npy", "values": "npy", "label": "cls", "image": "bin"}


def huggingface(workload: str, folder: Path, num_workers: int) -> Iterable:
    import datasets

    where = folder / "hf" / workload.replace(" ", "-")
    if not where.exists():
        source = Source(workload, folder)
        features = {
            "tokens": {"tokens": datasets.Sequence(datasets.Value("uint16"), TOKENS)},
            "records": {"values": datasets.Sequence(datasets.Value("float32"), 16), "label": datasets.Value("int64")},
        }.get(workload, {"image": datasets.Value("binary")})
        rows = (source.read(number) for number in _stored(source))
        columns: dict[str, list[Any]] = {name: [] for name in features}
        for row in rows:
            for name, value in row.items():
                columns[name].append(value)
        datasets.Dataset.from_dict(columns, datasets.Features(features)).save_to_disk(str(where))
    dataset = datasets.load_from_disk(str(where)).with_format("numpy")

    class Finished(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(dataset)

        def __getitem__(self, number: int) -> Any:
            return finish(workload, dataset[number])

    return _in_torch(Finished(), workload, num_workers, shuffle=True)


def spdl(workload: str, folder: Path, num_workers: int) -> Iterator[Any]:
    """Threads, as it is meant to be used; one for no workers."""
    from spdl.pipeline import PipelineBuilder

    source, threads = Source(workload, folder), max(1, num_workers)
    source[0]  # map the files before the threads do

    def batches() -> Iterator[list[int]]:
        while True:
            numbers = np.random.default_rng().permutation(len(source))
            size = BATCH_SIZES[workload]
            yield from (numbers[first : first + size].tolist() for first in range(0, len(numbers) - size + 1, size))

    def make(numbers: list[int]) -> Any:
        return collate(workload, [source[number] for number in numbers])

    builder = PipelineBuilder().add_source(batches()).pipe(make, concurrency=threads).add_sink(2 * threads)
    pipeline = builder.build(num_threads=threads)
    with pipeline.auto_stop():
        yield from pipeline


def ffcv(workload: str, folder: Path, num_workers: int) -> Iterable:
    """Threads of compiled code, over a file of its own; one for no workers."""
    from ffcv.fields import IntField, NDArrayField
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.ndarray import NDArrayDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import Convert, ToTensor
    from ffcv.writer import DatasetWriter

    if workload not in ("tokens", "records"):
        raise ValueError("its images are in images.py; it has no files")
    where = folder / "ffcv" / workload / "samples.beton"
    if not where.exists():
        where.parent.mkdir(parents=True, exist_ok=True)
        fields = {
            "tokens": {"tokens": NDArrayField(np.dtype("uint16"), (TOKENS,))},
            "records": {"values": NDArrayField(np.dtype("float32"), (16,)), "label": IntField()},
        }[workload]
        source = Source(workload, folder)

        class Rows:
            def __len__(self) -> int:
                return len(source)

            def __getitem__(self, number: int) -> tuple[Any, ...]:
                return tuple(source.read(number).values())

        DatasetWriter(str(where), fields, num_workers=1).from_indexed_dataset(Rows())
    array = [NDArrayDecoder(), ToTensor()]
    pipelines = {
        "tokens": {"tokens": [*array, Convert(torch.int64)]},
        "records": {"values": array, "label": [IntDecoder(), ToTensor()]},
    }[workload]
    threads = max(1, num_workers)
    order = OrderOption.RANDOM
    return Loader(str(where), BATCH_SIZES[workload], threads, os_cache=True, order=order, pipelines=pipelines)


def grain(workload: str, folder: Path, num_workers: int) -> Iterable:
    import grain as package

    dataset = package.MapDataset.source(Source(workload, folder)).shuffle(seed=0).repeat()
    options = {"batch_size": BATCH_SIZES[workload], "batch_fn": functools.partial(_collate_to_numpy, workload)}
    # Without threads and read-ahead of its own: with the defaults, 16 and 500, it is slower.
    reading = package.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    if not num_workers:
        return dataset.batch(**options).to_iter_dataset(reading)
    workers = package.MultiprocessingOptions(num_workers=num_workers)
    return dataset.to_iter_dataset(reading).batch(**options).mp_prefetch(workers)


def _collate_to_numpy(workload: str, samples: list[Any]) -> Any:
    """Grain's processes share arrays of numpy; tensors they would hand over by torch, and lose at their end."""
    batch = collate(workload, samples)
    if isinstance(batch, torch.Tensor):
        return batch.numpy()
    return [one.numpy() if isinstance(one, torch.Tensor) else one for one in batch]


def _in_torch(dataset: Any, workload: str, num_workers: int, **options: Any) -> Iterable:
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=BATCH_SIZES[workload],
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=functools.partial(collate, workload),
        **options,
    )


PEERS = {
    "torch": torch_loader,
    "dataflow": dataflow_loader,
    "dataflow native": dataflow_native,
    "native, threads": functools.partial(dataflow_native, workers="thread"),
    "spdl": spdl,
    "litdata": litdata,
    "HF datasets": huggingface,
    "grain": grain,
    "FFCV": ffcv,
    "streaming": streaming,
    "webdataset": webdataset,
}

_READ_PLAIN = ("torch", "dataflow", "spdl", "grain")
# Who takes part where not all do: these have no need of a form of their own, which would be gigabytes.
TAKE_PART = {"pixels": _READ_PLAIN, "volume crops": (*_READ_PLAIN, "dataflow native", "native, threads")}


def batch_length(batch: Any) -> int:
    """Samples in a batch of any loader."""
    if isinstance(batch, dict):
        return len(next(iter(batch.values())))
    has_columns = isinstance(batch, (list, tuple)) and isinstance(batch[0], (torch.Tensor, np.ndarray))
    return len(batch[0]) if has_columns else len(batch)
