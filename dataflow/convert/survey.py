"""Looking at a source before it is written: which samples a filter and cleaning rules leave, found in parallel.

    measure    mean, deviation and quartiles of fields that rules compare with       only where a rule does
    clean      filter and rules -> one bit per sample, counts, digests for duplicates
    resolve    digests of all jobs, merged a part at a time -> samples equal to an earlier one

Jobs are ranges of the source and their results are put together in the order of the ranges, so what comes out does not
depend on who did what. Every finished job leaves a record at the destination, as finished shards do.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataflow.convert.digests import bucket_sizes, find_duplicates, sample_digests
from dataflow.convert.functions import Function, batch_to_rows
from dataflow.convert.plan import cut
from dataflow.convert.reading import read_samples
from dataflow.convert.rejects import Rejects, write_rejects
from dataflow.convert.result import RuleCount
from dataflow.order import Permutation, Selection

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy.typing as npt

    from connectors.protocols import Buffer
    from dataflow.convert.job import Work
    from dataflow.convert.reading import Numbered
    from dataflow.convert.rules import Facts
    from dataflow.convert.stages import Stages
    from dataflow.formats.destination import Destination
    from dataflow.formats.protocol import Part

__all__ = ["CleanJob", "MeasureJob", "Survey", "merge_facts", "survey"]

# Quartiles are those of that many values at most, drawn by number: exact for smaller sources, bounded for all.
MAX_VALUES = 1 << 20
# What one job looks at.
RANGE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class _RangeJob:
    """Work on one range of the source.

    Attributes:
        number: Its place among the ranges.
        first: First sample.
        last: First sample that no longer belongs to it.
        source_bytes: About as many bytes are read.
    """

    number: int
    first: int
    last: int
    source_bytes: int


class MeasureJob(_RangeJob):
    """Measuring the fields of one range."""

    __slots__ = ()

    @property
    def record(self) -> str:
        """Name of what is remembered of the finished job."""
        return f"survey-measure-{self.number:05d}"

    def run(self, work: Work, destination: Destination) -> tuple[Part, Mapping[str, list[Buffer]]]:
        """Return count, mean, sum of squared differences and drawn values of every field."""
        assert work.cleaning is not None
        names, values = work.cleaning.measured, {name: [np.zeros(0)] for name in work.cleaning.measured}
        numbers = [np.zeros(0, np.int64)]
        # Errors are counted when the same samples are judged.
        for found, batch in _filtered(
            work, names, self.first, self.last, Rejects(work.source, work.policy, work.origin)
        ):
            numbers.append(found)
            for name in names:
                column = pc.cast(batch.column(name), pa.float64(), safe=False).to_numpy(zero_copy_only=False)
                values[name].append(column)
        ranks = Permutation(0, 0, "quartiles").apply(np.concatenate(numbers), max(1, len(work.source)))
        return {"fields": {name: _measure(np.concatenate(values[name]), ranks < MAX_VALUES) for name in names}}, {}


class CleanJob(_RangeJob):
    """Judging the samples of one range."""

    __slots__ = ()

    @property
    def record(self) -> str:
        """Name of what is remembered of the finished job."""
        return f"survey-clean-{self.number:05d}"

    @property
    def digests(self) -> str:
        """Name of the digests of its samples."""
        return f"{self.record}.digests"

    def run(self, work: Work, destination: Destination) -> tuple[Part, Mapping[str, list[Buffer]]]:
        """Return which samples stay, and what the rules did; the digests, whose size no record says, go before it."""
        cleaning, rejects = work.cleaning, Rejects(work.source, work.policy, work.origin)
        kept = np.zeros(self.last - self.first, np.bool_)
        rules = cleaning.rules if cleaning else ()
        dropped, changed, digests, passed = np.zeros(len(rules), int), np.zeros(len(rules), int), [], 0
        quarantine = work.policy.on_error == "quarantine"
        names = work.source.schema.names if quarantine else work.judged_fields
        for numbers, batch in _filtered(work, names, self.first, self.last, rejects):
            passed += batch.num_rows
            if cleaning is not None:
                cleaned = cleaning.judge(batch, work.facts)
                changed += np.array(cleaned.changed, int)
                dropped += np.bincount(cleaned.dropped_by[cleaned.dropped_by >= 0], minlength=len(rules))
                for place in np.flatnonzero(cleaned.dropped_by >= 0) if quarantine else ():
                    label = cleaning.labels[cleaned.dropped_by[place]]
                    rejects.drop(int(numbers[place]), label, batch.slice(place, 1))
                stay = np.flatnonzero(cleaned.dropped_by < 0)
                numbers, batch = numbers[stay], cleaned.batch.take(pa.array(stay))
                if cleaning.duplicates is not None:
                    digests.append(sample_digests(batch.select(list(cleaning.duplicates.fields)), numbers))
            kept[numbers - self.first] = True
        part: Part = {
            "kept": base64.b64encode(np.packbits(kept).tobytes()).decode(),
            "passed": passed,
            "dropped": dropped.tolist(),
            "changed": changed.tolist(),
        }
        if cleaning is not None and cleaning.duplicates is not None:
            content = np.sort(np.concatenate([sample_digests(None, None), *digests]))
            destination.put(self.digests, [content.tobytes()])
            part["buckets"] = bucket_sizes(content).tolist()
        return part | write_rejects(work, rejects, self.record.removeprefix("survey-")), {}


def _filtered(work: Work, names: Sequence[str], first: int, last: int, rejects: Rejects) -> Iterator[Numbered]:
    """Yield the samples that the filter keeps, with at least the fields `names`."""
    chosen = work.filter
    if chosen is None:
        fields: Sequence[str] = names
    elif isinstance(chosen, Function):
        fields = work.source.schema.names
    else:
        fields = list(dict.fromkeys([*names, *chosen.fields(work.source.schema.names)]))
    on_damage = rejects.on_damage if work.policy.lenient else None
    for numbers, batch in read_samples(work.source, fields, np.arange(first, last), on_damage):
        if chosen is None:
            yield numbers, batch
            continue
        mask = _call(chosen, numbers, batch, rejects) if isinstance(chosen, Function) else chosen.mask(batch)
        places = np.flatnonzero(mask)
        if len(places):
            yield numbers[places], batch.take(pa.array(places)) if len(places) < batch.num_rows else batch


def _call(
    function: Function, numbers: npt.NDArray[np.int64], batch: pa.RecordBatch, rejects: Rejects
) -> npt.NDArray[np.bool_]:
    keep, call = np.zeros(batch.num_rows, np.bool_), function.load()
    for start in range(0, batch.num_rows, 256):
        for place, row in enumerate(batch_to_rows(batch.slice(start, 256)), start):
            try:
                keep[place] = bool(call(row))
            except Exception as error:  # noqa: BLE001  whatever the user's code raises
                rejects.error(int(numbers[place]), "filter", error, batch.slice(place, 1))
    return keep


def _measure(values: npt.NDArray[np.float64], drawn: npt.NDArray[np.bool_]) -> dict[str, Any]:
    finite = np.isfinite(values)
    chosen, values = values[drawn & finite], values[finite]
    mean = float(values.mean()) if len(values) else 0.0
    squares = float(np.square(values - mean).sum())
    return {
        "count": len(values),
        "mean": mean,
        "squares": squares,
        "values": base64.b64encode(chosen.tobytes()).decode(),
    }


def merge_facts(parts: Sequence[Part], names: Sequence[str]) -> dict[str, Facts]:
    """Put the results of all measure jobs together, in their order (Chan, Golub and LeVeque 1979)."""
    facts: dict[str, Facts] = {}
    for name in names:
        count, mean, squares, values = 0, 0.0, 0.0, [np.zeros(0)]
        for part in (part["fields"][name] for part in parts):
            total, step = count + part["count"], part["mean"] - mean
            if part["count"]:
                mean += step * part["count"] / total
                squares += part["squares"] + step * step * count * part["count"] / total
            count = total
            values.append(np.frombuffer(base64.b64decode(part["values"])))
        drawn = np.concatenate(values)
        lower, median, upper = np.quantile(drawn, (0.25, 0.5, 0.75)).tolist() if len(drawn) else (0.0, 0.0, 0.0)
        deviation = float(np.sqrt(squares / max(1, count)))
        facts[name] = {"mean": mean, "deviation": deviation, "median": median, "lower": lower, "upper": upper}
    return facts


@dataclass(frozen=True, slots=True)
class Survey:
    """What is known of a source before it is written.

    Attributes:
        selection: The samples that stay; None for all.
        facts: What was measured, by field.
        num_kept: Samples that stay.
        num_filtered: Samples that the filter left out.
        num_errors: Samples that could not be read or judged.
        rules: What the cleaning rules did.
    """

    selection: Selection | None
    facts: dict[str, Facts]
    num_kept: int
    num_filtered: int
    num_errors: int
    rules: list[RuleCount]


def survey(work: Work, stages: Stages, destination: Destination) -> Survey:
    """Look at the whole source, as far as filter and rules ask for it.

    Args:
        work: The conversion.
        stages: Runs the jobs.
        destination: Where `work.url` is.
    """
    count = len(work.source)
    if work.filter is None and work.cleaning is None:
        return Survey(None, {}, count, 0, 0, [])
    blocks = work.source.index.blocks
    ranges = list(enumerate(cut(blocks.first_sample, blocks.length, RANGE_BYTES)))
    facts: dict[str, Facts] = {}
    if work.cleaning is not None and work.cleaning.measured:
        measuring = [MeasureJob(number, *bounds) for number, bounds in ranges]
        facts = merge_facts(stages.run("measure", work, measuring, num_samples=count), work.cleaning.measured)
    work = replace(work, facts=facts)
    jobs = [CleanJob(number, *bounds) for number, bounds in ranges]
    parts = stages.run("clean", work, jobs, num_samples=count)
    kept = np.zeros(count, np.bool_)
    for job, part in zip(jobs, parts, strict=True):
        bits = np.frombuffer(base64.b64decode(part["kept"]), np.uint8)
        kept[job.first : job.last] = np.unpackbits(bits, count=job.last - job.first)
    num_repeated = 0
    if work.cleaning is not None and work.cleaning.duplicates is not None:
        num_repeated = _drop_duplicates(work, stages, destination, jobs, parts, kept)
    num_errors = sum(part["num_errors"] for part in parts)
    passed = sum(part["passed"] for part in parts)
    rules = _counts(work, parts, passed, num_repeated)
    return Survey(Selection(kept), facts, int(kept.sum()), count - passed - num_errors, num_errors, rules)


def _drop_duplicates(
    work: Work, stages: Stages, destination: Destination, jobs: list[CleanJob], parts: list[Part], kept: Any
) -> int:
    """Take repeated samples out of `kept`, note them for the quarantine, and return how many there are."""
    total = 0
    files = [(job.digests, part["buckets"]) for job, part in zip(jobs, parts, strict=True)]
    for number, (samples, originals) in enumerate(find_duplicates(destination, files)):
        kept[samples] = False
        total += len(samples)
        rejects = Rejects(work.source, work.policy, work.origin)
        for sample, original in sorted(zip(samples.tolist(), originals.tolist(), strict=True)):
            rejects.drop(sample, f"equals sample {original}", None)
        name = f"duplicates-{number:05d}"
        if "quarantine" in (part := write_rejects(work, rejects, name)):
            stages.quarantine[name] = part["quarantine"]
    return total


def _counts(work: Work, parts: list[Part], left: int, num_repeated: int) -> list[RuleCount]:
    if work.cleaning is None:
        return []
    changed = np.sum([part["changed"] for part in parts], axis=0, dtype=int).tolist() if parts else []
    dropped = np.sum([part["dropped"] for part in parts], axis=0, dtype=int).tolist() if parts else []
    if work.cleaning.duplicates is not None:
        changed, dropped = [*changed, 0], [*dropped, num_repeated]
    counts = []
    for rule, changes, drops in zip(work.cleaning.labels, changed, dropped, strict=False):
        counts.append(RuleCount(rule, left - changes - drops, changes, drops))
        left -= drops
    return counts
