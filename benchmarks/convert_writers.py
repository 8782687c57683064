"""How each library writes the inputs of convert.py: a function from (input folder, empty folder to write to) each.

A writer starts from what its users start from: files in class folders for images, memory-mapped `.npy` files for tokens
and records. Each writes as the documentation of its library shows, in processes where the library offers them, and
without compression.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

SHARD_BYTES = 128 << 20
WORKERS = 2

Writer = Callable[[Path, Path], None]


def files(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield label and path of every image."""
    for label, below in enumerate(sorted((folder / "images").iterdir())):
        for path in sorted(below.iterdir()):
            yield label, path


def arrays(folder: Path, workload: str) -> dict[str, np.ndarray]:
    names = {"tokens": ["tokens"], "records": ["values", "label"]}[workload]
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}


def rows(folder: Path, workload: str) -> Iterator[dict[str, Any]]:
    """Yield samples one by one, as the libraries that write one by one are given them."""
    if workload == "images":
        for label, path in files(folder):
            yield {"image": path.read_bytes(), "label": label}
        return
    columns = arrays(folder, workload)
    for values in zip(*columns.values(), strict=True):
        yield {name: value if value.ndim else int(value) for name, value in zip(columns, values, strict=True)}


# Ours


def dataflow(workload: str, folder: Path, out: Path, *, to: str = "arrow", workers: int | None = None) -> None:
    import pyarrow as pa

    from dataflow import ShardWriter, tensor_field
    from dataflow.convert import convert

    if workload == "images":
        convert(folder / "images", out, to=to, workers=workers)
        return
    columns = arrays(folder, workload)
    fields = [
        tensor_field(name, array.dtype, array.shape[1:]) if array.ndim > 1 else pa.field(name, pa.int64())
        for name, array in columns.items()
    ]
    with ShardWriter(out, pa.schema(fields)) as writer:
        writer.write_columns(columns)


def dataflow_rows(workload: str, folder: Path, out: Path) -> None:
    """Ours, sample by sample, as the others are written."""
    import pyarrow as pa

    from dataflow import ShardWriter, tensor_field

    fields = {
        "tokens": [tensor_field("tokens", "uint16", (2048,))],
        "records": [tensor_field("values", "float32", (16,)), pa.field("label", pa.int64())],
    }[workload]
    with ShardWriter(out, pa.schema(fields)) as writer:
        for row in rows(folder, workload):
            writer.write(row)


# Theirs


def webdataset(workload: str, folder: Path, out: Path) -> None:
    import webdataset as package

    names = {"image": "jpg", "label": "cls", "tokens": "npy", "values": "npy"}
    with package.ShardWriter(str(out / "%05d.tar"), maxsize=SHARD_BYTES, maxcount=1 << 40, verbose=0) as writer:
        for number, row in enumerate(rows(folder, workload)):
            values = {names[name]: np.asarray(value) if name == "tokens" else value for name, value in row.items()}
            writer.write({"__key__": f"{number:08}", **values})


def streaming(workload: str, folder: Path, out: Path) -> None:
    from streaming import MDSWriter

    columns = {
        "images": {"image": "bytes", "label": "int"},
        "tokens": {"tokens": "ndarray:uint16:2048"},
        "records": {"values": "ndarray:float32:16", "label": "int"},
    }[workload]
    with MDSWriter(out=str(out), columns=columns, size_limit=SHARD_BYTES) as writer:
        for row in rows(folder, workload):
            writer.write(row)


def litdata(workload: str, folder: Path, out: Path) -> None:
    import litdata as package

    inputs: list[Any] = list(files(folder))
    if workload != "images":
        count = len(next(iter(arrays(folder, workload).values())))
        inputs = [(start, min(start + 4096, count)) for start in range(0, count, 4096)]
    package.optimize(
        partial(_litdata_samples, workload, folder), inputs, str(out), chunk_bytes=SHARD_BYTES, num_workers=WORKERS
    )


def _litdata_samples(workload: str, folder: Path, part: Any) -> Any:
    if workload == "images":
        label, path = part
        yield {"image": path.read_bytes(), "label": label}
        return
    columns = {name: array[slice(*part)] for name, array in arrays(folder, workload).items()}
    for values in zip(*columns.values(), strict=True):
        yield {name: value if value.ndim else int(value) for name, value in zip(columns, values, strict=True)}


def huggingface(workload: str, folder: Path, out: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    if workload == "images":
        found = list(files(folder))
        columns = {"image": [str(path) for _, path in found], "label": [label for label, _ in found]}
        dataset = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        dataset.save_to_disk(str(out), num_proc=WORKERS)
        return
    features = {
        "tokens": {"tokens": datasets.Sequence(datasets.Value("uint16"), 2048)},
        "records": {"values": datasets.Sequence(datasets.Value("float32"), 16), "label": datasets.Value("int64")},
    }[workload]
    dataset = datasets.Dataset.from_dict(arrays(folder, workload), datasets.Features(features))
    dataset.save_to_disk(str(out))


WRITERS: dict[str, dict[str, Writer]] = {
    workload: {
        "dataflow": partial(dataflow, workload),
        **(
            {
                "dataflow, 1 process": partial(dataflow, workload, workers=1),
                "dataflow to webdataset": partial(dataflow, workload, to="webdataset"),
                "dataflow to mds": partial(dataflow, workload, to="mds"),
            }
            if workload == "images"
            else {"dataflow, by sample": partial(dataflow_rows, workload)}
        ),
        "webdataset": partial(webdataset, workload),
        "streaming": partial(streaming, workload),
        "litdata": partial(litdata, workload),
        "HF datasets": partial(huggingface, workload),
    }
    for workload in ("images", "tokens", "records")
}
