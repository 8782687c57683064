"""Orders and their division among ranks: pure functions of (seed, epoch, position)."""

from dataflow.order.feistel import Permutation
from dataflow.order.ranks import rank_from_environment
from dataflow.order.shuffle import BlockOrder, FullOrder, Order, SequentialOrder
from dataflow.order.split import part_bounds, split_batch

__all__ = [
    "BlockOrder",
    "FullOrder",
    "Order",
    "Permutation",
    "SequentialOrder",
    "part_bounds",
    "rank_from_environment",
    "split_batch",
]
