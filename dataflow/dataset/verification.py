"""Reading a whole dataset to see whether it is what it says: checksums, counts, no sample twice, none missing.

    index       no shard twice, no block over another, no hole between two
    manifest    its totals and statistics (native)
    shards      size, digest, checksums, number of batches (native); a fresh scan finds what the index says (scanned)
    blocks      each decodes, into as many samples as the index says
    keys        no two samples have one

Problems are collected, and the pass goes on behind each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from crc32c import crc32c

from connectors.errors import BadInputError, DataError
from connectors.scratch import scratch_folder
from dataflow.dataset.keys import KeyCheck
from dataflow.dataset.layout import layout_problems
from dataflow.formats import FORMATS
from dataflow.formats.arrow.census import FieldStatistics, add_statistics, measure_batch
from dataflow.formats.arrow.manifest import content_digest
from dataflow.formats.arrow.reading import ArrowSource
from dataflow.formats.destination import Destination
from dataflow.formats.pieces import decode_block, fetch_blocks
from dataflow.formats.place import Place
from dataflow.formats.scanned import scanned_format
from dataflow.index.storage import SIDECAR_NAME

if TYPE_CHECKING:
    from connectors.objects import ObjectMeta
    from dataflow.dataset.dataset import Dataset

__all__ = ["DEFAULT_KEY", "Verification", "verify"]

MAX_PROBLEMS = 1000
# The field that names samples, as archives have it.
DEFAULT_KEY = "__key__"
# Formats whose shards have no bytes between two blocks. Of scanned ones, a scan tells.
SEAMLESS = frozenset({"arrow", "mds"})


@dataclass(frozen=True, slots=True)
class Verification:
    """What a pass over a dataset found.

    Attributes:
        num_samples: Samples that could be decoded.
        num_blocks: Blocks that were looked at.
        size_bytes: Bytes of those blocks.
        problems: What is wrong, one sentence each; at most `MAX_PROBLEMS`.
        num_problems: How many there are in all.
        key: The field whose values were compared between samples; None where none was.
        num_repeated: Samples whose key an earlier one has; each is a problem.
    """

    num_samples: int
    num_blocks: int
    size_bytes: int
    problems: list[str]
    num_problems: int
    key: str | None = None
    num_repeated: int = 0


def verify(
    dataset: Dataset, *, key: str | None = DEFAULT_KEY, progress: Callable[[int], None] | None = None
) -> Verification:
    """Read and decode every block, going on after what is wrong.

    Native shards are read whole and checked against digest, size and the checksum of every block, so that also what
    other Arrow readers need of them is covered. Files whose index was scanned are scanned again. Of all formats every
    block is decoded, which checks what the format has to check. Encoded images are not decoded.

    Args:
        dataset: What to verify; its projection does not matter.
        key: Field whose value no two samples may have; None for none. The default counts where there is such a field.
        progress: Called with the number of blocks done, after each shard.

    Raises:
        BadInputError: There is no field `key`.
    """
    names = dataset.source.schema.names
    if key not in (None, DEFAULT_KEY, *names):
        raise BadInputError(f"there is no field {key!r} to compare; there are {', '.join(names)}")
    with ExitStack() as stack:
        check = _Pass(dataset, key if key in names else None)
        if check.key is not None:
            folder = stack.enter_context(scratch_folder())
            check.keys = KeyCheck(stack.enter_context(Destination(folder)))
        check.run(progress)
        return check.result()


@dataclass(slots=True)
class _Pass:
    """One pass over one dataset."""

    dataset: Dataset
    key: str | None
    keys: KeyCheck | None = None
    num_samples: int = 0
    num_problems: int = 0
    num_repeated: int = 0
    size_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    statistics: list[dict[str, FieldStatistics]] = field(default_factory=list)

    def run(self, progress: Callable[[int], None] | None) -> None:
        index = self.dataset.index
        native = isinstance(self.dataset.source, ArrowSource)
        scans = _Scans(self.dataset)
        self.note(layout_problems(index, seamless=self.dataset.source.format in SEAMLESS))
        self.note(scans.unknown())
        for shard in range(len(index.shards)):
            # Blocks are in the order of their shards.
            blocks = range(*(int(block) for block in np.searchsorted(index.blocks.shard, [shard, shard + 1])))
            before = self.num_problems
            self.note(self.native_shard(shard, blocks) if native else self.blocks(blocks))
            if self.num_problems == before:  # otherwise the same would be told again
                self.note(scans.compare(shard))
            self.size_bytes += int(index.blocks.length[blocks.start : blocks.stop].sum())
            if progress is not None:
                progress(blocks.stop)
        self.note(self.manifest())
        self.note(self.repeated())

    def result(self) -> Verification:
        return Verification(
            self.num_samples,
            self.dataset.index.num_blocks,
            self.size_bytes,
            self.problems,
            self.num_problems,
            self.key,
            self.num_repeated,
        )

    def note(self, problems: Iterator[str]) -> None:
        for problem in problems:
            self.num_problems += 1
            if len(self.problems) < MAX_PROBLEMS:
                self.problems.append(problem)

    def blocks(self, blocks: range) -> Iterator[str]:
        """Yield what is wrong with blocks of any format."""
        for block in blocks:
            try:
                (pieces,) = fetch_blocks(self.dataset.reader, self.dataset.index, [block])
                batch = decode_block(self.dataset.source, block, pieces)
            except DataError as error:
                yield str(error)
            else:
                yield from self.count(block, batch)

    def native_shard(self, shard: int, blocks: range) -> Iterator[str]:
        """Yield what is wrong with one native shard, as a whole and block by block."""
        index = self.dataset.index
        uri, size_bytes = index.shard_uri(shard), int(index.shards.size_bytes[shard])
        try:
            content = memoryview(self.dataset.reader.read_object(uri).data)
        except DataError as error:
            yield str(error)
            return
        if len(content) != size_bytes:
            yield f"{uri} has {len(content)} bytes, the index says {size_bytes}"
        elif content_digest(content) != index.shards.versions[shard].as_py():
            yield f"{uri} does not match its digest"
        else:
            count = pa.ipc.open_file(pa.py_buffer(content)).num_record_batches
            if count != len(blocks):
                yield f"{uri} has {count} record batches, the index knows {len(blocks)}"
        for block in blocks:
            ref = index.block_ref(block)
            data = content[ref.offset : ref.offset + ref.length]
            if len(data) != ref.length or crc32c(data) != ref.crc32c:
                yield f"block {block} ({ref.length} bytes at offset {ref.offset} of {uri}) does not match its checksum"
                continue
            try:
                batch = self.dataset.source.decode(block, data)
            except DataError as error:
                yield str(error)
            else:
                self.statistics = [add_statistics([*self.statistics, measure_batch(batch)])]
                yield from self.count(block, batch)

    def count(self, block: int, batch: pa.RecordBatch) -> Iterator[str]:
        """Take the samples of a good block into account."""
        first, last = (int(number) for number in self.dataset.index.blocks.first_sample[block : block + 2])
        self.num_samples += batch.num_rows
        if batch.num_rows != last - first:
            ref = self.dataset.index.block_ref(block)
            yield (
                f"block {block} (offset {ref.offset} of {ref.uri}) has {batch.num_rows} samples, the index says "
                f"{last - first}"
            )
        elif self.keys is not None:
            self.keys.add(batch.column(self.key), first)

    def manifest(self) -> Iterator[str]:
        """Yield where the manifest of a native dataset counts otherwise, if all blocks could be counted."""
        source, index = self.dataset.source, self.dataset.index
        if not isinstance(source, ArrowSource) or self.num_problems:
            return
        told = source.manifest
        found = {
            "num_samples": self.num_samples,
            "num_blocks": index.num_blocks,
            "num_shards": len(index.shards),
            "size_bytes": int(index.shards.size_bytes.sum()),
        }
        for name, number in found.items():
            if getattr(told, name) != number:
                yield f"the manifest of {index.url} says {name} {getattr(told, name)}, there are {number}"
        if told.statistics and self.statistics and told.statistics != self.statistics[0]:
            wrong = [name for name, row in self.statistics[0].items() if told.statistics.get(name) != row]
            yield f"the manifest of {index.url} has other statistics than its samples, of {', '.join(wrong)}"

    def repeated(self) -> Iterator[str]:
        """Yield samples that have the key of an earlier one."""
        for sample, original in self.keys.repeated() if self.keys is not None else ():
            self.num_repeated += 1
            yield f"sample {sample} has the same {self.key} as sample {original}"


class _Scans:
    """Compares an index that was found by scanning with its files. Of other formats there is nothing to compare."""

    def __init__(self, dataset: Dataset) -> None:
        self._index = dataset.index
        self._form = scanned_format(FORMATS, dataset.source.format)
        self._place = Place(dataset.index.url, dataset.reader)
        self._files: dict[str, ObjectMeta] = {}

    def unknown(self) -> Iterator[str]:
        """Yield files that the index beside them does not know."""
        if self._form is None:
            return
        self._files = {meta.key: meta for meta in self._place.files}
        if SIDECAR_NAME not in self._files:
            return  # then opening has listed the files itself
        known = set(self._index.shards.names.to_pylist())
        for meta in self._form.files(self._place):
            if meta.key not in known:
                yield f"{self._place.uri(meta)} is not in the index: run `dataflow index --resume`"

    def compare(self, shard: int) -> Iterator[str]:
        """Yield where a scan of one file finds something else than the index says."""
        if self._form is None:
            return
        name, uri = self._index.shards.names[shard].as_py(), self._index.shard_uri(shard)
        meta = self._files.get(name)
        if meta is None or meta.version != self._index.shards.versions[shard].as_py():
            yield f"{uri} {'is gone' if meta is None else 'has changed since it was scanned'}: run `dataflow index`"
            return
        try:
            rows = self._form.scan_file(self._place, meta).rows
        except DataError as error:
            yield str(error)
            return
        blocks = self._index.blocks
        first, last = np.searchsorted(blocks.shard, [shard, shard + 1])
        counts = np.diff(blocks.first_sample[first : last + 1])
        own = np.stack([blocks.offset[first:last], blocks.length[first:last], counts], axis=1)
        if not np.array_equal(own, rows):
            yield (
                f"the index has {int(counts.sum())} samples in {len(own)} blocks of {uri}, a scan finds "
                f"{int(rows[:, 2].sum())} in {len(rows)}: run `dataflow index`"
            )
