"""`dataflow inspect`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import click
import msgspec
import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Column, Table

from connectors.errors import BadInputError, CorruptError
from connectors.objects import normalise_url
from dataflow.cli.sizes import format_size
from dataflow.convert.reading import read_samples
from dataflow.dataset import Dataset, open_dataset
from dataflow.formats import class_names, field_kind
from dataflow.formats.arrow.reading import ArrowSource
from dataflow.formats.protocol import TracedSource
from dataflow.media import sniff

__all__ = ["inspect"]

MAX_SHARDS_SHOWN = 10
MAX_TEXT = 60


@click.command()
@click.argument("url")
@click.option("--format", help="Format of the data. By default it is found out.")
@click.option("--samples", type=click.IntRange(0), default=3, show_default=True, help="How many samples to show.")
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object.")
def inspect(
    *,
    url: str,
    format: str | None,  # noqa: A002  the word users know
    samples: int,
    as_json: bool,
) -> None:
    """Show fields, statistics, shards, blocks, origin and first samples of the dataset at URL."""
    dataset = open_dataset(url, cache=None, format=format)
    try:
        report = describe(dataset, normalise_url(url), samples)
    finally:
        dataset.reader.close()
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _show(report, Console(markup=False, emoji=False))  # a text may be `[/INST]` or `:tada:`


def describe(dataset: Dataset, url: str, num_shown: int) -> dict[str, Any]:
    """Return what there is to say of the dataset at a URL, which may be a file in its folder, as JSON types."""
    index = dataset.index
    shards, blocks = index.shards, index.blocks
    shown = _first_samples(dataset, min(num_shown, len(dataset)))
    media = {field.name for field in dataset.schema if field_kind(field)}
    samples_per_shard = np.bincount(blocks.shard, np.diff(blocks.first_sample), len(shards)).astype(np.int64)
    return {
        "url": url,
        "format": dataset.source.format,
        "fingerprint": dataset.fingerprint,
        "num_samples": len(dataset),
        "num_blocks": index.num_blocks,
        "num_shards": len(shards),
        "size_bytes": int(shards.size_bytes.sum()),
        "block_bytes": _spread(blocks.length),
        "fields": [_describe_field(field) for field in dataset.schema],
        "lineage": dataset.source.lineage if isinstance(dataset.source, TracedSource) else {},
        **_manifest_facts(dataset),
        "shards": [
            {"name": name, "size_bytes": size, "num_samples": count}
            for name, size, count in zip(
                shards.names.to_pylist(), shards.size_bytes.tolist(), samples_per_shard.tolist(), strict=True
            )
        ],
        "samples": [
            {name: _describe_value(value, media=name in media) for name, value in sample.items()} for sample in shown
        ],
    }


def _first_samples(dataset: Dataset, count: int) -> Sequence[Mapping[str, Any]]:
    """Return samples for people to look at: also damaged ones, and nulls, which have no place in an array."""
    try:
        return dataset.__getitems__(range(count))
    except (BadInputError, CorruptError):
        columns = [_first_values(dataset.select([name]), name, count) for name in dataset.schema.names]
        return [dict(zip(dataset.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _first_values(dataset: Dataset, name: str, count: int) -> list[Any]:
    try:
        return list(dataset.get_batch(range(count))[name])
    except CorruptError:
        return [_value_or_damage(dataset, name, sample) for sample in range(count)]
    except BadInputError:
        columns = [batch.column(name) for _, batch in read_samples(dataset, [name], np.arange(count))]
        if pa.types.is_temporal(dataset.schema.field(name).type):  # Python's have no nanoseconds
            columns = [column.cast(pa.string()) for column in columns]
        return [value for column in columns for value in column.to_pylist()]


def _value_or_damage(dataset: Dataset, name: str, sample: int) -> Any:
    try:
        return dataset.get_batch([sample])[name][0]
    except CorruptError:
        ((_, batch),) = read_samples(dataset, [name], np.array([sample]))  # of a damaged block nothing can be shown
        return f"damaged: {len(batch.column(name)[0].as_buffer())} bytes"


def _manifest_facts(dataset: Dataset) -> dict[str, Any]:
    """Return what the manifest of a native dataset says beside: nothing is read for it."""
    if not isinstance(dataset.source, ArrowSource):
        return {}
    manifest = dataset.source.manifest
    return {
        "compression": manifest.compression,
        "release": manifest.release,
        "revision": manifest.revision,
        "statistics": msgspec.to_builtins(manifest.statistics),
    }


def _spread(lengths: np.ndarray[Any, Any]) -> dict[str, int] | None:
    if not len(lengths):
        return None
    return {"min": int(lengths.min()), "median": int(np.median(lengths)), "max": int(lengths.max())}


def _describe_field(field: Any) -> dict[str, Any]:
    described: dict[str, Any] = {"name": field.name, "type": str(field.type), "nullable": field.nullable}
    if kind := field_kind(field):
        described["kind"] = kind
    if (classes := class_names(field)) is not None:
        described["classes"] = classes
    return described


def _describe_value(value: Any, *, media: bool) -> Any:
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, bytes):
        codec = sniff(value) if media else None
        return f"{len(value)} bytes" + (f" of {codec.name}" if codec else "")
    if isinstance(value, np.generic):
        value = value.item()
    text = str(value)
    if len(text) > MAX_TEXT:
        return text[: MAX_TEXT - 3] + "..."
    is_json = value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return value if is_json else text


def _cell(value: Any) -> str:
    """Return what a table shows: nothing that a terminal would obey."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(value))


