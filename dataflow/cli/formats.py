"""`dataflow formats`."""

from __future__ import annotations

import json

import click
from rich.console import Console
from rich.table import Table

from dataflow.formats import FORMATS
from dataflow.formats.writable import WRITABLE

__all__ = ["formats"]

ABOUT = {
    "arrow": "native: Arrow IPC shards, an index of their record batches, a manifest",
    "csv": "lines of values with a header, .csv and .tsv, also compressed",
    "folder": "images, sound, video and text files, in class folders or named by a table",
    "huggingface": "HuggingFace datasets, as save_to_disk writes them",
    "jsonl": "one JSON object a line, also compressed",
    "litdata": "LitData chunks of items",
    "mds": "MosaicML Streaming shards",
    "megatron": "Megatron token files, .bin and .idx",
    "parquet": "row groups are blocks",
    "text": "one string a line, also compressed",
    "text-folder": "one text file a sample, in class folders (only when asked for)",
    "tfrecord": "records with checksums, tf.train.Example or raw",
    "webdataset": "tar archives of samples",
    "zarr": "zarr 3 arrays and groups of arrays, also sharded",
}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="As one JSON array.")
def formats(*, as_json: bool) -> None:
    """List the formats that can be read and written."""
    names = sorted(entry.name for entry in FORMATS)
    if as_json:
        click.echo(json.dumps([{"name": name, "write": name in WRITABLE, "about": ABOUT[name]} for name in names]))
        return
    table = Table("format", "read", "write", "what it is")
    for name in names:
        table.add_row(name, "yes", "yes" if name in WRITABLE else "", ABOUT[name])
    Console().print(table)
