r"""Megatron token files: `NAME.bin` holds the tokens of all sequences in a row, `NAME.idx` says where each begins.

    "MMIDIDX\0\0" | uint64 version 1 | uint8 type | uint64 sequences | uint64 documents
    int32 length of every sequence | int64 byte offset of every sequence | int64 first sequence of every document

https://github.com/NVIDIA/Megatron-LM, megatron/core/datasets/indexed_dataset.py

A sample is a sequence: the field `tokens`, a list. A block is about 1 MiB of sequences. The lengths stay in memory, 4
bytes a sequence; beyond that nothing is kept per sample.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from connectors.errors import BadInputError, CorruptError
from dataflow.formats.scan import BLOCK_BYTES, BlockTable, cut_blocks, listing_fingerprint, shard_table
from dataflow.index import Index

if TYPE_CHECKING:
    from connectors.objects import ObjectMeta
    from dataflow.formats.place import Place

__all__ = ["MegatronFormat", "MegatronSource"]

HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\0\0"
TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}


@dataclass(frozen=True, slots=True, eq=False)
class MegatronSource:
    """One set of token files, opened; see `dataflow.formats.protocol.Source`.

    Attributes:
        schema: `tokens`.
        index: Blocks of whole sequences.
        lengths: int32, tokens in every sequence.
    """

    schema: pa.Schema
    index: Index
    lengths: npt.NDArray[np.int32]
    format: str = field(default="megatron", init=False)

    def decode(self, block: int, data: memoryview) -> pa.RecordBatch:
        """Return the sequences of a block; tokens are views of `data`."""
        first, last = self.index.blocks.first_sample[block : block + 2]
        offsets = np.zeros(last - first + 1, np.int32)
        np.cumsum(self.lengths[first:last], out=offsets[1:])
        tokens = self.schema.field("tokens").type
        values = pa.Array.from_buffers(tokens.value_type, int(offsets[-1]), [None, pa.py_buffer(data)])
        column = pa.ListArray.from_arrays(pa.array(offsets), values, type=tokens)
        return pa.RecordBatch.from_arrays([column], schema=self.schema)


class MegatronFormat:
    """Pairs of `.bin` and `.idx` files."""

    name = "megatron"

    def open(self, place: Place) -> MegatronSource | None:
        """Read the `.idx` files; None where there are none.

        Raises:
            CorruptError: An index is damaged or does not fit its tokens.
            BadInputError: Files differ in their type, or are laid out in another way.
        """
        indexes = [meta for meta in place.visible if meta.key.endswith(".idx")]
        tokens = {meta.key: meta for meta in place.files_named((".bin",))}
        pairs = [(meta, tokens[name]) for meta in indexes if (name := meta.key[:-4] + ".bin") in tokens]
        if not pairs:
            return None
        if len(pairs) < len(indexes):
            missing = next(meta for meta in indexes if meta.key[:-4] + ".bin" not in tokens)
            uri = place.uri(missing)
            raise CorruptError(f"{uri} has no tokens: {uri[:-4]}.bin is missing; write both again", uri=uri)
        table, types, lengths = BlockTable(), set(), []
        for shard, (meta, content) in enumerate(pairs):
            dtype, sizes = _read_index(place, meta, content)
            types.add(dtype)
            lengths.append(sizes)
            ends = np.cumsum(sizes, dtype=np.int64) * dtype.itemsize
            for offset, length, count in cut_blocks(ends, BLOCK_BYTES):
                table.add(shard, offset, length, count)
        if len(types) > 1:
            raise BadInputError(f"the token files at {place.url} have different types: {sorted(map(str, types))}")
        schema = pa.schema([pa.field("tokens", pa.list_(pa.from_numpy_dtype(types.pop())), nullable=False)])
        shards, blocks = shard_table([content for _, content in pairs]), table.finish()
        index = Index(place.root, listing_fingerprint(shards, blocks, schema), shards, blocks)
        index.check()
        return MegatronSource(schema, index, np.concatenate(lengths))


def _read_index(place: Place, meta: ObjectMeta, content: ObjectMeta) -> tuple[np.dtype[Any], npt.NDArray[np.int32]]:
    """Return type and lengths of the sequences of one pair of files."""
    uri = place.uri(meta)
    data = b"".join(place.chunks(meta))
    if len(data) < HEADER.size or not data.startswith(MAGIC):
        raise CorruptError(f"{uri} is not a Megatron index: it does not begin with MMIDIDX", uri=uri)
    _, version, code, num_sequences, _ = HEADER.unpack_from(data)
    if version != 1 or code not in TYPES:
        raise BadInputError(f"{uri} has version {version} and type {code}; known are version 1 and {TYPES}", uri=uri)
    if len(data) < HEADER.size + 12 * num_sequences:
        raise CorruptError(f"{uri} has {len(data)} bytes, too few for its {num_sequences} sequences", uri=uri)
    dtype = np.dtype(TYPES[code])
    lengths = np.frombuffer(data, "<i4", num_sequences, HEADER.size)
    offsets = np.frombuffer(data, "<i8", num_sequences, HEADER.size + 4 * num_sequences)
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    if num_sequences and (lengths.min() < 0 or offsets[0] or (offsets[1:] != ends[:-1]).any()):
        raise BadInputError(f"the sequences of {uri} do not follow each other; write the files again", uri=uri)
    total = int(ends[-1]) if num_sequences else 0
    if total != content.size_bytes:
        name = place.uri(content)
        raise CorruptError(f"{name} has {content.size_bytes} bytes, its index {uri} counts {total}", uri=name)
    return dtype, lengths.astype(np.int32)