def _statistics_cells(found: dict[str, Any]) -> tuple[str, str, str]:
    lengths = found.get("lengths")
    told = ""
    if lengths and lengths["count"]:
        told = f"{lengths['min']:,} to {lengths['max']:,}, {lengths['total'] / lengths['count']:,.1f} on average"
    return f"{found['missing']:,}" if found["missing"] else "", format_size(found["bytes"]), told


def _show(report: dict[str, Any], console: Console) -> None:
    spread = report["block_bytes"]
    blocks = f" of {format_size(spread['min'])} to {format_size(spread['max'])}" if spread else ""
    facts = Table.grid("", Column(overflow="fold"), padding=(0, 2))  # a URL is never cut
    facts.add_row("dataset", report["url"])
    facts.add_row("format", report["format"])
    facts.add_row("samples", f"{report['num_samples']:,}")
    facts.add_row("blocks", f"{report['num_blocks']:,}{blocks}")
    facts.add_row("shards", f"{report['num_shards']:,}, {format_size(report['size_bytes'])}")
    facts.add_row("fingerprint", report["fingerprint"])
    if report.get("revision", 1) > 1:
        facts.add_row("version", f"{report['revision']}; older ones by open_dataset(revision=)")
    if source := report["lineage"].get("source"):
        facts.add_row("converted from", f"{source['url']} ({source['format']})")
    console.print(facts)
    statistics = report.get("statistics", {})
    fields = Table("field", "type", "kind", "classes", *(("missing", "bytes", "length") if statistics else ()))
    for field in report["fields"]:
        classes = field.get("classes")
        row = [_cell(field["name"]), _cell(field["type"]), field.get("kind", ""), str(len(classes)) if classes else ""]
        fields.add_row(*row, *(_statistics_cells(statistics[field["name"]]) if field["name"] in statistics else ()))
    console.print(fields)
    shards = Table(Column("shard", overflow="fold"), "size", "samples")
    for shard in report["shards"][:MAX_SHARDS_SHOWN]:
        shards.add_row(_cell(shard["name"]), format_size(shard["size_bytes"]), f"{shard['num_samples']:,}")
    if (hidden := len(report["shards"]) - MAX_SHARDS_SHOWN) > 0:
        shards.add_row(f"and {hidden:,} more", "", "")
    console.print(shards)
    if report["samples"]:
        samples = Table(*map(_cell, report["samples"][0]))
        for sample in report["samples"]:
            samples.add_row(*map(_cell, sample.values()))
        console.print(samples)
