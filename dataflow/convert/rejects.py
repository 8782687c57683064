"""Samples that a conversion leaves out because something is wrong with them, and where they are kept.

A quarantine is a native dataset beside the destination: one sample per reject, with its place in the source, the reason
and, where it could be read, the sample itself. Each job writes the rejects it met as one shard, before its own record.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from cache.keys import BlockRef
from connectors.errors import BadInputError, DataError
from dataflow.formats.arrow.manifest import INDEX_NAME, MANIFEST_NAME
from dataflow.formats.arrow.target import ArrowTarget
from dataflow.formats.destination import Destination

if TYPE_CHECKING:
    import numpy.typing as npt

    from dataflow.convert.job import Work
    from dataflow.dataset import Dataset
    from dataflow.formats.place import BadRange
    from dataflow.formats.protocol import Part

__all__ = [
    "ON_ERROR",
    "QUARANTINE_SCHEMA",
    "FaultPolicy",
    "Rejects",
    "owned_by_quarantine",
    "quarantine_target",
    "write_rejects",
]

ON_ERROR = ("raise", "skip", "quarantine")
MAX_EXAMPLES = 5
# Of a damaged record, as many bytes are kept.
MAX_RAW_BYTES = 1 << 20
QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("sample", pa.int64(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        # An Arrow IPC stream of one row; in stage `scan` the damaged bytes; missing where there is neither.
        pa.field("record", pa.binary()),
    ]
)

_OWNED = re.compile(r"(clean|write|duplicates|scan)-[\w-]*\d{5,}\.arrow")


@dataclass(frozen=True, slots=True)
class FaultPolicy:
    """What is done about samples that cannot be read, judged or mapped.

    Attributes:
        on_error: One of `ON_ERROR`.
        max_errors: More than that end the conversion; None for any number.
    """

    on_error: str
    max_errors: int | None

    def __post_init__(self) -> None:
        if self.on_error not in ON_ERROR:
            raise BadInputError(f"on_error must be one of {', '.join(ON_ERROR)}, got {self.on_error!r}")
        if self.max_errors is not None and self.max_errors < 0:
            raise BadInputError(f"max_errors must be >= 0, got {self.max_errors}")
        if self.max_errors is not None and not self.lenient:
            raise BadInputError('max_errors counts what is passed over: give on_error="skip" or "quarantine" as well')

    @property
    def lenient(self) -> bool:
        """Whether a conversion goes on after a bad sample."""
        return self.on_error != "raise"

    def check(self, num_errors: int, last: str) -> None:
        """Insist that there are not too many.

        Raises:
            DataError: There are; `last` is the one that was too much.
        """
        if self.max_errors is not None and num_errors > self.max_errors:
            raise DataError(f"more than {self.max_errors} samples (max_errors) are bad; the last one: {last}")


@dataclass(slots=True)
class Rejects:
    """What one job leaves out.

    Attributes:
        source: Where the samples come from.
        policy: What is done about errors.
        origin: What the samples came from where that is no URL.
        num_errors: Samples with errors.
        examples: The first of them.
        rows: Everything for the quarantine; stays empty without one.
    """

    source: Dataset
    policy: FaultPolicy
    origin: str | None
    num_errors: int = 0
    examples: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def on_damage(self, samples: npt.NDArray[Any], block: int, error: DataError) -> None:
        """Take note of samples that cannot be read."""
        for sample in samples.tolist():
            self._error(sample, "read", str(error), None)

    def error(self, sample: int, stage: str, error: Exception, row: pa.RecordBatch | None) -> None:
        """Take note of a sample that a step failed on, or raise what that failure is.

        Raises:
            DataError: Errors are not tolerated, or not that many.
        """
        reason = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
        if not self.policy.lenient:
            raise DataError(
                f"{stage} failed on sample {sample} of {self.origin or self.source.index.url}: {reason}"
            ) from error
        self._error(sample, stage, reason, row)

    def drop(self, sample: int, rule: str, row: pa.RecordBatch | None) -> None:
        """Take note of a sample that a cleaning rule drops."""
        if self.policy.on_error == "quarantine":
            self.rows.append(self._row(sample, "clean", rule, row))

    def bad_range(self, bad: BadRange) -> None:
        """Take note of bytes that no sample could be made of."""
        record = None
        if self.policy.on_error == "quarantine" and bad.length:
            record = _read(self.source, bad)
        self._error(-1, "scan", bad.reason, None)
        if self.rows:
            place = {"uri": bad.uri, "offset": bad.offset, "length": bad.length, "record": record}
            self.rows[-1] |= place

    def _error(self, sample: int, stage: str, reason: str, row: pa.RecordBatch | None) -> None:
        self.num_errors += 1
        message = f"{stage}: {reason}" if sample < 0 else f"sample {sample}: {stage}: {reason}"
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(message)
        if self.policy.on_error == "quarantine":
            self.rows.append(self._row(sample, stage, reason, row))
        self.policy.check(self.num_errors, message)

    def _row(self, sample: int, stage: str, reason: str, row: pa.RecordBatch | None) -> dict[str, Any]:
        index = self.source.index
        if sample < 0:
            return {"sample": -1, "row": -1, "stage": stage, "reason": reason}
        block = int(index.blocks.first_sample.searchsorted(sample, side="right")) - 1
        ref = index.block_ref(block)
        place = {
            "uri": ref.uri,
            "offset": ref.offset,
            "length": ref.length,
            "row": sample - int(index.blocks.first_sample[block]),
        }
        if self.origin is not None:  # the files are gone when this is read
            place = {"uri": self.origin, "offset": 0, "length": 0, "row": sample}
        return place | {
            "sample": sample,
            "stage": stage,
            "reason": reason,
            "record": None if row is None else _encode(row),
        }


def write_rejects(work: Work, rejects: Rejects, name: str) -> Part:
    """Write the quarantine's shard of one job, where there is something in it; return what the job's record keeps."""
    part: Part = {"num_errors": rejects.num_errors, "examples": rejects.examples}
    if not rejects.rows:
        return part
    batch = pa.RecordBatch.from_pylist(rejects.rows, QUARANTINE_SCHEMA)
    shard, chunks = quarantine_target().build(QUARANTINE_SCHEMA, [batch], 0)
    with Destination(work.quarantine_url) as destination:
        destination.put(f"{name}.arrow", chunks)
    return part | {"quarantine": {"name": f"{name}.arrow", "shard": shard}}


def quarantine_target() -> ArrowTarget:
    """Return how shards of a quarantine are built."""
    return ArrowTarget(block_size_bytes=1 << 20, compression="none")


def owned_by_quarantine(name: str) -> bool:
    """Return whether an object of this name is part of a quarantine, finished or not."""
    return name in (INDEX_NAME, MANIFEST_NAME) or _OWNED.fullmatch(name) is not None


def _read(source: Dataset, bad: BadRange) -> bytes | None:
    """Return the first bytes of a range; None where they cannot be had."""
    index = source.index
    names = [index.shard_uri(shard) for shard in range(len(index.shards))]
    if bad.uri not in names:
        return None
    version = index.shards.versions[names.index(bad.uri)].as_py()
    ref = BlockRef(bad.uri, version, bad.offset, min(bad.length, MAX_RAW_BYTES))
    return bytes(source.reader.read_blocks([ref])[0].view)


def _encode(row: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, row.schema) as writer:
        writer.write_batch(row)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]
