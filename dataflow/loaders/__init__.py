"""Batches for torch: the drop-in `DataLoader` and the sampler that fits any number of ranks."""

from dataflow.loaders.dataloader import DataLoader
from dataflow.loaders.sampler import ElasticBatchSampler
from dataflow.loaders.stats import LoaderStats

__all__ = ["DataLoader", "ElasticBatchSampler", "LoaderStats"]
