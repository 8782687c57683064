"""The one idea behind every format: a table of blocks, so that any sample is found without reading anything else."""

from dataflow.index.storage import decode_index, encode_index
from dataflow.index.table import Blocks, Index, Parts, Pieces, Shards

__all__ = ["Blocks", "Index", "Parts", "Pieces", "Shards", "decode_index", "encode_index"]
