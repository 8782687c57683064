"""The formats that datasets are written in, beside the native one."""

from dataflow.formats.targets.jsonl import JsonlTarget
from dataflow.formats.targets.mds import MdsTarget
from dataflow.formats.targets.megatron import MegatronTarget
from dataflow.formats.targets.parquet import ParquetTarget
from dataflow.formats.targets.tfrecord import TfrecordTarget
from dataflow.formats.targets.webdataset import WebdatasetTarget
from dataflow.formats.targets.zarr import ZarrTarget

__all__ = [
    "JsonlTarget",
    "MdsTarget",
    "MegatronTarget",
    "ParquetTarget",
    "TfrecordTarget",
    "WebdatasetTarget",
    "ZarrTarget",
]
