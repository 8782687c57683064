"""Orders, global batches and their division among ranks: pure functions of (seed, epoch, position)."""

from dataflow.order.balance import BalancedParts
from dataflow.order.batching import Batching, FixedBatches, GlobalBatch, Steps
from dataflow.order.buckets import BucketBatches
from dataflow.order.calibration import Calibration, calibrate
from dataflow.order.feistel import Permutation
from dataflow.order.filtering import Filtered, Selection
from dataflow.order.locality import LocalParts
from dataflow.order.mesh import Mesh
from dataflow.order.mixture import Mixture, mixture_weights
from dataflow.order.packing import Pack, PackedBatches, first_fit_decreasing, lay_out_pack
from dataflow.order.ranks import rank_from_environment
from dataflow.order.schedule import BEGINNING, Epoch, Place, Schedule
from dataflow.order.shuffle import BlockOrder, FullOrder, Order, SequentialOrder
from dataflow.order.source import Shuffle, Source
from dataflow.order.split import Division, EqualParts, Parts, WeightedParts, divide, part_bounds, split_batch

__all__ = [
    "BEGINNING",
    "BalancedParts",
    "Batching",
    "BlockOrder",
    "BucketBatches",
    "Calibration",
    "Division",
    "Epoch",
    "EqualParts",
    "Filtered",
    "FixedBatches",
    "FullOrder",
    "GlobalBatch",
    "LocalParts",
    "Mesh",
    "Mixture",
    "Order",
    "Pack",
    "PackedBatches",
    "Parts",
    "Permutation",
    "Place",
    "Schedule",
    "Selection",
    "SequentialOrder",
    "Shuffle",
    "Source",
    "Steps",
    "WeightedParts",
    "calibrate",
    "divide",
    "first_fit_decreasing",
    "lay_out_pack",
    "mixture_weights",
    "part_bounds",
    "rank_from_environment",
    "split_batch",
]
