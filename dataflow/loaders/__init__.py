"""Batches for torch: the drop-in `DataLoader`, samplers that fit any number of ranks, and datasets for them."""

from dataflow.loaders.bad_samples import BadSamples
from dataflow.loaders.costs import MeasuredCosts, TimedDataset
from dataflow.loaders.dataloader import DataLoader
from dataflow.loaders.joined import JoinedDataset
from dataflow.loaders.packs import PackedDataset
from dataflow.loaders.sampler import ElasticBatchSampler
from dataflow.loaders.schedule_sampler import Part, ScheduleSampler
from dataflow.loaders.stats import LoaderStats
from dataflow.loaders.tuning import Tuning, WeightTuner

__all__ = [
    "BadSamples",
    "DataLoader",
    "ElasticBatchSampler",
    "JoinedDataset",
    "LoaderStats",
    "MeasuredCosts",
    "PackedDataset",
    "Part",
    "ScheduleSampler",
    "TimedDataset",
    "Tuning",
    "WeightTuner",
]
