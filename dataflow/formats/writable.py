"""Which formats can be written, and how one is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from connectors.errors import BadInputError
from dataflow.formats.arrow.target import ArrowTarget
from dataflow.formats.targets import (
    JsonlTarget,
    MdsTarget,
    MegatronTarget,
    ParquetTarget,
    TfrecordTarget,
    WebdatasetTarget,
    ZarrTarget,
)

if TYPE_CHECKING:
    from dataflow.formats.protocol import Target

__all__ = ["WRITABLE", "make_target"]

WRITABLE = ("arrow", "jsonl", "mds", "megatron", "parquet", "tfrecord", "webdataset", "zarr")


def make_target(name: str, *, block_size_bytes: int, compression: str) -> Target:
    """Return the target of that name.

    Raises:
        BadInputError: There is none, or it cannot be compressed in that way.
    """
    if name == "arrow":
        return ArrowTarget(block_size_bytes=block_size_bytes, compression=compression)
    if name == "parquet":
        return ParquetTarget(block_size_bytes=block_size_bytes, compression=compression)
    if name == "jsonl":
        return JsonlTarget(compression=compression)
    if name == "mds":
        return MdsTarget(compression=compression)
    if name == "zarr":
        return ZarrTarget(block_size_bytes=block_size_bytes, compression=compression)
    if name not in WRITABLE:
        raise BadInputError(f"no format called {name!r} can be written; there are {', '.join(WRITABLE)}")
    if compression != "none":
        raise BadInputError(f"{name} is written without compression, got {compression!r}")
    plain: dict[str, Target] = {
        "megatron": MegatronTarget(),
        "tfrecord": TfrecordTarget(),
        "webdataset": WebdatasetTarget(),
    }
    return plain[name]
