"""`convert`: plan from the index, look at the source where that is asked for, write shards in parallel, publish.

    source index -> survey (filter, cleaning rules) -> choice and plan (pure) -> shard jobs -> manifests -> no records

Until the manifest is written the destination holds no dataset, whatever is killed when. Records of finished jobs make a
broken-off conversion resumable: what every job does is a function of source and settings, so what a record of the same
conversion vouches for is what this run would write.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cache.access import open_reader
from connectors.errors import BadInputError
from connectors.objects import normalise_url
from connectors.scratch import scratch_folder
from dataflow.convert.choice import check_choice, choose
from dataflow.convert.cleaning import Cleaning
from dataflow.convert.cluster import connected
from dataflow.convert.compression import AUTO, measure_compression
from dataflow.convert.expression import Expression
from dataflow.convert.functions import Function
from dataflow.convert.iterables import name_of, spool
from dataflow.convert.job import Work
from dataflow.convert.lineage import lineage_of
from dataflow.convert.mapping import Mapping as SampleMapping
from dataflow.convert.mapping import infer_schema
from dataflow.convert.plan import fit_target, plan_digest, plan_shards
from dataflow.convert.progress import Progress
from dataflow.convert.publishing import SURVEY_NAME, publish_all, publish_quarantine, remove_records
from dataflow.convert.reading import read_samples
from dataflow.convert.rejects import FaultPolicy, owned_by_quarantine
from dataflow.convert.rereading import reread
from dataflow.convert.result import Conversion, SplitResult
from dataflow.convert.stages import ENGINES, Stages, read_records
from dataflow.convert.survey import Survey, survey
from dataflow.dataset import Dataset, open_dataset
from dataflow.formats import open_source
from dataflow.formats.arrow.manifest import MANIFEST_NAME
from dataflow.formats.destination import PART_SUFFIX, Destination
from dataflow.formats.fields import select_fields
from dataflow.formats.protocol import GridTarget
from dataflow.formats.writable import make_target

if TYPE_CHECKING:
    from dataflow.convert.job import ShardJob
    from dataflow.convert.rules import Duplicates, Rule
    from dataflow.formats.place import BadRange
    from dataflow.formats.protocol import Part, Target

__all__ = ["convert"]

# What is mapped to see what fields a function's results have.
SAMPLES_TO_INFER = 256
_FUNCTION = re.compile(r"[\w.]+:[\w.]+")


def convert(
    src: str | os.PathLike[str] | Iterable[Any] | Sized,
    dst: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002  the word users know
    to: str = "arrow",
    shard_size_bytes: int = 128 << 20,
    block_size_bytes: int = 1 << 20,
    compression: str = "none",
    fields: Sequence[str] | None = None,
    schema: pa.Schema | None = None,
    filter: str | Callable[..., Any] | None = None,  # noqa: A002  the word users know
    map: str | Callable[..., Any] | None = None,  # noqa: A002
    rules: Iterable[Rule | Duplicates] = (),
    sample_fraction: float = 1.0,
    split: Mapping[str, float] | None = None,
    shuffle: str | None = None,
    seed: int = 0,
    on_error: str = "raise",
    max_errors: int | None = None,
    quarantine: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    engine: str = "local",
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    verify: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Conversion:
    """Write the dataset at `src` in another place and format.

    The bytes written depend on source and settings only, not on the number of workers. Media are copied as they are
    encoded. Samples pass in this order: `filter`, `rules`, `sample_fraction`, `split`, `shuffle`, `map`.

    Args:
        src: What `open_dataset` reads; or any iterable of samples, or a PyTorch dataset of either style. Such
            samples are mappings, or tuples, whose fields are called `0`, `1` and so on. They are written to native
            shards in the temporary folder first, and cannot be resumed.
        dst: Where to write, in any store that can be written; nothing may be there yet.
        format: Format of what lies at the URL `src`, with its options, as for `open_dataset`; by default found out.
        to: Format to write: `arrow` (native shards), `jsonl`, `mds`, `megatron`, `parquet`, `tfrecord`,
            `webdataset`, `zarr`.
        shard_size_bytes: About the size of a shard; each worker holds one in memory.
        block_size_bytes: Size of a block before compression: what readers fetch and caches keep (`arrow`, `parquet`,
            `zarr`).
        compression: `none`, `lz4` or `zstd`, where the format has it; `auto` measures on the first 8 MiB which one
            saves at least a tenth.
        fields: Fields to keep; all by default.
        schema: Fields of samples that Python gives; by default those of the first ones.
        filter: Samples to keep: an expression such as `"label == 3 and len(text) > 10"`, or a function of a sample,
            itself or as `"module:function"`.
        map: A function from sample to sample, itself or as `"module:function"`: dicts of plain values, media as encoded
            bytes, tensors as arrays. If the first results do not show the fields of all, give the function an attribute
            `schema`.
        rules: Cleaning rules, in the order in which they apply (`read_rules`, `parse_rule`).
        sample_fraction: Write only this part of the samples, drawn by `seed`; exact to the sample.
        split: Write several datasets instead of one, to folders of these names below `dst`. Their sizes are in
            proportion to the weights, exact to the sample, and no sample is in two. Shares that add up to less than 1
            are refused.
        shuffle: `full` permutes all samples; `block` permutes blocks and mixes 64 at a time, which reads a remote
            source once; None keeps the order of the source.
        seed: Decides everything that is drawn.
        on_error: What happens to samples that cannot be read, judged or mapped: `raise`, `skip` them, or keep them in
            `quarantine`, which then also keeps what the rules drop.
        max_errors: With more bad samples than this, the conversion fails.
        quarantine: Where rejected samples go, as a native dataset; by default `dst` with `.quarantine` appended.
        workers: Processes; 0 and 1 mean this one. By default one per core if the work is worth it. On a cluster: tasks
            at once, by default one per CPU.
        engine: `local`: processes of this machine. `ray`: tasks of a Ray cluster, that of this process, of
            `RAY_ADDRESS` or of this machine; all URLs must mean the same on every node.
        overwrite: Replace a dataset at `dst`. Objects that are not part of a dataset are never removed.
        resume: Continue an interrupted conversion: shards that it finished are kept.
        dry_run: Plan and check everything in this process, write and remove nothing; `size_bytes` of the result is 0.
        verify: Read the published dataset again, and compare number and values with what was to be written.
        progress: Called in this thread, at first and whenever shards are done.

    Raises:
        BadInputError: `dst` is not empty, or an argument is wrong.
        DataError: Source or destination fail. What is finished stays, invisible, for `resume`.
    """
    if shard_size_bytes < 1:
        raise BadInputError(f"shard_size_bytes must be >= 1, got {shard_size_bytes}")
    if workers is not None and workers < 0:
        raise BadInputError(f"workers must be >= 0, got {workers}")
    if engine not in ENGINES:
        raise BadInputError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    auto = compression == AUTO
    if auto and map is not None:
        raise BadInputError("compression auto measures the source and not what a map makes of it: choose one")
    target = make_target(to, block_size_bytes=block_size_bytes, compression="none" if auto else compression)
    split = dict(split or {})
    check_choice(sample_fraction=sample_fraction, split=split, shuffle=shuffle)
    policy = FaultPolicy(on_error, max_errors)
    if policy.lenient and isinstance(target, GridTarget):
        raise BadInputError(f"{to} needs equal shards: convert to arrow with on_error={on_error!r}, and that to {to}")
    dst = normalise_url(dst)
    aside = normalise_url(quarantine) if quarantine is not None else f"{dst.rstrip('/')}.quarantine"
    if overwrite and resume:
        raise BadInputError("overwrite and resume exclude each other: one starts over, the other goes on")
    mapped = None if map is None else Function.of(map)
    run = _Run(shard_size_bytes, sample_fraction, split, shuffle, seed, mapped)
    with ExitStack() as stack:
        if engine == "ray" and not dry_run:
            stack.enter_context(connected())
        destination = stack.enter_context(Destination(dst))
        if isinstance(src, str | os.PathLike):
            location, origin = normalise_url(src), None
            if schema is not None:
                raise BadInputError("a schema is for samples that Python gives; what lies at a URL has its own")
        else:
            if format is not None:
                raise BadInputError("a format is for what lies at a URL; samples that Python gives have none")
            if engine != "local":
                raise BadInputError("samples that Python gives are in this process alone: convert with engine local")
            if resume:
                raise BadInputError("a conversion of a Python object cannot be resumed: start over with overwrite")
            destination.insist_on_room(overwrite=overwrite, owns=lambda name: run.owns(target, name))
            location, origin = _temporary(stack), name_of(src)
            spool(src, location, schema)
        _insist_on_distance(location, dst, aside)
        source, bad = _open(location, format, lenient=policy.lenient)
        stack.callback(source.reader.close)
        if auto:
            compression = measure_compression(source, to, block_size_bytes, fields)
            target = make_target(to, block_size_bytes=block_size_bytes, compression=compression)
        work = Work(
            source=source,
            target=target,
            url=dst,
            quarantine_url=aside,
            plan="",
            verify=verify,
            policy=policy,
            location=location,
            origin=origin,
            bad=bad,
            fields=tuple(select_fields(source.schema, fields).names),
            filter=_filter(filter, source.schema.names),
            cleaning=Cleaning.of(rules, source.schema) if (rules := tuple(rules)) else None,
        )
        settings = (shard_size_bytes, sample_fraction, split, shuffle, seed, policy.on_error)
        work = replace(work, plan=_digest(work, mapped, settings))
        if mapped is None:
            work = replace(work, schema=target.stored_schema(select_fields(source.schema, fields)))
        if dry_run:
            stages = Stages(workers, "local", {}, progress)
            return _rehearse(work, run, destination, _temporary(stack), stages, overwrite=overwrite, resume=resume)
        records = _begin(work, run, destination, overwrite=overwrite, resume=resume)
        return _write(work, run, Stages(workers, engine, records, progress), destination)


@dataclass(frozen=True, slots=True)
class _Run:
    """Settings that decide over what is written."""

    shard_size_bytes: int
    sample_fraction: float
    split: dict[str, float]
    shuffle: str | None
    seed: int
    function: Function | None

    def plan(self, work: Work, kept: Survey) -> tuple[Work, list[ShardJob]]:
        """Return the work with everything known, and the shards."""
        choices = choose(
            work.source.index,
            kept.selection,
            sample_fraction=self.sample_fraction,
            split=self.split,
            shuffle=self.shuffle,
            seed=self.seed,
        )
        work = replace(work, choices=tuple(choices), facts=kept.facts)
        if self.function is not None:
            mapping = SampleMapping(self.function, infer_schema(self.function, _first_samples(work)))
            work = replace(work, mapping=mapping, schema=work.target.stored_schema(mapping.schema))
        assert work.schema is not None
        target = fit_target(work.target, work.schema, work.source.index, choices, self.shard_size_bytes)
        work = replace(work, target=target)
        return work, plan_shards(work.source.index, choices, target, self.shard_size_bytes)

    def owns(self, target: Target, name: str) -> bool:
        """Return whether an object of this name was written by such a conversion, finished or not."""
        folder, _, inside = name.partition("/")
        own = target.owns(inside if folder in self.split else name)
        return own or SURVEY_NAME.fullmatch(name) is not None


def _write(work: Work, run: _Run, stages: Stages, destination: Destination) -> Conversion:
    found = survey(work, stages, destination)
    work, jobs = run.plan(work, found)
    num_resumed = sum(job.record in stages.records for job in jobs)
    stages.count_bad(work)
    parts = stages.run("write", work, jobs, num_samples=sum(map(len, work.choices)))
    has_quarantine = publish_quarantine(work, stages.quarantine)
    publish_all(work, destination, jobs, parts, lineage_of(work, found, stages.num_errors))
    remove_records(destination)
    result = _result(work, found, jobs, parts, stages)
    if work.verify:
        num_compared, not_compared = reread(work, jobs, parts)
        result = replace(result, num_compared=num_compared, not_compared=not_compared)
    return replace(result, num_resumed=num_resumed, quarantine=work.quarantine_url if has_quarantine else None)


def _begin(work: Work, run: _Run, destination: Destination, *, overwrite: bool, resume: bool) -> dict[str, Part]:
    """Make sure that destination and quarantine may be written to; return what an earlier run finished."""
    if resume:
        records = _finished(work, run, destination)
        destination.sweep()
        return records
    with Destination(work.quarantine_url) as quarantine:
        if work.policy.on_error == "quarantine":
            quarantine.insist_on_room(overwrite=overwrite, owns=owned_by_quarantine)
        destination.clear(
            overwrite=overwrite,
            owns=lambda name: run.owns(work.target, name),
            is_manifest=lambda name: name.rpartition("/")[2] == work.target.manifest_name,
        )
        if work.policy.on_error == "quarantine":
            quarantine.clear(
                overwrite=overwrite, owns=owned_by_quarantine, is_manifest=lambda name: name == MANIFEST_NAME
            )
    return {}


def _finished(work: Work, run: _Run, destination: Destination) -> dict[str, Part]:
    """Return what an earlier run of the same conversion finished; make sure that nothing else is there."""
    sizes = destination.sizes()
    for name in sizes:
        if not run.owns(work.target, name):
            raise BadInputError(f"{work.url} holds {name}, which no conversion left there", uri=work.url)
    # Killed between the manifest and the removal of the records, both are done again.
    if sizes and not any(name.endswith(PART_SUFFIX) or SURVEY_NAME.fullmatch(name) for name in sizes):
        raise BadInputError(f"{work.url} is a finished dataset already; nothing to resume", uri=work.url)
    return read_records(destination, sizes, work.plan)


def _rehearse(
    work: Work,
    run: _Run,
    destination: Destination,
    elsewhere: str,
    stages: Stages,
    *,
    overwrite: bool,
    resume: bool,
) -> Conversion:
    """Check the destination as a real run would, look at the source as one would, and say what it would write."""
    records: dict[str, Part] = {}
    if resume:
        records = _finished(work, run, destination)
    else:
        destination.insist_on_room(overwrite=overwrite, owns=lambda name: run.owns(work.target, name))
    policy = replace(work.policy, on_error="skip") if work.policy.lenient else work.policy
    with Destination(elsewhere) as aside:
        found = survey(replace(work, url=elsewhere, policy=policy), stages, aside)
    work, jobs = run.plan(work, found)
    stages.count_bad(work)
    result = _result(work, found, jobs, [], stages)
    num_resumed = sum(job.record in records for job in jobs)
    return replace(result, num_resumed=num_resumed, num_samples=sum(map(len, work.choices)), num_shards=len(jobs))


def _result(work: Work, found: Survey, jobs: list[ShardJob], parts: list[Part], stages: Stages) -> Conversion:
    splits = []
    for place, choice in enumerate(work.choices):
        own = [part for job, part in zip(jobs, parts, strict=False) if job.choice == place and part["num_samples"]]
        num_samples = sum(part["num_samples"] for part in own)
        size_bytes = sum(part["shard"]["size_bytes"] for part in own)
        url = f"{work.url}/{choice.name}" if choice.name else work.url
        splits.append(SplitResult(choice.name, url, num_samples, len(own), size_bytes))
    num_kept = found.num_kept
    return Conversion(
        url=work.url,
        format=work.target.format,
        num_samples=sum(part.num_samples for part in splits),
        num_shards=sum(part.num_shards for part in splits),
        num_resumed=0,
        source_bytes=int(work.source.index.blocks.length.sum()),
        size_bytes=sum(part.size_bytes for part in splits),
        num_source=len(work.source) + len(work.bad),
        num_filtered=found.num_filtered,
        num_not_drawn=num_kept - sum(map(len, work.choices)),
        num_errors=stages.num_errors,
        errors=tuple(stages.examples[:5]),
        rules=tuple(found.rules),
        splits=tuple(splits) if splits[0].name else (),
    )


def _temporary(stack: ExitStack) -> str:
    return normalise_url(stack.enter_context(scratch_folder()))


def _insist_on_distance(*urls: str) -> None:
    for one, other in itertools.combinations(urls, 2):
        if f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/"):
            raise BadInputError(f"source {urls[0]}, destination {urls[1]} and quarantine must not contain each other")


def _open(src: str, name: str | None, *, lenient: bool) -> tuple[Dataset, tuple[BadRange, ...]]:
    """Open the source; leniently, damaged records are passed over where its format can do that."""
    if not lenient:
        return open_dataset(src, cache=None, format=name), ()
    reader = open_reader(src, None)
    bad: list[BadRange] = []
    try:
        return Dataset(open_source(src, reader, name, bad=bad), reader, buffer_bytes=0), tuple(bad)
    except BaseException:
        reader.close()
        raise


def _filter(given: str | Callable[..., Any] | None, names: list[str]) -> Expression | Function | None:
    if given is None:
        return None
    if not isinstance(given, str) or _FUNCTION.fullmatch(given.strip()):
        return Function.of(given.strip() if isinstance(given, str) else given)
    expression = Expression(given)
    expression.fields(names)
    return expression


def _digest(work: Work, mapped: Function | None, settings: object) -> str:
    chosen = work.filter.identity() if isinstance(work.filter, Function) else work.filter
    schema = work.source.schema.serialize().to_pybytes()
    everything = (
        work.target,
        work.fields,
        work.bad,
        chosen,
        work.cleaning,
        mapped and mapped.identity(),
        settings,
        schema,
    )
    return plan_digest(work.source.index, everything)


def _first_samples(work: Work) -> Any:
    """Return the first good samples of the source, as the function will see them."""
    kept = work.choices[0].kept
    numbers = np.arange(min(SAMPLES_TO_INFER, len(work.choices[0].order)))
    numbers = numbers if kept is None else kept.numbers(numbers)
    lost: Callable[..., None] | None = (lambda *_: None) if work.policy.lenient else None
    schema = pa.schema([work.source.schema.field(name) for name in work.fields])
    batches = [batch for _, batch in read_samples(work.source, work.fields, numbers, lost)]
    batch = pa.concat_batches(batches) if batches else pa.RecordBatch.from_pylist([], schema)
    return batch if work.cleaning is None else work.cleaning.change(batch, work.facts)
