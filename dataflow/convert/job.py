"""The parts of a conversion that run in any process: a job writes the record of what it found, then its shard.

Both appear whole, and the record first: where every shard is a dataset by itself, it tells readers that more is to
come. It counts once everything that it names is there with its size, so a job that was killed between the two is done
again by the next run, with the same bytes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import pyarrow as pa

from dataflow.convert.reading import read_samples, read_shuffled
from dataflow.convert.rejects import Rejects, write_rejects
from dataflow.convert.rereading import StreamDigest
from dataflow.formats.destination import PART_SUFFIX, Destination
from dataflow.formats.protocol import GridTarget

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from connectors.protocols import Buffer
    from dataflow.convert.choice import Choice
    from dataflow.convert.cleaning import Cleaning
    from dataflow.convert.expression import Expression
    from dataflow.convert.functions import Function
    from dataflow.convert.mapping import Mapping as SampleMapping
    from dataflow.convert.reading import Numbered
    from dataflow.convert.rejects import FaultPolicy
    from dataflow.convert.rules import Facts
    from dataflow.dataset import Dataset
    from dataflow.formats.place import BadRange
    from dataflow.formats.protocol import Part, Target

__all__ = ["Job", "PartRecord", "ShardJob", "Work", "run_job"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What all jobs of a conversion share; travels to worker processes once a stage.

    Attributes:
        source: The dataset to read.
        target: How shards are built.
        url: Where they go.
        quarantine_url: Where rejected samples go.
        plan: Digest of the conversion.
        policy: What is done about bad samples.
        location: URL of the source, as it was named.
        origin: What the samples came from where that is no URL.
        bad: Ranges of the source that no sample could be made of.
        fields: Fields of the source that are written, or mapped.
        schema: What is stored; None as long as that is not known.
        filter: Which samples are wanted.
        cleaning: Which of those are good.
        mapping: What becomes of them.
        facts: What has been measured of the source, by field.
        choices: The datasets to write.
        verify: Whether what is written will be read again.
    """

    source: Dataset
    target: Target
    url: str
    quarantine_url: str
    plan: str
    policy: FaultPolicy
    location: str
    origin: str | None
    bad: tuple[BadRange, ...]
    fields: tuple[str, ...]
    schema: pa.Schema | None = None
    filter: Expression | Function | None = None
    cleaning: Cleaning | None = None
    mapping: SampleMapping | None = None
    facts: dict[str, Facts] = field(default_factory=dict)
    choices: tuple[Choice, ...] = ()
    verify: bool = False

    @property
    def judged_fields(self) -> list[str]:
        """Fields that have to be read to judge samples; at least one, so that there is something to read."""
        return (self.cleaning.fields if self.cleaning else []) or self.source.schema.names[:1]


class PartRecord(msgspec.Struct):
    """What lies beside a finished job's output until the dataset is published."""

    plan: str
    part: dict[str, Any]


class Job(Protocol):
    """One piece of work, for any process."""

    @property
    def record(self) -> str:
        """Name of the record, without `PART_SUFFIX`; of a shard it is the shard's own."""
        ...

    def run(self, work: Work, destination: Destination) -> tuple[Part, Mapping[str, list[Buffer]]]:
        """Do it; return what is remembered of it, equal for equal work, and what is to be written behind that."""
        ...


def run_job(work: Work, job: Job, destination: Destination) -> Part:
    """Do a job and leave its record and what that names; return the record's content."""
    part, objects = job.run(work, destination)
    destination.put(job.record + PART_SUFFIX, [msgspec.json.encode(PartRecord(work.plan, part))])
    for name, chunks in objects.items():
        destination.put(name, chunks)
    return part


@dataclass(frozen=True, slots=True)
class ShardJob:
    """One shard to write.

    Attributes:
        choice: Which dataset it belongs to.
        number: Its place among the shards.
        name: What it is called, below the destination.
        first: First position of the dataset's order that it covers.
        last: First position that it no longer covers.
        source_bytes: About as many bytes of the source belong to it.
    """

    choice: int
    number: int
    name: str
    first: int
    last: int
    source_bytes: int

    @property
    def record(self) -> str:
        """Name of the shard."""
        return self.name

    def run(self, work: Work, destination: Destination) -> tuple[Part, Mapping[str, list[Buffer]]]:
        """Build the shard; without samples there is none."""
        assert work.schema is not None
        rejects, counted = Rejects(work.source, work.policy, work.origin), [0]
        batches = self._batches(work, rejects, counted)
        stream = StreamDigest(work.schema if work.verify else pa.schema([]))
        batches = stream.through(batches) if work.verify else batches
        first = next(batches, None)
        part: Part = {"size_bytes": 0}
        objects: Mapping[str, list[Buffer]] = {}
        if first is not None:
            part, objects = self._build(work, itertools.chain([first], batches))
        name = f"write-{self.name.rpartition('/')[0]}{self.number:05d}"
        found: Part = {"shard": part, "num_samples": counted[0]} | write_rejects(work, rejects, name)
        return found | ({"stream": stream.result()} if work.verify else {}), objects

    def _build(self, work: Work, batches: Iterator[pa.RecordBatch]) -> tuple[Part, Mapping[str, list[Buffer]]]:
        assert work.schema is not None
        if not isinstance(work.target, GridTarget):
            part, chunks = work.target.build(work.schema, batches, self.first)
            return part, {self.name: chunks}
        part, objects = work.target.build_objects(work.schema, batches, self.number, self.first)
        named = {work.choices[self.choice].prefix + name: content for name, content in objects.items()}
        return part | {"objects": {name: sum(map(len, content)) for name, content in named.items()}}, named

    def _batches(self, work: Work, rejects: Rejects, counted: list[int]) -> Iterator[pa.RecordBatch]:
        choice = work.choices[self.choice]
        samples = choice.samples(self.first, self.last)
        read = read_shuffled if choice.shuffled else read_samples
        on_damage = rejects.on_damage if work.policy.lenient else None
        numbered = _changed(work, read(work.source, work.fields, samples, on_damage))
        assert work.schema is not None
        for _, batch in numbered if work.mapping is None else work.mapping.apply(numbered, rejects):
            counted[0] += batch.num_rows
            yield batch.select(work.schema.names)


def _changed(work: Work, numbered: Iterator[Numbered]) -> Iterator[Numbered]:
    """Apply the changes of the cleaning rules."""
    if work.cleaning is None:
        return numbered
    cleaning = work.cleaning
    return ((numbers, cleaning.change(batch, work.facts)) for numbers, batch in numbered)
