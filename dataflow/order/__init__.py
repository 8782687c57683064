"""Orders, global batches and their division among ranks: pure functions of (seed, epoch, position)."""

from dataflow.order.batching import Batching, FixedBatches, GlobalBatch, Steps
from dataflow.order.buckets import BucketBatches
from dataflow.order.feistel import Permutation
from dataflow.order.mesh import Mesh
from dataflow.order.packing import Pack, PackedBatches, first_fit_decreasing, lay_out_pack
from dataflow.order.ranks import rank_from_environment
from dataflow.order.schedule import BEGINNING, Epoch, Place, Schedule
from dataflow.order.shuffle import BlockOrder, FullOrder, Order, SequentialOrder
from dataflow.order.source import Shuffle, Source
from dataflow.order.split import Division, EqualParts, Parts, WeightedParts, divide, part_bounds, split_batch

__all__ = [
    "BEGINNING",
    "Batching",
    "BlockOrder",
    "BucketBatches",
    "Division",
    "Epoch",
    "EqualParts",
    "FixedBatches",
    "FullOrder",
    "GlobalBatch",
    "Mesh",
    "Order",
    "Pack",
    "PackedBatches",
    "Parts",
    "Permutation",
    "Place",
    "Schedule",
    "SequentialOrder",
    "Shuffle",
    "Source",
    "Steps",
    "WeightedParts",
    "divide",
    "first_fit_decreasing",
    "lay_out_pack",
    "part_bounds",
    "rank_from_environment",
    "split_batch",
]
